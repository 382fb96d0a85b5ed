"""Statistics of tokens under the head, without storing all logits."""

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm import sharding
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig


@chex.dataclass(frozen=True)
class TokenStatistics:
  """Statistics of each token under the adjusted distribution, in nats.

  Attributes:
    log_probs: [...] float32, of the token; −inf where it is excluded.
    entropy: [...] float32, of the distribution.
    score_norms: [...] float32, ‖∂ log p(token) / ∂ logits‖², not in nats.
  """

  log_probs: jax.Array
  entropy: jax.Array
  score_norms: jax.Array


def token_statistics(
  config: ModelConfig,
  params,
  hidden,
  tokens,
  adjust=lambda logits, tokens: logits,
  chunk: int = 256,
) -> TokenStatistics:
  """Computes log-probabilities, entropies and squared scores of tokens.

    p = softmax(adjust(logits, tokens)),   log p(token),   H = −Σᵥ p(v) log p(v)
    ‖∂ log p(token) / ∂ adjusted logits‖² = 1 − 2 p(token) + Σᵥ p(v)²

  Logits exist for `chunk` positions at a time, forward and backward: the
  backward pass recomputes them, unless all positions form one chunk, whose
  logits are kept.  The head's gradient is accumulated in float32.

  Args:
    config: static.
    params: of the model; only the head is read.
    hidden: [..., D], from `transformer.apply`.
    tokens: [...] int32, the token that follows each hidden state.
    adjust: maps logits [n, V] float32 and tokens [n] to logits [n, V];
      −inf excludes a token of the vocabulary.
    chunk: positions per step, of each device's own rows on a mesh; memory is
      a few times 4·chunk·V bytes.
  """
  chex.assert_equal_shape_prefix([hidden, tokens], tokens.ndim)
  matrix = transformer.head_matrix(config, params)
  rows = sharding.row_spec(*tokens.shape[: max(tokens.ndim - 1, 1)][:2])
  columns = sharding.column_spec(matrix)

  def of_rows(matrix, hidden, tokens):
    matrix = sharding.gather_columns(matrix, columns, config.dtype)
    return _in_chunks(
      lambda hidden: transformer.apply_head(config, matrix, hidden),
      hidden,
      tokens,
      adjust,
      chunk,
    )

  run = sharding.over_rows(of_rows, (columns, rows, rows), rows)
  return run(matrix, hidden, tokens)


def _in_chunks(to_logits, hidden, tokens, adjust, chunk):
  shape, count = tokens.shape, tokens.size
  chunk = min(chunk, max(count, 1))
  chunks = max(-(-count // chunk), 1)
  width = hidden.shape[-1]
  measure = lambda logits, tokens: statistics(adjust(logits, tokens), tokens)
  if chunks == 1:
    logits = to_logits(hidden.reshape(count, width))
    results = jax.checkpoint(measure)(logits, tokens.reshape(count))
    return jax.tree.map(lambda x: x.reshape(shape), results)
  pad = chunks * chunk - count
  hidden = jnp.pad(hidden.reshape(count, width), ((0, pad), (0, 0)))
  hidden = hidden.reshape(chunks, chunk, width)
  tokens = jnp.pad(tokens.reshape(count), (0, pad)).reshape(chunks, chunk)

  @jax.checkpoint
  def step(hidden, tokens):
    return measure(to_logits(hidden), tokens)

  _, results = jax.lax.scan(
    lambda _, x: (None, step(*x)), None, (hidden, tokens)
  )
  return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(shape), results)


def statistics(logits, tokens) -> TokenStatistics:
  """Computes `TokenStatistics` of tokens, [n], under logits, [n, V].

  Excluded tokens (logit −inf) have probability 0 and add 0 to the entropy
  and to its gradient.  Score norms have no gradient.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
  possible = logits > -jnp.inf
  finite = jnp.where(possible, log_probs, 0.0)
  probs = jnp.where(possible, jnp.exp(finite), 0.0)
  squares = jnp.square(probs).sum(axis=-1)
  norms = 1.0 - 2.0 * jnp.exp(chosen) + squares
  return TokenStatistics(
    log_probs=chosen,
    entropy=-(probs * finite).sum(axis=-1),
    score_norms=jax.lax.stop_gradient(jnp.maximum(norms, 0.0)),
  )
