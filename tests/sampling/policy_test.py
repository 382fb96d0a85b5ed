"""The policy's distribution against transformers', its scores against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import head
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling import policy
from jaxrl_llm.sampling.policy import Decoding, Prompts

adjust = jax.jit(policy.adjust_logits, static_argnames='decoding')
score = jax.jit(policy.score, static_argnames=('config', 'decoding', 'chunk'))

SETTINGS = [
  Decoding(temperature=0.6),
  Decoding(temperature=1.7, top_k=5),
  Decoding(top_k=1),
  Decoding(top_k=1000),
  Decoding(top_p=0.5),
  Decoding(top_p=1e-6),
  Decoding(temperature=0.8, top_p=0.95),
  Decoding(temperature=1.3, top_k=20, top_p=0.7),
]


def random_logits(rows=64, vocabulary=97):
  random = np.random.default_rng(0)
  return random.normal(0.0, 2.0, (rows, vocabulary)).astype(np.float32)


@pytest.mark.parametrize('decoding', SETTINGS)
def test_distribution_is_that_of_transformers(decoding):
  torch = pytest.importorskip('torch')
  import transformers

  logits = random_logits()
  expected = torch.tensor(logits)
  warpers = [transformers.TemperatureLogitsWarper(float(decoding.temperature))]
  if decoding.top_k:
    warpers.append(transformers.TopKLogitsWarper(decoding.top_k))
  if decoding.top_p < 1:
    warpers.append(transformers.TopPLogitsWarper(decoding.top_p))
  for warper in warpers:
    expected = warper(None, expected)
  ours = np.asarray(adjust(logits, decoding))
  np.testing.assert_array_equal(np.isneginf(ours), torch.isneginf(expected))
  np.testing.assert_allclose(
    jax.nn.softmax(ours), torch.softmax(expected, -1), atol=1e-6
  )
  # The reference in `toys` is an oracle of other tests: check it as well.
  again = toys.adjusted_probabilities(logits, decoding)
  np.testing.assert_allclose(jax.nn.softmax(ours), again, atol=1e-6)


def test_extreme_logits():
  """Sets are cut among negative, huge, equal and excluded logits alike."""
  row = [-1e30, -5.0, -5.0, -0.5, 3e38, -np.inf, 0.0, 1e-38]
  cut = lambda k: adjust(jnp.array([row]), Decoding(top_k=k))[0] > -np.inf
  keep = lambda *ids: np.isin(np.arange(8), ids)
  np.testing.assert_array_equal(cut(1), keep(4))
  np.testing.assert_array_equal(cut(3), keep(4, 6, 7))
  np.testing.assert_array_equal(cut(4), keep(3, 4, 6, 7))
  # The fifth largest is a tie: both stay.
  np.testing.assert_array_equal(cut(5), keep(1, 2, 3, 4, 6, 7))
  np.testing.assert_array_equal(cut(7), keep(0, 1, 2, 3, 4, 6, 7))
  infinite = adjust(jnp.array([[jnp.inf, 1.0, 2.0]]), Decoding(top_k=2))
  np.testing.assert_array_equal(infinite, [[jnp.inf, -jnp.inf, 2.0]])


def test_a_nan_is_not_cut_away():
  logits = jnp.array([[1.0, jnp.nan, -2.0, 0.5], [1.0, 0.0, -2.0, 0.5]])
  for decoding in (Decoding(top_k=1), Decoding(top_p=0.5)):
    p = jax.nn.softmax(adjust(logits, decoding))
    assert np.isnan(p[0]).any() and np.isfinite(p[1]).all()


def test_chosen_token_is_kept_and_has_a_gradient():
  logits = random_logits(8)
  worst = logits.argmin(axis=-1).astype(np.int32)
  decoding = Decoding(temperature=0.7, top_k=3, top_p=0.9)
  assert np.isneginf(adjust(logits, decoding)[np.arange(8), worst]).all()

  def chosen(logits):
    kept = adjust(logits, decoding, chosen=worst)
    return jax.nn.log_softmax(kept)[np.arange(8), worst].sum(), kept

  gradient, kept = jax.grad(chosen, has_aux=True)(logits)
  assert np.isfinite(gradient).all()
  assert (gradient[np.arange(8), worst] > 0.5).all()
  assert ((kept > -np.inf).sum(axis=-1) <= 4).all()


def test_padded_vocabulary_rows_have_no_probability():
  logits = random_logits()
  logits[:, 90:] = 50.0
  for decoding in (
    Decoding(num_tokens=90),
    Decoding(num_tokens=90, top_k=4, top_p=0.9),
    Decoding(num_tokens=90, temperature=0.0),
  ):
    p = np.asarray(jax.nn.softmax(adjust(logits, decoding)))
    assert (p[:, 90:] == 0).all()
    np.testing.assert_allclose(p.sum(axis=-1), 1.0, rtol=1e-5)


def test_cuts_hold_few_arrays_like_the_logits():
  """Scoring under top-k and top-p, forward and backward, 64,000 tokens wide.

  It took 5 arrays [chunk, V] at one time when this was written; an array of all
  positions would be 20.
  """
  chunk, chunks, vocabulary, width = 64, 20, 64_000, 16
  config = ModelConfig(**{**toys.MODELS['llama'], 'vocab_size': vocabulary})
  decoding = Decoding(top_k=50, top_p=0.95)

  def loss(params, hidden, tokens):
    out = head.token_statistics(
      config,
      params,
      hidden,
      tokens,
      lambda logits, tokens: policy.adjust_logits(logits, decoding, tokens),
      chunk,
    )
    return out.log_probs.sum() + out.entropy.sum()

  shape = jax.ShapeDtypeStruct
  compiled = (
    jax.jit(jax.grad(loss, (0, 1)))
    .lower(
      {'head': {'embedding': shape((vocabulary, width), jnp.float32)}},
      shape((chunk * chunks, width), jnp.float32),
      shape((chunk * chunks,), jnp.int32),
    )
    .compile()
  )
  used = compiled.memory_analysis().temp_size_in_bytes
  assert used < 8 * 4 * chunk * vocabulary


def test_greedy_does_not_divide_by_its_temperature():
  logits = random_logits(4)
  np.testing.assert_array_equal(
    adjust(logits, Decoding(temperature=0.0)), logits
  )
  assert Decoding(temperature=0).greedy and not Decoding().greedy


@pytest.mark.parametrize(
  'fields',
  [
    dict(temperature=-0.1),
    dict(temperature=float('nan')),
    dict(temperature=float('inf')),
    dict(top_k=-1),
    dict(top_p=0.0),
    dict(top_p=1.1),
    dict(top_p=float('nan')),
    dict(num_tokens=0),
  ],
)
def test_bad_settings_are_refused(fields):
  (name,) = fields
  with pytest.raises(UserError, match=name):
    Decoding(**fields)


def responses_of(shape, seed=3):
  random = np.random.default_rng(seed)
  return random.integers(0, 13, shape).astype(np.int32)


def test_scores_and_gradients_are_those_of_plain_rows():
  """Ragged prompts, one of a single token, shared by 3 responses each.

  The oracle reads prompt and response as one row, by a dense head.
  """
  config, params = toys.make_policy('gemma')
  prompts, responses = toys.make_prompts([5, 1, 3]), responses_of((3, 3, 4))
  weights = np.random.default_rng(4).normal(size=responses.shape)
  weights = weights.astype(np.float32)

  def shared(params):
    decoding = Decoding(temperature=0.8)
    out = policy.score(config, params, prompts, responses, decoding, chunk=5)
    total = (weights * (out.log_probs + 0.3 * out.entropy)).sum()
    return total, (out.log_probs, out.entropy)

  def plain(params):
    logits = toys.plain_logits(config, params, prompts, responses) / 0.8
    dense = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(dense) * dense).sum(axis=-1)
    log_probs = jnp.take_along_axis(dense, responses[..., None], axis=-1)[
      ..., 0
    ]
    return (weights * (log_probs + 0.3 * entropy)).sum(), (log_probs, entropy)

  gradient, (log_probs, entropy) = jax.jit(jax.grad(shared, has_aux=True))(
    params
  )
  expected, dense = jax.jit(jax.grad(plain, has_aux=True))(params)
  assert log_probs.min() < -4 and log_probs.max() > -1.5
  # Rounding: some 20 units in the last place of log-probabilities of −10.
  np.testing.assert_allclose(log_probs, dense[0], atol=2e-5)
  np.testing.assert_allclose(entropy, dense[1], atol=1e-5)
  assert jax.tree.structure(gradient) == jax.tree.structure(expected)
  for x, y in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
    largest = np.abs(y).max()
    assert largest > 0.01
    # Gemma's are ill-conditioned: sums that nearly cancel.
    np.testing.assert_allclose(x, y, rtol=0, atol=5e-5 * largest)


def test_what_stands_behind_an_end_does_not_matter():
  config, params = toys.make_policy()
  prompts, responses = (
    toys.make_prompts([5, 2], width=7),
    responses_of((2, 2, 4)),
  )
  ours = score(config, params, prompts, responses, Decoding())
  tokens = np.where(np.arange(7)[None] < [[5], [2]], prompts.tokens, 7)
  responses[:, :, 3] = 12
  prompts = Prompts(tokens=tokens, lengths=prompts.lengths)
  again = score(config, params, prompts, responses, Decoding())
  for x, y in (
    (again.log_probs, ours.log_probs),
    (again.entropy, ours.entropy),
  ):
    np.testing.assert_array_equal(x[..., :3], y[..., :3])


def test_padding_id_that_is_never_drawn_leaves_gradients_finite():
  """Its log-probability is −inf, outside the mask, with a weight of 0."""
  logits, padding = random_logits(4), np.full(4, 96, np.int32)
  decoding = Decoding(num_tokens=90, top_k=4)
  weights = np.array([1.0, 0.0, 0.0, 0.0], np.float32)
  tokens = np.where(weights > 0, logits[:, :90].argmax(-1), padding)

  def loss(logits):
    kept = policy.adjust_logits(logits, decoding, tokens)
    found = head.statistics(kept, tokens)
    log_probs, entropy = found.log_probs, found.entropy
    return jnp.where(weights > 0, log_probs, 0.0).sum(), (log_probs, entropy)

  gradient, (log_probs, entropy) = jax.grad(loss, has_aux=True)(logits)
  assert np.isneginf(log_probs[1:]).all() and np.isfinite(entropy).all()
  assert np.isfinite(gradient).all() and (gradient[0] != 0).any()
  np.testing.assert_array_equal(gradient[1:], 0.0)


def test_beyond_the_positions_is_refused():
  config, params = toys.make_policy(max_length=8)
  prompts = toys.make_prompts([5])
  evaluate = lambda responses: jax.eval_shape(
    lambda: policy.score(config, params, prompts, responses)
  )
  evaluate(responses_of((1, 1, 3)))
  with pytest.raises(UserError, match='9 tokens exceed the 8 positions'):
    evaluate(responses_of((1, 1, 4)))
