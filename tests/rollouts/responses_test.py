"""From prompts to rollouts: what reward functions see, what estimators get."""

import jax
import numpy as np
import pytest
import toys

from jaxrl_llm import rollouts
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import Needs
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.rollouts import collect
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks.prompts import PromptBatch
from jaxrl_llm.tasks.vocabulary import character_tokenizer

TOKENIZER = character_tokenizer('abcdefghij')
ROWS = [{'prompt': 'abc', 'answer': 'x'}, {'prompt': 'd', 'answer': 'y'}]
BATCH = PromptBatch(
  tokens=np.array([[3, 4, 5], [6, 0, 0]], np.int32),
  lengths=np.array([3, 1], np.int32),
  rows=ROWS,
)
GENERATION = rollouts.Generation(
  samples=4,
  max_tokens=5,
  decoding=policy.Decoding(temperature=1.3, num_tokens=13),
  eos_ids=(1, 6),
  pad_id=0,
)
KEY = jax.random.key(0)


@pytest.fixture(scope='module')
def model():
  return toys.make_policy('llama')


@pytest.fixture(scope='module')
def seen(model):
  """(responses, what the reward function was given)."""
  given = {}

  def reward(**columns):
    given.update(columns)
    numbers = [i / 4 for i in range(8)]
    return [None if i == 5 else number for i, number in enumerate(numbers)]

  responses = rollouts.respond(
    *model, BATCH, GENERATION, TOKENIZER, [RewardPart('r', reward)], KEY
  )
  assert not given  # A reward in this process is called for the scores.
  assert responses.scores is responses.scores and given
  return responses, given


def test_reward_functions_see_texts_ids_and_columns(seen):
  responses, given = seen
  tokens, mask = responses.samples.tokens, responses.samples.mask
  assert given['prompts'] == ['abc'] * 4 + ['d'] * 4
  assert given['answer'] == ['x'] * 4 + ['y'] * 4
  assert given['completions'] == responses.completions
  for i, (p, g) in enumerate(np.ndindex(2, 4)):
    ids = np.asarray(tokens[p, g])[np.asarray(mask[p, g])].tolist()
    assert given['completion_ids'][i] == ids
    assert given['finished'][i] is (ids[-1] in (1, 6))
    text = ''.join('abcdefghij'[j - 3] for j in ids if j > 2)
    assert given['completions'][i] == text
  assert True in given['finished'] and False in given['finished']
  names = 'prompts completions answer completion_ids finished'
  assert set(given) == set(names.split())


def make(model, responses, needs, reference=None, **settings):
  return toys.to_rollouts(
    *model, reference, responses, GENERATION, needs, 1, chunk=7, **settings
  )


def test_rewards_reach_their_responses(model, seen):
  responses, _ = seen
  data = make(model, responses, Needs())
  expected = np.arange(8.0).reshape(2, 4, 1) / 4
  valid = np.arange(8).reshape(2, 4, 1) != 5
  np.testing.assert_array_equal(data.valid, valid)
  np.testing.assert_array_equal(
    np.where(valid, data.rewards, 0), expected * valid
  )
  for name in ('tokens', 'mask', 'log_probs'):
    assert getattr(data, name) is getattr(responses.samples, name)
  assert data.ref_log_probs is None and data.sampler_log_probs is None


def test_the_record_leaves_missing_rewards_out(model, seen):
  responses, _ = seen
  metrics = collect.reward_metrics(responses, make(model, responses, Needs()))
  known = np.delete(np.arange(8) / 4, 5)
  assert metrics['rewards/r/mean'] == pytest.approx(known.mean())
  assert metrics['rewards/r/std'] == pytest.approx(known.std())
  assert metrics['rewards/r/none'] == 1
  scores = responses.scores._replace(failed={'r': np.arange(8) == 5})
  responses = responses._replace(scoring=lambda: scores)
  again = collect.reward_metrics(responses, make(model, responses, Needs()))
  assert again == metrics | {'rewards/r/none': 0}


def exactly(config, params, data):
  prompts = policy.Prompts(tokens=BATCH.tokens, lengths=BATCH.lengths)
  return toys.exact_statistics(
    config, params, prompts, data.tokens, GENERATION.decoding
  )


def test_reference_and_rescoring(model, seen):
  config, params = model
  responses, _ = seen
  reference = jax.tree.map(lambda x: 0.9 * x, params)
  needs = Needs(reference=True)
  data = make(model, responses, needs, reference, rescore=True)
  assert data.sampler_log_probs is responses.samples.log_probs
  mask = np.asarray(data.mask)
  for scored, weights in (
    (data.log_probs, params),
    (data.ref_log_probs, reference),
  ):
    expected = exactly(config, weights, data)['log_probs']
    np.testing.assert_allclose(scored[mask], expected[mask], atol=1e-5)
  assert np.abs(data.log_probs - data.sampler_log_probs)[mask].max() <= 1e-5
  assert np.abs(data.log_probs - data.ref_log_probs)[mask].max() > 0.01


def test_entropy_and_score_norms_are_those_of_the_policy(model, seen):
  config, params = model
  responses, _ = seen
  data = make(model, responses, Needs(entropy=True, score_norms=True))
  assert data.log_probs is responses.samples.log_probs
  mask, expected = np.asarray(data.mask), exactly(config, params, data)
  for name in ('entropy', 'score_norms'):
    np.testing.assert_allclose(
      data[name][mask], expected[name][mask], rtol=0, atol=1e-5
    )


def test_greedy_responses_give_the_baseline(model, seen):
  responses, _ = seen
  settings = rollouts.greedy(GENERATION)
  assert settings.samples == 1 and settings.max_tokens == GENERATION.max_tokens
  reward = lambda completion_ids: [len(ids) / 10 for ids in completion_ids]
  parts = [RewardPart('length', reward)]
  baseline, again = (
    rollouts.respond(*model, BATCH, settings, TOKENIZER, parts, key)
    for key in (KEY, jax.random.key(99))
  )
  np.testing.assert_array_equal(baseline.samples.tokens, again.samples.tokens)
  needs = Needs(greedy=True)
  data = make(model, responses, needs, baseline=baseline)
  lengths = np.asarray(baseline.samples.mask).sum(axis=2, keepdims=True)
  np.testing.assert_allclose(data.greedy_rewards, lengths / 10, rtol=1e-6)
  # A greedy response without a reward is a baseline of 0.
  nothing = [RewardPart('none', lambda completion_ids: [None, 0.5])]
  baseline = rollouts.respond(*model, BATCH, settings, TOKENIZER, nothing, KEY)
  data = make(model, responses, needs, baseline=baseline)
  np.testing.assert_allclose(data.greedy_rewards.ravel(), [0.0, 0.5])


def test_parts_are_scored_as_the_whole(model):
  """Two of four prompts at a time or all, and two of four responses."""
  prompts = toys.make_prompts([3, 1, 2, 3])
  tokens = np.random.default_rng(0).integers(0, 13, (4, 4, 5)).astype(np.int32)
  scores = [
    rollouts.score_tokens(
      *model, prompts, tokens, GENERATION.decoding, micro_prompts, 7, at_once
    ).log_probs
    for micro_prompts, at_once in ((4, None), (2, None), (2, 2), (8, 1))
  ]
  assert np.ptp(scores[0], axis=0).min() > 1e-3
  for score in scores[1:]:
    np.testing.assert_allclose(score, scores[0], atol=5e-6)


@pytest.mark.parametrize('name', ['critic', 'token_rewards'])
def test_what_cannot_be_supplied_is_refused(model, seen, name):
  with pytest.raises(UserError, match=name.replace('_', ' ')):
    make(model, seen[0], Needs(**{name: True}))


def test_a_failing_reward_is_named(model):
  def broken(completions):
    return [float('nan')] * len(completions)

  parts = [RewardPart('broken', broken)]
  responses = rollouts.respond(*model, BATCH, GENERATION, TOKENIZER, parts, KEY)
  with pytest.raises(UserError, match='broken'):
    _ = responses.scores


def test_the_device_is_told_all_before_scores_are_waited_for(
  model, seen, monkeypatch
):
  """So that workers score while it computes."""
  responses, _ = seen
  events, real = [], rollouts.score_tokens

  def score_tokens(*arguments, **keywords):
    events.append('device')
    return real(*arguments, **keywords)

  def scoring():
    events.append('scores')
    return responses.scores

  monkeypatch.setattr(collect, 'score_tokens', score_tokens)
  given = responses._replace(scoring=scoring), GENERATION, Needs(reference=True)
  toys.to_rollouts(*model, model[1], *given, micro_prompts=2, rescore=True)
  assert events == ['device', 'device', 'scores']
