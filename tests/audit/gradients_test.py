"""The audit's statistics, against known means, covariances and enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import mostly_slow

from jaxrl_llm import audit
from jaxrl_llm import estimators as est

enumeration = est.enumeration


def normal(random, mean, deviations, n, tokens=10):
  """n draws of a normal vector with independent components."""
  vectors = mean + deviations * random.normal(size=(n, len(mean)))
  return audit.Gradients(
    vectors=vectors.astype(np.float32),
    squared_norms=np.square(vectors).sum(axis=1),
    tokens=np.full(n, tokens),
  )


MEAN = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
TILTED = 0.6 * MEAN + np.array([0.0, 1.0, 0.0, 1.5, 0.0])
DEVIATIONS = np.array([3.0, 1.0, 5.0, 2.0, 4.0])


def exact(mean, deviations, tokens=10):
  """A report's numbers from the definitions."""
  true = MEAN @ MEAN
  noise = np.square(deviations).sum()
  cosine = mean @ MEAN / np.sqrt(true * (mean @ mean))
  return {
    'squared_bias': np.square(mean - MEAN).sum() / true,
    'scale': mean @ MEAN / true,
    'cosine': cosine,
    'squared_tilt': 1 - cosine**2,
    'variance': noise / true,
    'signal': 1000 / tokens * (mean @ mean) * cosine**2 / noise,
  }


def check_scatter(estimates, value):
  """Unbiased, and as far off as their errors say."""
  found = np.array(estimates)
  errors = found[:, 1].mean()
  assert abs((found[:, 0] - value).mean()) < 0.2 * errors, (value, found)
  assert 0.6 < found[:, 0].std() / errors < 1.35, (value, found)
  inside = np.abs(found[:, 0] - value) < 2 * found[:, 1]
  assert inside.mean() > 0.88, (value, inside.mean())


@pytest.mark.parametrize('mean', [MEAN, TILTED], ids=['unbiased', 'tilted'])
def test_known_mean_and_covariance(mean):
  """Estimates scatter about the truth as their standard errors say."""
  random = np.random.default_rng(0)
  reports = [
    audit.compare(
      normal(random, mean, DEVIATIONS, 60),
      normal(random, MEAN, DEVIATIONS / 2, 80),
    )
    for _ in range(200)
  ]
  for name, value in exact(mean, DEVIATIONS).items():
    check_scatter([getattr(report, name) for report in reports], value)
  expected = np.sqrt(np.square(DEVIATIONS / 2).sum() / 80 / (MEAN @ MEAN))
  found = np.mean(
    [
      audit.relative_error(normal(random, MEAN, DEVIATIONS / 2, 80))
      for _ in range(200)
    ]
  )
  assert found == pytest.approx(expected, rel=0.1)


def test_a_sketch_preserves_inner_products():
  random = np.random.default_rng(3)
  x, y = random.normal(size=(2, 3000))
  y += 0.7 * x
  tree = lambda v: {'a': jnp.asarray(v[:1000].reshape(10, 100)), 'b': v[1000:]}

  def products(seed):
    one, other = (audit.sketch(tree(v), 256, seed) for v in (x, y))
    return one @ one, one @ other

  found = np.transpose(jax.lax.map(products, jnp.arange(300)))
  true = np.array([x @ x, x @ y])
  bound = np.sqrt([2 * true[0] ** 2, true[0] * (y @ y) + true[1] ** 2])
  bound /= np.sqrt(256)
  error = found.std(axis=0)
  assert (error < 1.2 * bound).all() and (error > 0.7 * bound).all()
  off = np.abs(found.mean(axis=0) - true)
  assert (off < 4 * error / np.sqrt(len(found))).all()
  # Linear: the sketch of a mean is the mean of sketches.
  sums = audit.sketch(tree(x + y), 256)
  parts = audit.sketch(tree(x), 256) + audit.sketch(tree(y), 256)
  np.testing.assert_allclose(sums, parts, atol=1e-4)
  with pytest.raises(ValueError, match='power of two'):
    audit.sketch(tree(x), 100)


def test_sketched_draws_give_the_same_report():
  random = np.random.default_rng(4)
  mean = random.normal(size=2000)
  seen = [mean + 10 * random.normal(size=(n, 2000)) for n in (40, 200)]
  reports = []
  for dimension in (None, 2**15):
    draws = [
      audit.draw_gradients(
        lambda i, x=x: ({'all': {'w': jnp.asarray(x[i], jnp.float32)}}, 7),
        tokens=7 * len(x),
        dimension=dimension,
      )['all']
      for x in seen
    ]
    reports.append(audit.compare(*draws))
  whole, sketched = reports
  assert whole.draws == 40 and whole.tokens == 7
  for name in (*exact(MEAN, DEVIATIONS),):
    a, b = getattr(whole, name), getattr(sketched, name)
    assert abs(a.value - b.value) < 0.5 * a.error + 0.02 * abs(a.value), name


def test_a_budget_of_tokens_is_spent():
  costs = [5, 1, 9, 4, 2, 30, 3]
  draw = lambda i: ({'g': np.ones(3), 'h': np.zeros(3)}, costs[i])
  found = audit.draw_gradients(draw, tokens=20, least=4)
  assert found['g'].tokens.tolist() == costs[:5]
  assert len(found['h'].vectors) == 5
  found = audit.draw_gradients(draw, tokens=1, least=4)
  assert found['g'].tokens.tolist() == costs[:4]
  nothing = lambda i: ({'g': np.full(3, np.nan)}, 1)
  with pytest.raises(ValueError, match='g: gradient 0 is not finite'):
    audit.draw_gradients(nothing, tokens=1)
  with pytest.raises(ValueError, match='least'):
    audit.draw_gradients(draw, tokens=1, least=3)


def test_what_cannot_be_compared_is_refused():
  random = np.random.default_rng(5)
  draws = functools.partial(normal, random, MEAN, DEVIATIONS)
  with pytest.raises(ValueError, match='at least 4'):
    audit.compare(draws(3), draws(9))
  shorter = draws(9)
  shorter = shorter._replace(vectors=shorter.vectors[:, :4])
  with pytest.raises(ValueError, match='4 and 5 numbers'):
    audit.compare(shorter, draws(9))
  with pytest.raises(ValueError, match='5 draws of a part'):
    audit.share(draws(5), draws(6), draws(9))


def test_parts_of_a_gradient():
  """Two independent parts add up; a part that is 0 contributes nothing."""
  random = np.random.default_rng(6)
  part, rest = TILTED, MEAN - TILTED
  shares = []
  for _ in range(150):
    h = normal(random, part, DEVIATIONS, 150)
    other = normal(random, rest, 2 * DEVIATIONS, 150)
    vectors = h.vectors + other.vectors
    whole = audit.Gradients(vectors, np.square(vectors).sum(axis=1), h.tokens)
    reference = normal(random, MEAN, DEVIATIONS / 2, 80)
    shares.append(audit.share(h, whole, reference))
  true = MEAN @ MEAN
  for name, value in {
    'squared_norm': part @ part / true,
    'progress': part @ MEAN / true,
    'cosine': part @ MEAN / np.sqrt(part @ part * true),
    'variance': 1 / 5,
  }.items():
    check_scatter([getattr(share, name) for share in shares], value)
  zero = audit.Gradients(np.zeros_like(vectors), np.zeros(150), h.tokens)
  found = audit.share(zero, whole, reference)
  assert found.squared_norm == found.progress == found.variance == (0.0, 0.0)
  assert np.isnan(found.cosine.value)


# A language of two prompts, 7 responses each, and its policy table.
TOY = enumeration.toy(seed=1, words=2, max_length=2, prompts=2)
SAMPLES = 4


@functools.cache
def toy_gradients(name, n, seed):
  """n draws of an estimator's gradient: groups of 4 from the toy's policy."""
  estimator = RECIPES[name]
  random = np.random.default_rng(seed)
  p = enumeration.response_probabilities(TOY)
  chosen = np.stack(
    [random.choice(len(row), (n, SAMPLES), p=row) for row in p], axis=1
  )
  tokens, mask, states = (x[chosen] for x in (TOY.tokens, TOY.mask, TOY.states))
  prompts = np.arange(len(p))[:, None]
  rewards = TOY.rewards[prompts, chosen][..., None]

  def gradient(tokens, mask, states, rewards):
    def log_probs(table):
      rows = jax.nn.log_softmax(table, axis=-1)
      return rows[prompts[:, :, None], states, tokens]

    rollouts = est.Rollouts(
      tokens=tokens,
      mask=mask,
      log_probs=log_probs(TOY.params.astype(np.float32)),
      rewards=rewards.astype(np.float32),
    )
    batch = estimator.prepare(rollouts)
    loss = lambda table: estimator.loss(
      est.Outputs(log_probs=log_probs(table)), batch
    )
    return -jax.grad(loss)(jnp.asarray(TOY.params, jnp.float32))

  found = jax.jit(jax.vmap(gradient))(tokens, mask, states, rewards)
  vectors = np.asarray(found).reshape(n, -1)
  return audit.Gradients(
    vectors,
    np.square(vectors.astype(float)).sum(axis=1),
    mask.sum(axis=(1, 2, 3)),
  )


RECIPES = {
  'rloo': est.rloo(),
  'dr_grpo': est.dr_grpo(max_length=5),
  'grpo': est.grpo(kl=0.0),
}


@pytest.mark.parametrize('name', mostly_slow(RECIPES, 'rloo'))
def test_agrees_with_enumeration(name):
  """Bias, scale, cosine, variance, tokens and signal, as finite sums say."""
  known = enumeration.examine(RECIPES[name], TOY, SAMPLES, draws=100_000)
  report = audit.compare(
    toy_gradients(name, 1500, seed=10), toy_gradients('rloo', 6000, seed=11)
  )
  true = np.square(known.exact_gradient).sum()
  own = np.square(known.gradient).sum()
  expected = {
    'squared_bias': known.bias**2,
    'scale': known.scale,
    'cosine': known.cosine,
    'squared_tilt': 1 - known.cosine**2,
    'variance': known.variance / true,
    'signal': 1000 / known.tokens * own * known.cosine**2 / known.variance,
  }
  for field, value in expected.items():
    found = getattr(report, field)
    assert abs(found.value - value) < 3.5 * found.error, (field, found, value)
    assert found.error < 0.15 * max(abs(value), 0.1), (field, found)
  assert report.tokens == pytest.approx(known.tokens, rel=0.03)
