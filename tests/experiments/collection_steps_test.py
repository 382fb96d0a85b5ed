"""Steps of a tiny model with refilling and hints: what is trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from experiments import build, checks, online
from experiments.configs import quickstart
from jaxrl_llm import rollouts
from jaxrl_llm.rewards import RewardPart
from tests.experiments import replay_test

# One in which both tools have work to do.
STEP = 6


def number(prompt):
  """Something that only the row's own prompt gives, a multiple of 8."""
  return 8.0 * (sum(map(ord, prompt)) % 100)


def rewards_of(prompts, completions):
  """Half of the prompts fail often; responses with a 1 get more."""
  return [
    number(p) + text.count('1') if number(p) % 16 else float('1' in text[:2])
    for p, text in zip(prompts, completions, strict=True)
  ]


@pytest.fixture(scope='module')
def stepped():
  """(phase, a function to its first state, what a step collects)."""
  config = quickstart.get_config()
  config.rollout.update(prompts=8, samples=4, max_tokens=12)
  config.rollout.update(refill=1, hints=(0.5,))
  config.prompts.max_tokens = 20
  config.model.architecture.update(
    hidden_size=16, intermediate_size=16, num_layers=1
  )
  config.task.update(train=200, held_out=8, demonstrations=8)
  config.algorithm = dict(name='remax')
  checks.check(config)
  model = build.model(config.model, config.seed)
  rows = build.dataset(config, model.tokenizer).train
  rl = online.Steps(config, model, rows, jax.random.key(0))
  rl.rewards = [RewardPart('own', rewards_of)]
  begin = lambda: rl.begin(jax.tree.map(jnp.copy, model.params))
  return rl, begin, rl.collect(begin(), STEP), rows, model


def test_collecting_again_gives_the_same(stepped):
  rl, begin, collected, _, _ = stepped
  record = collected.record
  assert record['hints/saved'] > 0 and record['refill/replaced'] > 0
  assert record['sampled/frac_reward_zero_std'] > 0
  again = rl.collect(begin(), STEP)
  assert again.record == collected.record and again.tokens == collected.tokens
  assert again.responses.completions == collected.responses.completions
  for one, two in zip(
    jax.tree.leaves(again.rollouts),
    jax.tree.leaves(collected.rollouts),
    strict=True,
  ):
    np.testing.assert_array_equal(one, two)


def test_the_update_reads_the_prompts_that_were_sampled_from(stepped):
  rl, begin, collected, rows, model = stepped
  read = collected.responses.prompts
  texts = [
    model.tokenizer.decode(ids[:n])
    for ids, n in zip(np.asarray(read.tokens), read.lengths, strict=True)
  ]
  assert texts == [row['prompt'] for row in collected.responses.rows]
  plain = {row['prompt']: row['solution'] for row in rows}
  hinted = [text for text in texts if text not in plain]
  assert hinted
  for text in hinted:
    own = text[: text.index('=') + 1]
    assert (own + plain[own]).startswith(text) and len(text) > len(own)
  # The trainer's log-probabilities are the sampler's, of the same prompts.
  scored = rollouts.score_tokens(
    model.config,
    model.params,
    read,
    collected.rollouts.tokens,
    rl.generation.decoding,
    4,
  )
  mask = np.asarray(collected.rollouts.mask)
  np.testing.assert_allclose(
    np.asarray(scored.log_probs)[mask],
    np.asarray(collected.rollouts.log_probs)[mask],
    rtol=0,
    atol=1e-4,
  )


@pytest.mark.slow
def test_a_resumed_run_has_the_records_of_one_go(tmp_path):
  # The exact answer alone: most groups of the untrained model fail.
  text = scripts.CONFIG.replace(
    "REWARD:symbols'", "REWARD:symbols', weight=0.0"
  )
  config = scripts.write_config(tmp_path / 'config', text)
  settings = ['warm_start.steps=0', 'optimizer.decay=constant']
  settings += ['rollout.refill=2', 'rollout.hints=(0.5,)']
  settings += ['prompts.curriculum=operations', 'prompts.curriculum_steps=6']
  settings += ['prompts.curriculum_stages=3']
  flags = [f'--config.{setting}' for setting in settings]
  for name, counts in (('whole', (9,)), ('parts', (4, 9))):
    for count in counts:
      steps = f'--config.steps={count}'
      ended = scripts.train(tmp_path / name, config, *flags, steps).wait()
      assert ended.code == 0, ended.err
  whole, parts = (scripts.records(tmp_path / x) for x in ('whole', 'parts'))
  # Where the first part ended it was evaluated, too.
  parts[4] = {k: v for k, v in parts[4].items() if k in whole[4]}
  assert parts == whole and len(whole) == 10
  assert sum(record['refill/rounds'] for record in whole[1:]) > 0
  assert sum(record['hints/saved'] for record in whole[1:]) > 0
  shares = [record['curriculum/share'] for record in whole[1:]]
  assert shares == [1 / 3] * 3 + [2 / 3] * 3 + [1.0] * 3
  replay_test.identical(tmp_path / 'whole', [1, 7, 9])
