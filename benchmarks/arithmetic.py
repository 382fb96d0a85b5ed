"""The least arithmetic and memory traffic of what a step of RL computes.

All are lists of phases, (FLOPs, bytes) each, for `measuring.Roofline.seconds`.
Counted is what no implementation can leave out: matrix products, each weight
read once, keys and values read once, the optimiser's state.  A prompt is read
once for all its responses.  Activations are taken to stay in caches, and what
is done per element to cost nothing, so that the limit cannot be reached.
"""

import jax.numpy as jnp

from jaxrl_llm.models.config import ModelConfig

Phases = list[tuple[float, float]]


def generation(
  config: ModelConfig, prompts: int, samples: int, read: int, written: int
) -> Phases:
  """Prefill, then decode steps of all responses side by side.

  The prefill gives the first token of each response; a step reads the token
  before and gives the next one.

  Args:
    config: of the model; its dtype is that of weights, keys and values.
    prompts: P.
    samples: G.
    read: S, tokens of each prompt.
    written: T, tokens of each response.
  """
  rows, size = prompts * samples, jnp.dtype(config.dtype).itemsize
  token = 2 * config.num_kv_heads * config.head_dim * config.num_layers * size
  shared = prompts * read * token
  phases = [
    _products(_layers(config), prompts * read, size),
    (_attention(config, prompts * _pairs(read)), shared),
    _products(_head(config), prompts, size),
  ]
  for own in range(1, written):
    phases += [
      _products(_layers(config), rows, size),
      _products(_head(config), rows, size),
      (_attention(config, rows * (read + own)), shared + rows * own * token),
    ]
  return phases


def scoring(
  config: ModelConfig, prompts: int, samples: int, read: int, written: int
) -> Phases:
  """Log-probabilities of all response tokens.

  The last token of a response is not read.

  Args:
    config, prompts, samples, read, written: as for `generation`.
  """
  rows, size = prompts * samples, jnp.dtype(config.dtype).itemsize
  own = written - 1
  pairs = prompts * _pairs(read) + rows * (read * own + _pairs(own))
  return [
    _products(_layers(config), prompts * read + rows * own, size),
    _products(_head(config), rows * written, size),
    (_attention(config, pairs), 0.0),
  ]


def update(
  config: ModelConfig, prompts: int, samples: int, read: int, written: int
) -> Phases:
  """One AdamW update of all parameters, behind clipping of the global norm.

  A backward pass takes twice the FLOPs of the forward pass.  Parameters,
  gradients and moments are float32; of the gradients the norm is taken before
  they are used.

  Args:
    config, prompts, samples, read, written: as for `generation`.
  """
  forward = scoring(config, prompts, samples, read, written)
  parameters = _layers(config) + _head(config)
  return [
    *((3.0 * flops, 3.0 * size) for flops, size in forward),
    # Read: parameters, two moments, gradients twice; written: the first three.
    (0.0, 8 * 4.0 * parameters),
  ]


def _layers(config: ModelConfig) -> int:
  """Entries of the matrices of all layers."""
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  widths = 2 * queries + 2 * keys
  widths += (3 if config.gated else 2) * config.intermediate_size
  return config.num_layers * config.hidden_size * widths


def _head(config: ModelConfig) -> int:
  return config.hidden_size * config.vocab_size


def _products(entries: int, tokens: int, size: int) -> tuple[float, float]:
  """Of tokens with matrices of so many entries, of `size` bytes each."""
  return 2.0 * entries * tokens, float(entries * size)


def _attention(config: ModelConfig, pairs: int) -> float:
  """FLOPs of scores and weighted sums of (query, key) pairs, in all layers."""
  width = config.num_heads * config.head_dim
  return 4.0 * width * pairs * config.num_layers


def _pairs(tokens: int) -> int:
  """(query, key) pairs of causal attention."""
  return tokens * (tokens + 1) // 2
