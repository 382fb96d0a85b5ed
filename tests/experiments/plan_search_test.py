"""Which mesh and micro-batch `plan --search` settles for."""

import types

import pytest

from experiments.configs import base
from experiments.planning import plan_search
from experiments.planning.memory_analysis import TooLarge
from jaxrl_llm.errors import UserError

GIB = 2**30


def search(fits, seconds=lambda tensor, micro: 1.0, chips=4):
  """Over plans that lack memory where `fits` names a program; and the log."""
  config, said = base.get_config(), []
  config.rollout.prompts, config.training.minibatches = 16, 2

  def make(changed):
    tensor, micro = changed.mesh.tensor, changed.training.micro_prompts
    lacking = fits(tensor, micro)

    def compile(name):
      if lacking == name:
        raise TooLarge(name, micro * GIB)

    if lacking == 'rows':
      raise UserError('rows do not spread\nchoose others')
    return types.SimpleNamespace(
      chosen=(tensor, micro),
      seconds=seconds(tensor, micro),
      check_state=lambda: None,
      update=lambda: compile('update'),
      compile=lambda: compile('sample'),
    )

  plan = plan_search.search(config, chips, make, said.append)
  return plan.chosen, said


def test_the_largest_micro_batch_of_the_fastest_mesh():
  fits = lambda tensor, micro: 'update' if micro > 2 * tensor else None
  chosen, said = search(
    fits, lambda tensor, micro: {1: 3.0, 2: 1.0, 4: 2.0}[tensor]
  )
  assert chosen == (2, 4)
  assert 'tensor=1, micro_prompts=8: update lacks 8.0 GiB' in said
  assert said[-1] == 'tensor=4, micro_prompts=8: 2.0 s'


def test_sampling_that_does_not_fit_is_not_tried_with_smaller_updates():
  fits = lambda tensor, micro: 'sample' if tensor < 4 else None
  chosen, said = search(fits)
  assert chosen == (4, 8)
  assert len(said) == 3


def test_rows_that_do_not_spread_are_left_out():
  fits = lambda tensor, micro: 'rows' if tensor < 2 or micro < 8 else None
  assert search(fits)[0] == (2, 8)


def test_nothing_fits():
  with pytest.raises(UserError, match='update lacks 1.0 GiB') as caught:
    search(lambda tensor, micro: 'update')
  assert len(str(caught.value).splitlines()) <= 3
