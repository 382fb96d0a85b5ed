"""Bytes of compiled updates against counts by hand and each other."""

import mistakes
import pytest
import scripts

from experiments import build
from experiments.configs import base
from experiments.planning import memory
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.tasks import arithmetic


def get_config(hidden_size=32, num_layers=2):
  config = base.get_config()
  config.model.alphabet = arithmetic.ALPHABET
  config.model.architecture = dict(
    hidden_size=hidden_size,
    intermediate_size=2 * hidden_size,
    num_layers=num_layers,
    num_heads=2,
    tied=True,
    max_length=64,
  )
  config.task = dict(name='a data set that is never read')
  config.prompts.max_tokens = 8
  config.rewards = dict(correct=dict(name='arithmetic_answer'))
  config.algorithm = dict(name='rloo')
  config.rollout.update(prompts=4, samples=4, max_tokens=10)
  return config


def count(config) -> int:
  """Parameters of the tied model, counted by hand."""
  shape = config.model.architecture
  d, f = shape.hidden_size, shape.intermediate_size
  vocabulary = 3 + len(arithmetic.ALPHABET)
  # Queries, keys, values, output; gate, up, down; two norms.
  layer = 4 * d * d + 3 * d * f + 2 * d
  return vocabulary * d + shape.num_layers * layer + d


@pytest.mark.slow
def test_bytes_are_as_counted_by_hand():
  specs = dict(name='grpo', kl=0.0), dict(name='trepo'), dict(name='ppo')
  measured = [
    memory.measure(memory.with_algorithm(get_config(), spec)) for spec in specs
  ]
  grpo, trepo, ppo = measured
  assert 0.99 <= trepo.peak / grpo.peak <= 1.01
  # A second trunk: its parameters, moments and gradients, and its activations.
  assert ppo.peak - grpo.peak > 4 * grpo.parameters
  by_hand = 4 * count(get_config())
  assert grpo.parameters == trepo.parameters == by_hand
  value_head = 4 * (32 + 1)
  assert ppo.parameters == 2 * by_hand + value_head
  for found in measured:
    # Adam's two moments and a few counters.
    assert 0 <= found.optimizer - 2 * found.parameters < 100
    state = found.parameters + found.optimizer
    # The whole state is donated, and comes back in place.
    assert state <= found.aliased <= found.outputs < state + 1000
    # Gradients and activations.
    assert found.temporary > found.parameters
    # Outputs reuse the memory of the state.
    whole = state + found.batch + found.temporary
    assert abs(found.peak - whole) < 0.02 * whole


def test_a_model_is_measured_that_does_not_exist(monkeypatch):
  def fail(*args, **kwargs):
    raise AssertionError('parameters are created')

  monkeypatch.setattr(build, 'model', fail)
  monkeypatch.setattr(folders, 'load', fail)
  config = get_config(hidden_size=8192, num_layers=20)
  config.algorithm = dict(name='reinforce')
  found = memory.measure(config)
  assert found.parameters == 4 * count(config) > 50e9
  assert found.peak > 4 * found.parameters


def test_algorithms_of_the_command_line():
  for text, spec in (
    ('vine_ppo:delimiters=[16]', dict(name='vine_ppo', delimiters=[16])),
    ('mine.py:best:clip=0.1', dict(name='mine.py:best', clip=0.1)),
  ):
    assert memory.parse(text) == spec
  with mistakes.refused('write grpo:clip=NUMBER'):
    memory.parse('grpo:clip=wide')
  with mistakes.refused("no 'gpro'"):
    memory.with_algorithm(get_config(), dict(name='gpro'))
  ended = scripts.call('planning.memory', '--config=nowhere.py')
  mistakes.assert_refused(ended, 'no such file')
