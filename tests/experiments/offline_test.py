"""Learning from responses that are there: rounds, restarts, resuming, pairs."""

import functools
import math

import jax
import jax.numpy as jnp
import mistakes
import numpy as np
import pytest
import scripts
from steps import count_ones

from experiments import build, offline, preference, rest_em
from experiments.data import Data
from jaxrl_llm import rollouts
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.rollouts import stored as pools
from jaxrl_llm.sampling.policy import Decoding


def tiny(algorithm, **rounds):
  config = scripts.tiny_config()
  config.rollout.update(prompts=4, samples=4, max_tokens=12)
  config.task.update(train=24, held_out=8, demonstrations=20)
  config.warm_start.steps = 0
  config.warm_start.optimizer.warmup_updates = 0
  config.optimizer.warmup_updates = 0
  config.evaluation.update(prompts=8, batch=8)
  config.algorithm = algorithm
  config.rounds.update(rounds)
  return config


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """Configurations with the same update share it, as processes share none."""
  made, make = {}, offline.trainer

  def shared(config, *rest):
    key = str((config.algorithm, config.optimizer, config.rounds.batch))
    if key not in made:
      made[key] = make(config, *rest)
    return made[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(offline, 'trainer', shared)
    yield


@functools.cache
def setting():
  """A model made from scratch and its data set."""
  config = tiny(dict(name='rest_em'))
  model = build.model(config.model, config.seed)
  return model, build.dataset(config, model.tokenizer)


def phase_of(config, folder, data=None):
  """A script's main phase and the state that it begins with."""
  model, own = setting()
  script = dict(rest_em=rest_em, dpo=preference)[config.algorithm.name].SCRIPT
  script.check(config)
  phase = script.phase(config, model, data or own, jax.random.key(0), folder)
  if phase.setting is not None:
    phase.setting = phase.setting._replace(
      rewards=[RewardPart('ones', count_ones)]
    )
  phase.reference = model.params
  return phase, phase.begin(jax.tree.map(jnp.copy, model.params))


def steps(phase, state, numbers):
  """States and results of some steps; states are copies."""
  found = []
  for number in numbers:
    result = phase.step(state, number, None)
    state = result.state
    found.append((jax.tree.map(jnp.copy, state), result))
  return found


def assert_equal(one, other):
  trees = one.trainable, other.trainable
  jax.tree.map(np.testing.assert_array_equal, *trees)


REST = dict(sampling=2, learning=2, batch=4, per_prompt=2)


@pytest.fixture(scope='module')
def rest(tmp_path_factory):
  """Two rounds of RestEM, undisturbed."""
  folder = tmp_path_factory.mktemp('rest')
  config = tiny(dict(name='rest_em', threshold=0.0), **REST)
  config.steps = 8
  phase, state = phase_of(config, folder)
  return config, folder, steps(phase, state, range(8))


def test_a_round_learns_what_was_right_and_no_more_than_allowed(rest):
  config, folder, found = rest
  files = sorted(path.name for path in (folder / 'rounds').iterdir())
  assert files == [f'{i:08d}.npz' for i in (0, 1, 4, 5)]
  sampled, chosen = 0, []
  for number in (0, 1):
    result = found[number][1]
    pool = pools.load_pool(folder / 'rounds' / files[number])
    samples = jax.device_get(result.responses.samples)
    rows = [np.reshape(x, (-1, 12)) for x in (samples.tokens, samples.mask)]
    texts = result.responses.completions
    right = [
      tokens[mask].tolist()
      for text, tokens, mask in zip(texts, *rows, strict=True)
      if '1' in text
    ]
    kept = [
      row[0, : length[0]].tolist()
      for row, length in zip(pool.tokens, pool.lengths, strict=True)
    ]
    assert kept == right and len(kept) == result.metrics['rounds/chosen'] > 0
    sampled += int(samples.mask.sum())
    chosen += pool.prompts.tolist()
    assert result.tokens == samples.mask.sum()
    assert result.advantages.sum() == len(kept)
  allowed = sum(min(chosen.count(p), 2) for p in set(chosen))
  assert found[2][1].metrics['rounds/groups'] == allowed
  assert found[2][1].tokens == 0 and found[2][1].responses is None


def test_a_round_begins_with_the_initial_model(rest):
  config, folder, found = rest
  phase, _ = phase_of(config, folder)
  changed = jax.tree.map(lambda x: x + 1.0, found[1][0].trainable['policy'])
  again = steps(phase, phase.begin(changed), [2])
  assert_equal(again[0][0], found[2][0])


def test_a_new_process_goes_on_where_the_old_one_was(rest):
  config, folder, found = rest
  phase, _ = phase_of(config, folder)
  state = jax.tree.map(jnp.copy, found[4][0])
  again = steps(phase, state, range(5, 8))
  assert_equal(again[-1][0], found[-1][0])
  finite = lambda x: {k: v for k, v in x.metrics.items() if np.isfinite(v)}
  for (_, new), (_, old) in zip(again, found[5:], strict=True):
    assert finite(new) == finite(old)


def test_what_has_no_reward_is_not_learned(tmp_path):
  config = tiny(dict(name='rest_em', threshold=0.0), **REST)
  config.steps = 4
  phase, state = phase_of(config, tmp_path)
  third = lambda completions: [
    None if i % 3 else 1.0 for i in range(len(completions))
  ]
  some = RewardPart('some', third)
  phase.setting = phase.setting._replace(rewards=[some])
  result = phase.step(state, 0, None)
  pool = pools.load_pool(tmp_path / 'rounds' / '00000000.npz')
  # Of 16 responses those numbered 0, 3, 6, … are scored.
  assert result.metrics['rewards/some/none'] == 10
  assert len(pool.prompts) == result.metrics['rounds/chosen'] == 6
  np.testing.assert_array_equal(
    result.advantages.ravel(), [0.0 if i % 3 else 1.0 for i in range(16)]
  )
  config.algorithm.threshold = 9.0
  (tmp_path / 'nothing').mkdir()
  phase, state = phase_of(config, tmp_path / 'nothing')
  done = steps(phase, state, range(2))
  with mistakes.refused('round 0 has nothing to learn from'):
    phase.step(done[-1][0], 2, None)


def pair_config(**rounds):
  config = tiny(dict(name='dpo', beta=0.5), batch=4, **rounds)
  config.rewards = dict(length=dict(name='length_in_tokens'))
  return config


def pair_data(count=12):
  rows = [
    {'prompt': f'{i % 9 + 1}+1=', 'chosen': '2=2', 'rejected': '1+1+1'}
    for i in range(count)
  ]
  # Longer ones than are evaluated: nothing reads them.
  return Data(rows, [*rows[:8], {'prompt': '1+1='}], [])


def test_given_pairs_are_learned_against_the_initial_model(tmp_path):
  config = pair_config()
  config.steps = 3
  phase, state = phase_of(config, tmp_path, pair_data())
  model, _ = setting()
  done = steps(phase, state, range(3))
  stored = pools.load_pool(tmp_path / 'rounds' / 'given.npz')
  encoded = build.encode(config, pair_data().train, model.tokenizer)
  whole = rollouts.score_tokens(
    model.config,
    model.params,
    rollouts.to_prompts(
      preference.prompts_lib.gather(encoded, range(len(encoded.rows)))
    ),
    jnp.asarray(stored.tokens),
    Decoding(num_tokens=build.known_tokens(model)),
    12,
  ).log_probs
  mask = np.arange(stored.tokens.shape[2]) < stored.lengths[..., None]
  np.testing.assert_allclose(
    stored.ref_log_probs, np.where(mask, whole, 0.0), atol=1e-5
  )
  first, last = done[0][1].metrics, done[-1][1].metrics
  # The policy is the reference still: every margin is 0.
  assert first['loss'] == pytest.approx(math.log(2), abs=1e-5)
  assert abs(first['preference/margin']) < 1e-4
  assert last['loss'] < first['loss']
  assert last['preference/margin'] > 0 and last['preference/accuracy'] == 1
  evaluated = phase.evaluate(done[-1][0].trainable, 3, None).metrics
  assert evaluated['eval/preference/accuracy'] == 1
  at_start = phase.evaluate({'policy': model.params}, 0, None).metrics
  # As the loss counts a margin of 0.
  assert at_start['eval/preference/accuracy'] == 0.5


def test_pairs_that_are_equal_or_over_budget(tmp_path):
  config, data, long = pair_config(), pair_data(), pair_data()
  config.steps = 1
  data.train[3] = data.train[3] | {'chosen': '1+1', 'rejected': '1+1'}
  with mistakes.refused('1 of 12 ', "prompt '4+1='"):
    phase_of(config, tmp_path, data)
  long.train[3] = long.train[3] | {'rejected': '1' * 12}
  with mistakes.refused('1 of 12 pairs ', ' of more than'):
    phase_of(config, tmp_path, long)
  config.prompts.overlong = 'drop'
  phase, _ = phase_of(config, tmp_path, long)
  (line,) = [line for line in phase.describe() if '11 pairs' in line]
  assert '1 by response' in line
