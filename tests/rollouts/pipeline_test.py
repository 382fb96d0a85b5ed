"""The whole pipeline against the exact gradient of a tiny language model.

A transformer with four tokens, EOS among them, writes responses of at most four
tokens: 121 of them, so that ∇J is a finite sum.  Training's own code samples
responses and branches, scores them and computes advantages; the mean gradient
over many groups has to be ∇J, up to a distance that a bootstrap over the groups
explains.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.flatten_util import ravel_pytree
from listed import compose

from experiments import build, online
from experiments.configs import base
from jaxrl_llm import estimators as est
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks.vocabulary import character_tokenizer

EOS, LENGTH, GROUP, COUNT, BRANCHES = 1, 4, 3, 2, 2
PROMPTS = [{'prompt': 'a'}, {'prompt': 'aaa'}]
# Of each prompt in a batch: groups that know nothing of each other.
COPIES = 512
KL, BUFFER = 0.5, 2


class Tokenizer:
  """A character tokenizer that decodes nothing: rewards read tokens."""

  def __init__(self):
    self._tokenizer = character_tokenizer('a')

  def __getattr__(self, name):
    return getattr(self._tokenizer, name)

  def __call__(self, *args, **kwargs):
    return self._tokenizer(*args, **kwargs)

  def batch_decode(self, ids, **kwargs):
    return [''] * len(ids)


@functools.cache
def language():
  """All responses, as lists of tokens."""
  found = []
  for size in range(1, LENGTH + 1):
    for ids in itertools.product(range(4), repeat=size):
      ends = ids[-1] == EOS or size == LENGTH
      if ends and EOS not in ids[:-1]:
        found.append(ids)
  return found


@functools.cache
def table():
  """{tokens: reward}, with no pattern that a short cut could use."""
  random = np.random.default_rng(3)
  return {ids: random.normal(0.5, 1.0) for ids in language()}


def reward(completion_ids):
  return [table()[tuple(ids)] for ids in completion_ids]


@functools.cache
def model(seed=1):
  sizes = dict(hidden_size=8, intermediate_size=8, num_heads=2, num_kv_heads=1)
  config, params = toys.make_policy(
    'llama', vocab_size=4, num_layers=1, max_length=64, **sizes
  )
  return build.Model(config, params, Tokenizer(), (EOS,), None)


def reference():
  return jax.tree.map(lambda x: 0.8 * x, model().params)


def settings():
  config = base.get_config()
  config.prompts.max_tokens = 4
  config.rollout.update(
    prompts=2 * COPIES, samples=GROUP, max_tokens=LENGTH, temperature=0.9
  )
  config.rewards = dict(table=dict(name='arithmetic_answer'))
  config.algorithm = dict(name='rloo')
  return config


def begin(estimator, monkeypatch):
  """The phase of a run, with an estimator of our own."""
  monkeypatch.setattr(build, 'estimator', lambda config: estimator)
  rl = online.Steps(settings(), model(), PROMPTS * COPIES, jax.random.key(0))
  # All record the same, so that one program samples for all.
  rl.generation = dataclasses.replace(
    rl.generation, statistics=('entropy', 'score_norms')
  )
  rl.rewards = [RewardPart('table', reward)]
  rl.reference = reference()
  state = rl.begin(model().params)
  if rl.critic is not None:
    # Values that mean nothing, in place of the zeros that a critic begins with.
    head = state.trainable['critic']['value']
    random = jax.tree.map(
      lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape), head
    )
    changed = state.trainable['critic'] | {'value': random}
    state = state.replace(trainable=state.trainable | {'critic': changed})
  return rl, state


# These run for less time than their compilation takes.
fast_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
DECODING = policy.Decoding(temperature=0.9, num_tokens=4)


@functools.cache
def exact_gradients():
  """∇ of E[R], and of it with what KL and length cost.

  Averaged over the prompts: sums over all responses, from the definition.
  """
  built, ids = model(), language()
  tokens = np.zeros((2, len(ids), LENGTH), np.int32)
  lengths = np.array([len(x) for x in ids])
  for i, x in enumerate(ids):
    tokens[:, i, : len(x)] = x
  mask = np.arange(LENGTH)[None, None] < lengths[None, :, None]
  prompts = policy.Prompts(
    tokens=jnp.array([[3, 0, 0], [3, 3, 3]]), lengths=jnp.array([1, 3])
  )
  rewards = np.array([table()[x] for x in ids])
  over = np.clip((lengths - (LENGTH - BUFFER)) / BUFFER, 0.0, 1.0)
  flat, unravel = ravel_pytree(built.params)

  def log_probs(params):
    found = policy.score(built.config, params, prompts, tokens, DECODING)
    return jnp.where(mask, found.log_probs, 0.0).sum(axis=2)

  def objectives(flat):
    log_p = log_probs(unravel(flat))
    p, ratio = jnp.exp(log_p), log_p - log_probs(reference())
    plain = (p * rewards[None]).sum(axis=1).mean()
    shaped = (p * (rewards - over)[None] - KL * p * ratio).sum(axis=1).mean()
    return jnp.stack([plain, shaped]), p.sum(axis=1)

  found, mass = fast_jit(jax.jacrev(objectives, has_aux=True))(flat)
  np.testing.assert_allclose(mass, 1.0, atol=1e-5)
  plain, shaped = np.asarray(found, float)
  return {'plain': plain, 'shaped': shaped}


@fast_jit
def group_gradients(params, prompts, tokens, weights):
  """[P, D]: Σ weights · ∇ log-probability over each prompt's rows."""

  def of_group(prompt, tokens, weights):
    alone = jax.tree.map(lambda x: x[None], prompt)

    def total(params):
      found = policy.score(
        model().config, params, alone, tokens[None], DECODING
      )
      return (weights * found.log_probs[0]).sum()

    return ravel_pytree(jax.grad(total)(params))[0]

  return jax.vmap(of_group)(prompts, tokens, weights)


def sample(estimator, monkeypatch, batches=1):
  """[n, D] gradients of pairs of groups, one of each prompt."""
  rl, state = begin(estimator, monkeypatch)

  @fast_jit
  def weigh(rollouts):
    """−P · ∂ loss / ∂ log-probabilities: a loss averages over all prompts."""
    batch = estimator.prepare(rollouts)
    outputs = functools.partial(est.Outputs, values=batch.values)
    loss = lambda x: estimator.loss(outputs(log_probs=x), batch)
    return -2 * COPIES * jax.grad(loss)(batch.log_probs)

  found = []
  for step in range(batches):
    collected = rl.collect(state, step)
    tokens, weights = collected.rollouts.tokens, weigh(collected.rollouts)
    prompts = collected.responses.prompts
    # Branches are further rows: as many at a time as there are responses, so
    # that one program does for all.
    gradients = 0.0
    for first in range(0, tokens.shape[1], GROUP):
      rows = slice(first, first + GROUP)
      gradients += np.asarray(
        group_gradients(
          state.trainable['policy'], prompts, tokens[:, rows], weights[:, rows]
        ),
        float,
      )
    order = np.argsort(np.asarray(prompts.lengths), kind='stable')
    one, other = np.split(gradients[order], 2)
    found.append((one + other) / 2)
  return np.concatenate(found)


def distance(gradients, exact, draws=1000, level=0.997):
  """‖mean − ∇J‖², and the bound below which `level` of a bootstrap lies."""
  mean = gradients.mean(axis=0)
  random = np.random.default_rng(0)
  n = len(gradients)
  centred = gradients - mean
  counts = random.multinomial(n, np.full(n, 1 / n), size=draws)
  spread = np.square(counts @ centred / n).sum(axis=1)
  return np.square(mean - exact).sum(), np.quantile(spread, level)


# What a response earns, its KL to the reference and its length included.
SHAPED = (
  est.penalize_overlong(LENGTH, BUFFER),
  est.at_last_token(),
  est.subtract_token_kl(KL),
)
PLAIN = (est.at_last_token(),)
COSTS = (est.penalize_overlong(LENGTH, BUFFER), est.subtract_response_kl(KL))


def trepo(positions, reward=PLAIN, fill=est.hold, **options):
  values = est.branches(COUNT, BRANCHES, positions, **options)
  credit = est.gae(1.0, 0.0, values, fill)
  return compose(*reward, credit, loss=est.clipped(0.2))


def tree(positions, *reward):
  credit = est.tree(COUNT, BRANCHES, positions)
  return compose(*reward, credit, loss=est.clipped(0.2))


def weighted(rule, *reward, baseline=None):
  return compose(*reward, est.weighted_tree(rule, baseline))


RULES = {
  'fixed': est.positions.fixed(1, 3),
  'uniform': est.positions.uniform(),
  'delimiter': est.positions.delimiter(2, 3),
  'entropy': est.positions.entropy_above(1.0),
}
LATE = est.positions.fixed(3)
PAIRS = est.positions.pairs(est.positions.fixed(2))
# name: (estimator, which gradient it ought to have)
EXACT = {
  **{
    f'hold, {k}': (trepo(rule, SHAPED), 'shaped') for k, rule in RULES.items()
  },
  'tree, one fork': (tree(est.positions.fixed(2)), 'plain'),
  'tree, nested forks': (tree(RULES['fixed'], *SHAPED), 'shaped'),
  'weighted tree, late and held': (
    weighted(est.Threshold(est.thresholds.falling(0.5, 0.1, 3), 6), *COSTS),
    'shaped',
  ),
}
FURTHER = {
  'rloo': (est.rloo(), 'plain'),
  'weighted tree': (est.trepo_weighted(1 / 3), 'plain'),
  'weighted tree against another': (
    est.trepo_weighted(1 / 3, baseline=est.other_tree(est.tree_scale())),
    'plain',
  ),
  'score-weighted': (trepo(RULES['fixed'], score_weighted=True), 'plain'),
  'where uncertain': (trepo(est.positions.entropy_sum(1.5)), 'plain'),
  'a critic that knows nothing': (
    est.trepo_critic(COUNT, BRANCHES, RULES['uniform']),
    'plain',
  ),
  **{f'{name}, plain': (trepo(rule), 'plain') for name, rule in RULES.items()},
}
TILTED = {
  'values interpolated': trepo(LATE, fill=est.interpolate_values),
  'advantages interpolated': trepo(PAIRS, fill=est.interpolate_advantages),
}


def measure(estimator, reward, monkeypatch, batches):
  """(squared distance, its bound, squared norm) of the gradient."""
  gradients = sample(estimator, monkeypatch, batches)
  exact = exact_gradients()[reward]
  return *distance(gradients, exact), exact @ exact


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  ['hold, uniform', 'tree, nested forks', 'weighted tree, late and held'],
)
def test_the_mean_gradient_is_exact(name, monkeypatch):
  off, bound, norm = measure(*EXACT[name], monkeypatch, batches=3)
  assert off < bound < 0.02 * norm


@pytest.mark.slow
@pytest.mark.parametrize('name', TILTED)
def test_interpolation_is_biased(name, monkeypatch):
  off, bound, norm = measure(TILTED[name], 'plain', monkeypatch, batches=3)
  assert off > 2 * bound


def test_what_shapes_the_reward_matters():
  """So an estimator that left it out would be found out."""
  plain, shaped = exact_gradients().values()
  off = np.square(plain - shaped).sum()
  assert off > 0.1 * (shaped @ shaped)


@pytest.mark.slow
@pytest.mark.parametrize('name', EXACT | FURTHER)
def test_the_mean_gradient_is_exact_sharply(name, monkeypatch):
  """Ten times as many groups: 3 % off would show."""
  case = (EXACT | FURTHER)[name]
  off, bound, norm = measure(*case, monkeypatch, batches=30)
  assert off < bound < 0.001 * norm
