"""Chunked head: values, gradients and memory against the dense formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import head
from jaxrl_llm.models.config import ModelConfig


def make_config(**changes):
  fields = dict(
    vocab_size=23, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2
  )
  return ModelConfig(**{**fields, **changes})


def top_k(logits, k):
  """Adjustment: only the k largest logits remain, at temperature 0.7."""
  lowest = jax.lax.top_k(logits, k)[0][:, -1:]
  return jnp.where(logits >= lowest, logits / 0.7, -jnp.inf)


def make_data(config, shape=(3, 7)):
  random = np.random.default_rng(0)
  matrix = random.normal(size=(config.vocab_size, config.hidden_size))
  hidden = random.normal(size=(*shape, config.hidden_size))
  order = np.argsort(-(hidden @ matrix.T), axis=-1)
  tokens = order[..., 1].astype(np.int32)  # within any top-k with k > 1
  return matrix.astype(np.float32), hidden.astype(np.float32), tokens


def statistics(config, matrix, hidden, tokens, k=None, **options):
  if k is not None:
    options['adjust'] = lambda logits, tokens: top_k(logits, k)
  params = {'embed' if config.tied else 'head': {'embedding': matrix}}
  return head.token_statistics(config, params, hidden, tokens, **options)


@pytest.mark.parametrize('chunk', [5, 256])
@pytest.mark.parametrize('k, cap', [(23, None), (4, None), (4, 2.0)])
def test_equals_the_dense_formula_in_float64(chunk, k, cap):
  torch = pytest.importorskip('torch')
  config = make_config(logit_softcap=cap)
  matrix, hidden, tokens = make_data(config)

  def total(matrix, hidden):
    out = statistics(
      config, matrix, hidden, jnp.asarray(tokens), k, chunk=chunk
    )
    return (out.log_probs + 0.3 * out.entropy).sum(), out

  gradient, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(matrix, hidden)

  m, h = (torch.tensor(x, dtype=torch.float64) for x in (matrix, hidden))
  m.requires_grad_(), h.requires_grad_()
  logits = h @ m.T
  if cap is not None:
    logits = cap * torch.tanh(logits / cap)
  kept = logits.topk(k, dim=-1)
  log_probs = torch.log_softmax(kept.values / 0.7, dim=-1)
  entropy = -(log_probs.exp() * log_probs).sum(-1)
  index = (kept.indices == torch.tensor(tokens)[..., None]).int().argmax(-1)
  chosen = log_probs.gather(-1, index[..., None])[..., 0]
  probs = log_probs.exp()
  one_hot = torch.nn.functional.one_hot(index, k)
  norms = (one_hot - probs).square().sum(-1)
  (chosen + 0.3 * entropy).sum().backward()
  for ours, theirs in [
    (out.log_probs, chosen),
    (out.entropy, entropy),
    (out.score_norms, norms),
    (gradient[0], m.grad),
    (gradient[1], h.grad),
  ]:
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


def test_excluded_tokens():
  """An excluded token's log-probability is −inf; all else stays finite."""
  config = make_config()
  matrix, hidden, tokens = make_data(config)

  def entropy(hidden):
    out = statistics(config, matrix, hidden, tokens, 1, chunk=4)
    return out.entropy.sum(), out

  gradient, out = jax.grad(entropy, has_aux=True)(hidden)
  assert np.all(np.isneginf(out.log_probs))
  np.testing.assert_array_equal(out.entropy, np.zeros(tokens.shape))
  np.testing.assert_array_equal(gradient, np.zeros(hidden.shape))


def test_tied_head_is_the_embedding():
  config = make_config(tied=True)
  matrix, hidden, tokens = make_data(config)
  tied = statistics(config, matrix, hidden, tokens)
  untied = statistics(make_config(), matrix, hidden, tokens)
  np.testing.assert_array_equal(tied.log_probs, untied.log_probs)


def test_no_positions():
  config = make_config()
  matrix, hidden, tokens = make_data(config, (2, 0))
  out = statistics(config, matrix, hidden, tokens)
  assert out.log_probs.shape == out.entropy.shape == (2, 0)


def test_gradient_adds_up_in_float32():
  """4,096 equal contributions: a bfloat16 sum would stop growing at 256."""
  config = make_config(dtype='bfloat16')
  matrix, hidden, tokens = make_data(config, (1,))
  hidden = np.repeat(hidden.astype(jnp.bfloat16), 4096, axis=0)
  tokens = np.repeat(tokens, 4096)

  def total(matrix, hidden, tokens):
    return statistics(config, matrix, hidden, tokens, chunk=1).log_probs.sum()

  gradient = jax.jit(jax.grad(total))
  one = gradient(matrix, hidden[:1], tokens[:1])
  many = gradient(matrix, hidden, tokens)
  assert many.dtype == jnp.float32
  np.testing.assert_allclose(many, 4096 * one, rtol=1e-4, atol=1e-6)
