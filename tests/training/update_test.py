"""The update: sums of micro-batches, skipped updates, decay, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys
import trees
from mistakes import refused
from trees import assert_same

from jaxrl_llm import estimators as est
from jaxrl_llm import training
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.prompts import last_tokens
from jaxrl_llm.sampling import policy
from jaxrl_llm.training import critic

WORDS = 9


def bigram(trainable, frozen, prompts, batch):
  """A policy that reads the last token only: quick to compile."""
  del frozen
  first = jnp.broadcast_to(
    last_tokens(prompts)[:, None, None], (*batch.tokens.shape[:2], 1)
  )
  last = jnp.concatenate([first, batch.tokens[..., :-1]], axis=2)
  table = trainable['policy']['embedding']
  log_probs = jax.nn.log_softmax(table, axis=-1)[last]
  chosen = jnp.take_along_axis(log_probs, batch.tokens[..., None], axis=-1)
  entropy = -(jnp.exp(log_probs) * log_probs).sum(axis=-1)
  return est.Outputs(log_probs=chosen[..., 0], entropy=entropy)


def bigram_case(estimator, prompts=4):
  """(parameters, prompts, prepared batch), the batch off policy."""
  random = np.random.default_rng(0)
  table = random.normal(size=(WORDS, WORDS)).astype(np.float32)
  rollouts, _ = toys.random_rollouts(1, prompts, dtype=np.float32)
  questions = toys.make_prompts([2, 1, 3, 1][:prompts], vocab_size=WORDS)
  return (
    {'policy': {'embedding': table}},
    questions,
    estimator.prepare(rollouts),
  )


def state_of(trainable, optimizer):
  # Copies: the update takes the state's buffers over.
  trainable = jax.tree.map(jnp.array, trainable)
  return training.init_state(trainable, optimizer)


def test_micro_batches_give_the_gradient_of_the_whole():
  estimator = est.grpo()
  trainable, prompts, batch = bigram_case(estimator)
  optimizer = optax.sgd(1.0)
  whole = jax.jit(
    jax.value_and_grad(
      lambda t: estimator.loss(bigram(t, None, prompts, batch), batch)
    )
  )
  loss, gradient = whole(trainable)
  gradient = np.asarray(gradient['policy']['embedding'])
  assert np.abs(gradient).max() > 1e-3
  mask = np.asarray(batch.mask & batch.valid)
  outputs = bigram(trainable, None, prompts, batch)
  entropy = np.asarray(outputs.entropy)[mask].mean()
  gap = np.abs(np.asarray(outputs.log_probs - batch.log_probs))[mask]
  for micro in (1, 2, 4):
    update = training.make_update(
      bigram, estimator, optimizer, micro, diagnostics.per_token()
    )
    state, metrics = update(
      state_of(trainable, optimizer), None, prompts, batch
    )
    step = (
      trainable['policy']['embedding'] - state.trainable['policy']['embedding']
    )
    np.testing.assert_allclose(step, gradient, rtol=1e-5, atol=1e-6)
    expected = {
      'loss': loss,
      'grad_norm': np.linalg.norm(gradient),
      'entropy': entropy,
      'log_prob_difference/mean': gap.mean(),
      'log_prob_difference/max': gap.max(),
      'skipped': 0,
    }
    for key, value in expected.items():
      assert float(metrics[key]) == pytest.approx(float(value), rel=1e-5), key
    assert int(state.updates) == 1


def fragile(trainable, frozen, prompts, batch):
  """As `bigram`; where `frozen` is 0 the loss is finite, its gradient NaN."""
  outputs = bigram(trainable, None, prompts, batch)
  corner = trainable['policy']['embedding'][0, 0]
  more = jnp.sqrt(frozen * jnp.square(corner))
  return outputs.replace(log_probs=outputs.log_probs + more)


@pytest.mark.parametrize('bad', ['nan', 'inf', 'gradient'])
def test_a_step_that_is_not_finite_changes_no_bit(bad):
  estimator = est.reinforce()
  trainable, prompts, batch = bigram_case(estimator)
  optimizer = training.adamw(0.1, weight_decay=0.1)
  update = training.make_update(fragile, estimator, optimizer, 2)
  state, _ = update(state_of(trainable, optimizer), 1.0, prompts, batch)
  before = jax.tree.map(np.array, state)
  poisoned, frozen = batch, 0.0
  if bad != 'gradient':
    advantages = batch.advantages.at[0, 0].set(float(bad))
    poisoned, frozen = batch.replace(advantages=advantages), 1.0
  for count in (1, 2):
    state, metrics = update(state, frozen, prompts, poisoned)
    assert np.isfinite(metrics['loss']) == (bad == 'gradient')
    assert not np.isfinite(metrics['grad_norm'])
    assert int(metrics['skipped']) == int(state.skipped) == count
    assert_same(state.replace(skipped=jnp.int32(0)), before)
  state, metrics = update(state, 1.0, prompts, batch)
  assert int(metrics['skipped']) == int(state.skipped) == 0
  assert int(state.updates) == 2 == int(before.updates) + 1
  with pytest.raises(AssertionError):
    assert_same(state.trainable, before.trainable)


def test_micro_batches_that_do_not_divide_are_refused():
  trainable, prompts, batch = bigram_case(est.reinforce())
  optimizer = optax.sgd(1.0)
  update = training.make_update(bigram, est.reinforce(), optimizer, 3)
  with pytest.raises(UserError, match=r'choose one of \[1, 2, 4\]'):
    update(state_of(trainable, optimizer), None, prompts, batch)


@pytest.mark.parametrize('name', toys.MODELS)
def test_matrices_decay_and_nothing_else(name):
  _, params = toys.make_policy(name)
  optimizer = training.adamw(0.5, weight_decay=0.1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  state = optimizer.init(params)
  changes, _ = jax.jit(optimizer.update)(zeros, state, params)
  decayed, kept = set(), set()
  for path, change in jax.tree_util.tree_leaves_with_path(changes):
    *_, owner, kind = (key.key for key in path)
    old = params
    for key in path:
      old = old[key.key]
    if np.any(change):
      np.testing.assert_allclose(change, -0.05 * old, rtol=1e-5)
      decayed.add(kind)
    else:
      kept.add(kind)
      assert 'norm' in owner or kind == 'bias'
  assert decayed == {'kernel', 'embedding'}
  assert kept == ({'scale', 'bias'} if name == 'gpt2' else {'scale'})


@pytest.mark.parametrize('limit', [None, 0.5])
def test_adamw_is_its_formula(limit):
  """Loshchilov & Hutter's update on a gradient cut to a global norm."""
  random = np.random.default_rng(0)
  w = {'kernel': random.normal(size=(3, 2)), 'bias': random.normal(size=2)}
  w = jax.tree.map(np.float32, w)
  optimizer = training.adamw(
    0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, max_grad_norm=limit
  )
  ours, opt_state = w, optimizer.init(w)
  m = v = jax.tree.map(np.zeros_like, w)
  for t in range(1, 4):
    g = jax.tree.map(lambda x: np.float32(random.normal(size=x.shape)), w)
    changes, opt_state = optimizer.update(g, opt_state, ours)
    ours = optax.apply_updates(ours, changes)
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    scale = 1.0 if limit is None else min(1.0, limit / norm)
    for name, decay in (('kernel', 0.2), ('bias', 0.0)):
      x = scale * g[name]
      m = {**m, name: 0.8 * m[name] + 0.2 * x}
      v = {**v, name: 0.9 * v[name] + 0.1 * x**2}
      first, second = m[name] / (1 - 0.8**t), v[name] / (1 - 0.9**t)
      step = first / (np.sqrt(second) + 1e-3) + decay * w[name]
      w = {**w, name: w[name] - 0.1 * step}
  for name in w:
    np.testing.assert_allclose(ours[name], w[name], rtol=1e-4, atol=1e-6)


def random_like(tree, random):
  return jax.tree.map(lambda x: np.float32(random.normal(size=x.shape)), tree)


def test_delayed_changes_no_bit_and_then_begins():
  random = np.random.default_rng(0)
  params = {'kernel': jnp.array([[1.0, -0.0], [0.3, 2e-38]])}
  course = training.schedule(0.1, 9, 3, 'linear')
  inner = training.adamw(course, weight_decay=0.1)
  optimizer = training.delayed(inner, 2)
  bits = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
  # Outside of jit, where both do the same operations one by one.
  ours, state = params, optimizer.init(params)
  for count in (1, 2):
    poison = {'kernel': np.full((2, 2), [1.0, np.nan], np.float32)}
    changes, state = optimizer.update(poison, state, ours)
    ours = optax.apply_updates(ours, changes)
    assert bits(ours) == bits(params)
    assert bits(state.inner) == bits(inner.init(params))
    assert int(state.seen) == count
  # From here on it is the optimiser, at the beginning of its schedule.
  expected, plain = params, inner.init(params)
  for _ in range(4):
    gradient = random_like(params, random)
    changes, state = optimizer.update(gradient, state, ours)
    ours = optax.apply_updates(ours, changes)
    changes, plain = inner.update(gradient, plain, expected)
    expected = optax.apply_updates(expected, changes)
    assert bits(ours) == bits(expected) != bits(params)
    assert bits(state.inner) == bits(plain)


def test_parts_have_optimisers_of_their_own():
  """Rates, decay and clipping: each as if the other were not there."""
  random = np.random.default_rng(0)
  params = {
    'policy': {'head': {'embedding': np.ones((2, 3), np.float32)}},
    'critic': {'value': {'kernel': np.ones((3, 1)), 'bias': np.ones(1)}},
  }
  params = jax.tree.map(jnp.float32, params)
  alone = {
    'policy': training.adamw(0.1, max_grad_norm=1.0),
    'critic': training.adamw(0.2, weight_decay=0.5, max_grad_norm=1e-3),
  }
  optimizer = training.by_part(**alone)
  state = optimizer.init(params)
  states = {name: alone[name].init(params[name]) for name in alone}
  for _ in range(2):
    gradient = random_like(params, random)
    changes, state = optimizer.update(gradient, state, params)
    for name in alone:
      expected, states[name] = alone[name].update(
        gradient[name], states[name], params[name]
      )
      assert_same(changes[name], expected)
  # A value head's matrix decays, its bias does not.
  zeros = jax.tree.map(jnp.zeros_like, params)
  changes, _ = optimizer.update(zeros, optimizer.init(params), params)
  head = changes['critic']['value']
  np.testing.assert_allclose(head['kernel'], -0.1, rtol=1e-6)
  np.testing.assert_array_equal(head['bias'], 0.0)


@pytest.fixture(scope='module')
def gradients():
  """By trunk: of the policy's loss alone, and with the value error added."""
  config, params = toys.make_policy(num_layers=1)
  prompts = toys.make_prompts([3, 1])
  rollouts, _ = toys.random_rollouts(2, 2, 3, 4, dtype=np.float32)
  batch = est.ppo().prepare(rollouts)
  score = np.random.default_rng(5).normal(size=(1, config.hidden_size))
  surrogate, error = est.clipped(0.2), est.value_error(1.0)
  found = {}
  for make in (critic.separate, critic.shared):
    built = make(config)
    forward = training.actor_critic_forward(
      config, policy.Decoding(), built, chunk=5
    )

    def loss(trainable, coefficient, forward=forward):
      outputs = forward(trainable, None, prompts, batch)
      each = surrogate.apply(outputs, batch)
      each += coefficient * error.apply(outputs, batch)
      return (batch.weights * each).sum()

    trainable = {'policy': params, 'critic': built.init(params, score)}
    gradient = jax.jit(jax.grad(loss))
    found[make] = [gradient(trainable, c) for c in (0.0, 1.0)]
  return found


def test_a_critic_of_its_own_gives_the_policy_no_gradient(gradients):
  without, both = gradients[critic.separate]
  assert_same(both['policy'], without['policy'])
  for leaf in jax.tree.leaves(without['critic']):
    assert not leaf.any()
  for leaf in jax.tree.leaves(both):
    assert np.abs(leaf).max() > 1e-4


def test_a_shared_trunk_learns_the_value_as_well(gradients):
  without, both = gradients[critic.shared]
  apart, copy = gradients[critic.separate]
  near = functools.partial(trees.assert_close, rtol=1e-3, atol=1e-5)
  near(without['policy'], apart['policy'])
  near(both['critic']['value'], copy['critic']['value'])
  # The policy's own gradient and that which its copy got of the value error;
  # the head has no part in values.
  expected = dict(without['policy'])
  for name, own in copy['critic']['trunk'].items():
    expected[name] = jax.tree.map(jnp.add, expected[name], own)
  near(both['policy'], expected)


@pytest.mark.slow
def test_norms_of_both_gradients_are_reported():
  """And what is not finite in one part skips the update of both."""
  trainable, prompts, batch = bigram_case(est.ppo())
  trainable['critic'] = {'value': {'bias': jnp.float32(0.5)}}

  def forward(trainable, frozen, prompts, batch):
    outputs = bigram(trainable, None, prompts, batch)
    bias = frozen * trainable['critic']['value']['bias']
    return outputs.replace(values=batch.values + bias)

  optimizer = training.by_part(policy=optax.sgd(1.0), critic=optax.sgd(0.5))
  update = training.make_update(forward, est.ppo(), optimizer, 2)
  old = jax.tree.map(np.array, trainable)
  state, metrics = update(state_of(trainable, optimizer), 1.0, prompts, batch)
  step = jax.tree.map(lambda x, y: x - y, old, state.trainable)
  for part, name, rate in (
    ('policy', 'grad_norm', 1.0),
    ('critic', 'critic/grad_norm', 0.5),
  ):
    norm = float(optax.tree.norm(step[part])) / rate
    assert norm > 1e-3
    assert float(metrics[name]) == pytest.approx(norm, rel=1e-4)
  before = jax.tree.map(np.array, state.trainable)
  state, metrics = update(state, jnp.inf, prompts, batch)
  assert int(metrics['skipped']) == 1
  assert_same(state.trainable, before)


def test_schedules():
  values = lambda *args: np.array(
    [training.schedule(*args)(step) for step in range(13)]
  )
  rise, fall = [0.2, 0.4, 0.6, 0.8], np.arange(8, -1, -1) / 8
  linear = [0.25, 0.5, 0.75, 1.0, *fall]
  np.testing.assert_allclose(values(1.0, 12), np.ones(13))
  np.testing.assert_allclose(values(1.0, 12, 5), rise + [1.0] * 9, rtol=1e-6)
  np.testing.assert_allclose(values(1.0, 12, 4, 'linear'), linear, atol=1e-6)
  cosine = values(2.0, 12, 0, 'cosine')[[0, 6, 12]]
  np.testing.assert_allclose(cosine, [2.0, 1.0, 0.0], atol=1e-6)
  assert (values(1.0, 12, 1, 'linear')[:2] == 1.0).all()
  # A warm-up ends before the updates do.
  late = values(1.0, 12, 11, 'linear')[10:12]
  np.testing.assert_allclose(late, 1.0, rtol=1e-6)
  for updates, warmup in ((1, 1), (12, 12), (12, 30)):
    with refused(f'warmup_updates is {warmup}', '\nset ', f'{updates - 1}'):
      training.schedule(1.0, updates, warmup)
  # A phase that a run leaves out has no updates.
  training.schedule(1.0, 0, 5)
  with refused("decay is 'step'; choose one of"):
    training.schedule(1.0, 12, 0, 'step')


def temporary_bytes(vocab_size):
  """Of the compiled update of 16,384 response tokens; nothing is executed."""
  prompts, samples, length, width = 4, 256, 16, 16
  fields = dict(num_layers=1, hidden_size=width, vocab_size=vocab_size)
  config = ModelConfig(**{**toys.MODELS['llama'], **fields})
  estimator, optimizer = est.grpo(), training.adamw(1e-4)
  shape = jax.ShapeDtypeStruct
  rollouts = est.Rollouts(
    tokens=shape((prompts, samples, length), jnp.int32),
    mask=shape((prompts, samples, length), bool),
    log_probs=shape((prompts, samples, length), jnp.float32),
    rewards=shape((prompts, samples, 1), jnp.float32),
    ref_log_probs=shape((prompts, samples, length), jnp.float32),
  )
  state = jax.eval_shape(
    lambda key: training.init_state(
      {'policy': transformer.init(config, key)}, optimizer
    ),
    jax.random.key(0),
  )
  questions = policy.Prompts(
    tokens=shape((prompts, 8), jnp.int32), lengths=shape((prompts,), jnp.int32)
  )
  update = training.make_update(
    training.policy_forward(config, policy.Decoding(), chunk=256),
    estimator,
    optimizer,
    micro_prompts=prompts,
    per_token=diagnostics.per_token(0.2),
  )
  batch = jax.eval_shape(estimator.prepare, rollouts)
  compiled = update.lower(state, None, questions, batch).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')
def test_memory_does_not_grow_with_all_logits():
  """Doubling V costs < 10 % of one [B, T, V] float32 array.

  Subtracted is the head's own gradient: one float32 array [32,000, D].
  """
  tokens, vocabulary, width = 16_384, 32_000, 16
  growth = temporary_bytes(2 * vocabulary) - temporary_bytes(vocabulary)
  share = (growth - 4 * vocabulary * width) / (4 * tokens * vocabulary)
  print(f'temporary memory grows by {share:.2%} of one [B, T, V] array')
  assert share < 0.1
