"""Groups with variance, and batches joined of groups sampled apart."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import rollouts, sampling
from jaxrl_llm.rewards import Scores
from jaxrl_llm.rewards.scoring import Failures
from jaxrl_llm.rollouts import groups as regroup
from jaxrl_llm.sampling import policy

GROUP, LENGTH = 3, 4


def scores(rewards, failures=None):
  """Scores of [P, G] rewards; None is no score."""
  flat = [reward for group in rewards for reward in group]
  return Scores(
    total=np.array([0.0 if r is None else r for r in flat]),
    valid=np.array([r is not None for r in flat]),
    parts={'own': np.array([np.nan if r is None else r for r in flat])},
    failed={'own': np.array([r is not None and r % 5 == 0 for r in flat])},
    failures=failures or {},
  )


def responses(name, groups, width, failures=None):
  """A batch in which every entry says where it is from."""
  count = groups * GROUP * LENGTH
  numbers = 1000 * name + np.arange(count).reshape(groups, GROUP, LENGTH)
  prompts = 1000 * name + np.arange(groups * width).reshape(groups, width)
  return rollouts.Responses(
    prompts=policy.Prompts(
      tokens=jnp.asarray(prompts, jnp.int32),
      lengths=jnp.arange(1, groups + 1, dtype=jnp.int32),
    ),
    rows=[{'prompt': f'{name}:{g}'} for g in range(groups)],
    samples=sampling.Samples(
      tokens=jnp.asarray(numbers, jnp.int32),
      mask=jnp.asarray(numbers % 2 == 0),
      log_probs=jnp.asarray(numbers / 7, jnp.float32),
      finished=jnp.asarray(numbers[..., :1] % 3 == 0),
    ),
    completions=[f'{name}:{i}' for i in range(groups * GROUP)],
    scoring=lambda: scores(numbers[..., 0].tolist(), failures),
  )


@pytest.mark.parametrize(
  'group, varies, succeeds',
  [
    ((0, 0, 0), False, False),
    ((1, 1, 1), False, True),
    ((0, 1, 0), True, True),
    ((None, 1, 1), False, True),  # what has no score is no 0
    ((None, 0, 0), False, False),
    ((None, 0, 1), True, True),
    ((None, None, 1), False, True),
    ((None, None, None), False, False),
    ((0.1, 0.1 + 1e-12, 0.1), False, False),  # equal as float32
    ((-1, -2, -2), True, False),
    ((0.5, 0.2, 0.5), True, False),  # at the threshold
  ],
)
def test_what_a_group_is(group, varies, succeeds):
  found = scores([(0, 1, 2), group])
  assert regroup.varying(found, 2).tolist() == [True, varies]
  assert regroup.succeeding(found, 2, 0.5).tolist() == [True, succeeds]


def test_join_takes_whole_groups():
  parts = [responses(1, 3, 2), responses(2, 4, 5), responses(3, 2, 9)]
  chosen = [(1, 3), (0, 0), (0, 2), (1, 0)]
  joined = regroup.join(parts, chosen)
  assert joined.cache is None
  # As wide as the widest batch that is taken from.
  assert joined.prompts.tokens.shape == (4, 5)
  found = joined.scores
  for place, (i, group) in enumerate(chosen):
    part = parts[i]
    width = part.prompts.tokens.shape[1]
    np.testing.assert_array_equal(
      joined.prompts.tokens[place, :width], part.prompts.tokens[group]
    )
    assert joined.prompts.lengths[place] == part.prompts.lengths[group]
    assert joined.rows[place] == part.rows[group]
    for name in ('tokens', 'mask', 'log_probs', 'finished'):
      np.testing.assert_array_equal(
        joined.samples[name][place], part.samples[name][group]
      )
    for g in range(GROUP):
      row = place * GROUP + g
      assert joined.completions[row] == part.completions[group * GROUP + g]
      reward = part.scores.total[group * GROUP + g]
      assert found.total[row] == found.parts['own'][row] == reward
      assert found.failed['own'][row] == (reward % 5 == 0)
  assert joined.samples.entropy is None
  assert joined.samples.tokens.dtype == jnp.int32


def test_failures_of_all_batches_are_counted():
  none = dict.fromkeys(('error', 'memory'), 0)
  slow = none | {'timeout': 1, 'crash': 0}
  first = {'own': Failures(slow, {'timeout': 'slow'})}
  both = none | {'timeout': 2, 'crash': 3}
  second = {'own': Failures(both, {'timeout': 'x', 'crash': 'y'})}
  parts = [responses(1, 2, 2, first), responses(2, 2, 2, second)]
  (found,) = regroup.join(parts, [(0, 0), (0, 1)]).scores.failures.values()
  assert found.counts == none | {'timeout': 3, 'crash': 3}
  assert found.messages == {'timeout': 'slow', 'crash': 'y'}
