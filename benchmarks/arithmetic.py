"""The least arithmetic and memory traffic of a step of RL.

Each function returns a list of phases, (FLOPs, bytes) each, for
`measuring.Roofline.seconds`.  It counts what no implementation can omit: matrix
products, each weight read once, keys and values read once, the optimiser's
state.  A prompt is read once for all its responses.  Activations are assumed to
stay in caches and elementwise work to be free, so that the limit cannot be
reached.
"""

import jax.numpy as jnp

from jaxrl_llm.models.config import ModelConfig

Phases = list[tuple[float, float]]


def generation(
  config: ModelConfig, prompts: int, samples: int, read: int, written: int
) -> Phases:
  """Counts prefill, then decode steps of all responses side by side.

  The prefill yields the first token of each response; a step reads the token
  before and yields the next one.

  Args:
    config: the model's; its dtype is that of weights, keys and values.
    prompts: P.
    samples: G.
    read: S, tokens per prompt.
    written: T, tokens per response.
  """
  rows, size = prompts * samples, jnp.dtype(config.dtype).itemsize
  token = 2 * config.num_kv_heads * config.head_dim * config.num_layers * size
  shared = prompts * read * token
  phases = [
    _products(_layers(config), prompts * read, size),
    (_attention(config, prompts * _pairs(read)), shared),
    _products(_head(config), prompts, size),
  ]
  for position in range(1, written):
    phases += [
      _products(_layers(config), rows, size),
      _products(_head(config), rows, size),
      (
        _attention(config, rows * (read + position)),
        shared + rows * position * token,
      ),
    ]
  return phases


def scoring(
  config: ModelConfig, prompts: int, samples: int, read: int, written: int
) -> Phases:
  """Counts the log-probabilities of all response tokens.

  The last token of a response is not read.

  Args:
    config, prompts, samples, read, written: as in `generation`.
  """
  rows, size = prompts * samples, jnp.dtype(config.dtype).itemsize
  tokens = written - 1
  pairs = prompts * _pairs(read) + rows * (read * tokens + _pairs(tokens))
  return [
    _products(_layers(config), prompts * read + rows * tokens, size),
    _products(_head(config), rows * written, size),
    (_attention(config, pairs), 0.0),
  ]


def update(
  config: ModelConfig, prompts: int, samples: int, read: int, written: int
) -> Phases:
  """Counts an AdamW update of all parameters, after clipping the global norm.

  A backward pass takes twice the FLOPs of the forward pass.  Parameters,
  gradients and moments are float32; the gradients' norm is taken before they
  are used.

  Args:
    config, prompts, samples, read, written: as in `generation`.
  """
  forward = scoring(config, prompts, samples, read, written)
  parameters = _layers(config) + _head(config)
  return [
    *((3.0 * flops, 3.0 * size) for flops, size in forward),
    # Read: parameters, two moments, gradients twice; written: the first three.
    (0.0, 8 * 4.0 * parameters),
  ]


def _layers(config: ModelConfig) -> int:
  """Returns the number of entries in the matrices of all layers."""
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  widths = 2 * queries + 2 * keys
  widths += (3 if config.gated else 2) * config.intermediate_size
  return config.num_layers * config.hidden_size * widths


def _head(config: ModelConfig) -> int:
  return config.hidden_size * config.vocab_size


def _products(entries: int, tokens: int, size: int) -> tuple[float, float]:
  """Returns the phase of products of tokens with matrices of `entries`."""
  return 2.0 * entries * tokens, float(entries * size)


def _attention(config: ModelConfig, pairs: int) -> float:
  """Returns FLOPs of scores and weighted sums for (query, key) pairs."""
  width = config.num_heads * config.head_dim
  return 4.0 * width * pairs * config.num_layers


def _pairs(tokens: int) -> int:
  """Returns the number of (query, key) pairs of causal attention."""
  return tokens * (tokens + 1) // 2
