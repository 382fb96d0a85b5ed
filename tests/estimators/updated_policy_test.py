"""After every update the sampler draws from what the scorer scores."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts
import steps

from jaxrl_llm import sampling
from jaxrl_llm.models import transformer
from jaxrl_llm.sampling import policy

pytestmark = pytest.mark.slow
STEPS, T = 4, 12
score = jax.jit(policy.score, static_argnames=('config', 'decoding'))


def begin(algorithm):
  """Online RL of a tiny model, at a rate that moves it a lot in each step."""
  config = scripts.tiny_config()
  config.rollout.update(prompts=4, samples=4, max_tokens=T)
  config.model.architecture.num_layers = 2
  config.optimizer.update(learning_rate=0.02, warmup_updates=0)
  config.algorithm = algorithm
  return steps.begin(config)


def branches(rl, model, params, step):
  """Whole responses with a branch in their middle, and what they say of it.

  Returns:
    Prompts, [P, G, T] tokens, log-probabilities that the sampler wrote down,
    and where the branch is.
  """
  settings = dict(decoding=rl.generation.decoding)
  settings |= dict(eos_ids=rl.generation.eos_ids, pad_id=rl.generation.pad_id)
  layout = transformer.sampling_layout(model.config, params)
  batch = rl.source.batch(step)
  prompts = policy.Prompts(tokens=batch.tokens, lengths=batch.lengths)
  drawn_from, key = (model.config, layout), jax.random.key(step)
  responses, cache = sampling.sample_and_keep(
    *drawn_from, prompts, key, samples=4, max_tokens=T, **settings
  )
  mask = np.asarray(responses.mask)
  at = (mask.sum(axis=2, keepdims=True) // 2).astype(np.int32)
  given = cache, responses, jnp.asarray(at), key
  forked, _ = sampling.fork(*drawn_from, *given, branches=1, **settings)
  tokens = np.array(responses.tokens)
  log_probs, where = np.zeros(tokens.shape), np.zeros(tokens.shape, bool)
  for p, g in np.ndindex(at.shape[:2]):
    place = at[p, g, 0]
    if place:
      own = np.asarray(forked.mask[p, g, 0, 0])[: T - place]
      for target, source in (
        (tokens, forked.tokens),
        (log_probs, forked.log_probs),
        (where, forked.mask),
      ):
        target[p, g, place : place + own.size] = source[p, g, 0, 0, : own.size]
  return prompts, tokens, log_probs, where


@pytest.mark.parametrize(
  'algorithm',
  [
    dict(name='trepo', count=2, samples=2),
    dict(name='trepo_tree', count=2, samples=2),
    dict(name='ppo', kl=0.05),
    dict(name='trepo_critic', count=2, samples=2),
  ],
  ids=lambda algorithm: '-'.join(map(str, algorithm.values())),
)
def test_sampler_is_scorer_after_every_update(algorithm):
  rl, state, model = begin(algorithm)
  for step in range(STEPS):
    old = jax.tree.map(jnp.copy, state.trainable['policy'])
    result = rl.step(state, step)
    state = result.state
    assert result.metrics['skipped'] == 0
    # Of the responses, and of branches that are trained on.
    assert 0 < result.metrics['log_prob_difference/max'] < 1e-5, step
    params = state.trainable['policy']
    prompts, tokens, log_probs, where = branches(rl, model, params, step)
    assert where.sum() > 20
    now, before = (
      np.asarray(
        score(
          model.config, each, prompts, tokens, rl.generation.decoding
        ).log_probs
      )
      for each in (params, old)
    )
    assert np.abs(now - log_probs)[where].max() < 1e-5, step
    # Weights from before the update would be noticed.
    assert np.abs(before - log_probs)[where].max() > 1e-2, step


@pytest.mark.parametrize('name', ['grpo', 'trepo_tree'])
def test_sampler_is_scorer_on_eight_devices(name, tmp_path):
  """A whole run: every step samples with what the step before has learned."""
  algorithm = dict(name='grpo', kl=0.04)
  if name == 'trepo_tree':
    algorithm = dict(name=name, count=2, samples=2, kl=0.04)
  text = scripts.CONFIG.replace("dict(name='grpo', kl=0.04)", repr(algorithm))
  config = scripts.write_config(tmp_path / 'config', text)
  ended = scripts.Script(
    'train',
    f'--config={config}',
    f'--workdir={tmp_path / "run"}',
    '--config.mesh.data=2',
    '--config.mesh.fsdp=2',
    '--config.mesh.tensor=2',
    '--config.training.minibatches=1',
    '--config.steps=8',
    cache=scripts.cache(),
    devices=8,
  ).wait()
  assert ended.code == 0, ended.err
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  records = [r for r in map(json.loads, lines) if 'loss' in r]
  assert len(records) == 8
  assert all(0 < r['log_prob_difference/max'] < 1e-5 for r in records)
  # By this much a sampler that were a step behind would be off.
  kls = [record['kl'] for record in records]
  assert kls[0] == pytest.approx(0, abs=1e-6) and abs(kls[-1]) > 1e-3
