"""Branches as rows: shared states, whole responses, values and baselines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from listed import compose

from jaxrl_llm import estimators, rollouts
from jaxrl_llm import estimators as est
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.rollouts import branch_values, branches
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks.prompts import PromptBatch
from jaxrl_llm.tasks.vocabulary import character_tokenizer

LENGTH, GROUP, COUNT, SAMPLES = 6, 8, 3, 3
TOKENIZER = character_tokenizer('abcdefghij')
BATCH = PromptBatch(
  tokens=np.array([[3, 4, 5], [6, 0, 0]], np.int32),
  lengths=np.array([3, 1], np.int32),
  rows=[{'prompt': 'abc'}, {'prompt': 'd'}],
)
KL, BUFFER = 0.3, 3
RULES = {
  'fixed': est.positions.fixed(1, 3, 4),
  'uniform': est.positions.uniform(),
  'delimiter': est.positions.delimiter(4, 5),
  'entropy': est.positions.entropy_above(0.8),
}


def score(completion_ids, finished):
  """Some number of the whole response; None for some."""
  found = []
  for ids, ended in zip(completion_ids, finished, strict=True):
    number = sum((i + 1) * token for i, token in enumerate(ids)) % 7 + ended
    found.append(None if sum(ids) % 3 == 0 else number / 4)
  return found


@pytest.fixture(scope='module')
def model():
  return toys.make_policy('llama')


def sampled(model, estimator):
  """(responses, branched, their rollouts, the rollouts of the branches)."""
  needs = estimator.needs
  generation = rollouts.with_statistics(
    rollouts.Generation(
      samples=GROUP,
      max_tokens=LENGTH,
      decoding=policy.Decoding(temperature=0.7, num_tokens=9),
      eos_ids=(1, 6),
      pad_id=0,
    ),
    needs,
  )
  parts = [RewardPart('r', score)]
  key = jax.random.key(2)
  responses = rollouts.respond(
    *model, BATCH, generation, TOKENIZER, parts, key, keep_cache=True
  )
  found = branches.branch(
    *model, responses, generation, needs.branches, TOKENIZER, parts, key
  )
  reference = jax.tree.map(lambda x: 0.9 * x, model[1])
  own, rows = (
    toys.to_rollouts(*model, reference, given, generation, asked, 1)
    for given, asked in (
      (responses, needs),
      (found.responses, branch_values.row_needs(needs)),
    )
  )
  return responses, found, own, rows


def valued(model, positions, shaping=(), **settings):
  values = est.branches(COUNT, SAMPLES, positions, **settings)
  estimator = compose(*shaping, est.gae(1.0, 0.0, values))
  responses, found, own, rows = sampled(model, estimator)
  needs = estimator.needs
  data = branch_values.add_values(own, rows, found.forks, needs.branches)
  return estimator, responses, found, data, rows


def test_states_are_shared_between_responses_that_begin_alike():
  tokens = np.array([[[3, 4, 5], [3, 4, 6], [3, 5, 5]], [[3, 4, 5]] * 3])
  fork_positions = np.array(
    [[[1, 2], [1, 2], [0, 2]], [[2, 0], [0, 1], [1, 2]]]
  )
  shared_with = branches.find_shared(fork_positions, tokens)
  np.testing.assert_array_equal(
    shared_with, [[[0, 1], [0, 1], [4, 5]], [[0, 1], [2, 3], [3, 0]]]
  )


@pytest.mark.parametrize('rule', RULES)
def test_values_are_means_over_whole_responses(model, rule):
  _, responses, found, data, rows = valued(
    model, RULES[rule], (est.at_last_token(),)
  )
  forks, samples = found.forks, responses.samples
  fork_positions, mask = (
    np.asarray(forks.fork_positions),
    np.asarray(samples.mask),
  )
  tokens, seen, known = np.asarray(samples.tokens), {}, 0
  row_tokens, row_mask = np.asarray(rows.tokens), np.asarray(rows.mask)
  shape = (2, GROUP, COUNT, SAMPLES)
  expected = np.zeros(mask.shape)
  drawn = 0
  for p, g, m in zip(*np.nonzero(fork_positions), strict=True):
    at = fork_positions[p, g, m]
    assert mask[p, g, at]  # inside the response
    state = (p, *tokens[p, g, :at])
    slot = np.ravel_multi_index((g, m, 0), shape[1:])
    if state not in seen:
      seen[state] = []
      for r in range(slot, slot + SAMPLES):
        ids = row_tokens[p, r][row_mask[p, r]].tolist()
        assert tuple(ids[:at]) == state[1:] and at < len(ids) <= LENGTH
        ended = ids[-1] in (1, 6)
        assert ended or len(ids) == LENGTH
        assert not set(ids[:-1]) & {1, 6}
        (number,) = score([ids], [ended])
        seen[state] += [] if number is None else [number]
        assert found.responses.completions[p * rows.mask.shape[1] + r] == (
          TOKENIZER.decode(ids, skip_special_tokens=True)
        )
        drawn += len(ids) - at
        assert int(forks.forked_at[p, r, 0]) == at
        assert int(forks.parents[p, r, 0]) == g
    else:
      assert not row_mask[p, slot : slot + SAMPLES].any()
    assert bool(data.branch_mask[p, g, at]) == bool(seen[state])
    if seen[state]:
      known += 1
      expected[p, g, at] = np.mean(seen[state])
  np.testing.assert_allclose(data.branch_values, expected, atol=1e-6)
  assert known == np.asarray(data.branch_mask).sum() > 5
  assert found.tokens == drawn
  assert (
    len(seen) == found.statistics['branches/forks'] < (fork_positions > 0).sum()
  )
  assert any(len(scores) < SAMPLES for scores in seen.values())


def test_a_branch_is_charged_like_its_response(model):
  """Length penalty on the whole, KL from the fork on, as a loop has it."""
  shaping = (
    est.penalize_overlong(LENGTH, BUFFER),
    est.at_last_token(),
    est.subtract_token_kl(KL),
  )
  estimator, _, found, data, rows = valued(
    model, RULES['fixed'], shaping, score_weighted=True
  )
  assert estimator.needs.branches.shaping is not None
  fork_positions = np.asarray(found.forks.fork_positions)
  kl = np.asarray(rows.log_probs - rows.ref_log_probs)
  norms, mask = np.asarray(rows.score_norms), np.asarray(rows.mask)
  checked = 0
  for p, g, m in zip(*np.nonzero(fork_positions), strict=True):
    at = fork_positions[p, g, m]
    slot = int(found.forks.shared_with[p, g, m]) * SAMPLES
    later = [q for q in (1, 3, 4, LENGTH) if q > at][0]
    returns, weights = [], []
    for r in range(slot, slot + SAMPLES):
      if not rows.valid[p, r, 0]:
        continue
      length = int(mask[p, r].sum())
      penalty = np.clip((length - LENGTH + BUFFER) / BUFFER, 0, 1)
      reward = float(rows.rewards[p, r, 0]) - penalty
      returns.append(reward - KL * kl[p, r, at:length].sum())
      weights.append(norms[p, r, at : min(later, length)].sum())
    assert bool(data.branch_mask[p, g, at]) == bool(returns)
    if returns:
      checked += len(returns) > 1
      value, baseline = data.branch_values, data.branch_baselines
      assert value[p, g, at] == pytest.approx(np.mean(returns), abs=2e-5)
      assert baseline[p, g, at] == pytest.approx(
        np.average(returns, weights=weights), abs=2e-5
      )
  assert checked > 5
  assert np.abs(data.branch_values - data.branch_baselines).max() > 1e-3


def test_no_branch_at_all(model):
  _, _, found, data, _ = valued(
    model, est.positions.delimiter(99), (est.at_last_token(),)
  )
  assert not data.branch_mask.any() and not data.branch_values.any()
  assert found.tokens == 0 and found.statistics['branches/forks'] == 0


@pytest.mark.slow
def test_branches_that_train_are_rows(model):
  estimator = est.trepo_tree(COUNT, SAMPLES, RULES['fixed'])
  responses, found, own, rows = sampled(model, estimator)
  data = branch_values.add_rows(own, rows, found.forks)
  fork_positions, tokens = (
    np.asarray(found.forks.fork_positions),
    responses.samples.tokens,
  )
  states = [
    (p, *np.asarray(tokens[p, g, : fork_positions[p, g, m]]))
    for p, g, m in zip(*np.nonzero(fork_positions), strict=True)
  ]
  # A state that a sibling forks from has no second fork.
  assert len(states) == len(set(states)) > 3
  total = GROUP + GROUP * COUNT * SAMPLES
  assert data.tokens.shape == (2, total, LENGTH)
  np.testing.assert_array_equal(data.parents[0, :GROUP, 0], range(GROUP))
  assert not data.forked_at[:, :GROUP].any()
  for p, r in np.argwhere(np.asarray(data.forked_at)[..., 0] > 0):
    at, parent = data.forked_at[p, r, 0], data.parents[p, r, 0]
    np.testing.assert_array_equal(
      data.tokens[p, r, :at], data.tokens[p, parent, :at]
    )
    np.testing.assert_array_equal(
      data.log_probs[p, r, :at], data.log_probs[p, parent, :at]
    )
  # What the sampler says of a branch is what the scorer says of it.
  again = rollouts.score_tokens(
    *model,
    responses.prompts,
    data.tokens,
    policy.Decoding(temperature=0.7, num_tokens=9),
    1,
  )
  mask = np.asarray(data.mask)
  np.testing.assert_allclose(
    np.asarray(again.log_probs)[mask],
    np.asarray(data.log_probs)[mask],
    rtol=0,
    atol=1e-5,
  )
  batch = estimator.prepare(data)
  fresh = np.arange(LENGTH) >= np.asarray(data.forked_at)
  np.testing.assert_array_equal(batch.mask, mask & fresh)
  assert int(batch.whole.sum()) == 2 * GROUP
  assert np.isfinite(batch.advantages).all() and jnp.any(batch.advantages != 0)
  assert isinstance(batch, estimators.Batch)
