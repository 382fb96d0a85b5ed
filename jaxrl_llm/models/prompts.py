"""Hidden states of responses to prompts that they share.

A prompt is read once, whatever the number of its responses.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig, check_length

Array = jax.Array


@chex.dataclass(frozen=True)
class Prompts:
  """Prompts of one batch, right-padded.

  Attributes:
    tokens: [P, S] int32; tokens past a prompt's length are ignored.
    lengths: [P] int32, at least 1, tokens.
  """

  tokens: Array
  lengths: Array


def read(
  config: ModelConfig, params, prompts: Prompts, responses: Array
) -> Array:
  """Computes hidden states of responses: index t is that *before* token t.

  The prompt is read once and shared by its G responses.

  Args:
    config, params: the model.
    prompts: P prompts.
    responses: [P, G, T] int32; tokens after a response's end are ignored.

  Returns:
    [P, G, T, D] in the compute dtype, after the final norm; the head maps
    index t to the logits of token t.  Differentiable.

  Raises:
    UserError: S + T exceeds the model's positions (true lengths are not known
      under jit: the padded width counts).
  """
  check_length(config, prompts.tokens.shape[1] + responses.shape[2])
  return read_through(config, params, prompts, responses[:, :, :-1])


def read_through(
  config: ModelConfig, params, prompts: Prompts, responses: Array
) -> Array:
  """Computes hidden states of responses, and that *after* their last token.

  Args:
    config, params: the model.
    prompts: P prompts.
    responses: [P, G, T] int32; T may be 0.

  Returns:
    [P, G, T + 1, D], otherwise as `read`.

  Raises:
    UserError: as `read`.
  """
  num_prompts, samples, length = responses.shape
  check_length(config, prompts.tokens.shape[1] + length)
  segment = prefill_prompts(config, params, prompts)
  first = jnp.broadcast_to(
    last_tokens(prompts)[:, None, None], (num_prompts, samples, 1)
  )
  inputs = jnp.concatenate([first, responses], axis=2)
  cache = transformer.Cache(
    prefixes=(segment,), suffix=None, index=jnp.int32(0)
  )
  hidden, _ = transformer.apply(
    config, params, inputs.reshape(num_prompts * samples, length + 1), cache
  )
  return hidden.reshape(num_prompts, samples, length + 1, -1)


def prefill_prompts(
  config: ModelConfig, params, prompts: Prompts
) -> transformer.Segment:
  """Computes keys and values of each prompt except its last token.

  The last token is the first input of the responses, so that the sampler and
  the scorer treat every response token alike.
  """
  tokens = prompts.tokens
  if tokens.shape[1] > 1:
    tokens = tokens[:, :-1]
  return transformer.prefill(config, params, tokens, prompts.lengths - 1)


def last_tokens(prompts: Prompts) -> Array:
  """Returns the last token of each prompt, [P]."""
  index = (prompts.lengths - 1)[:, None]
  return jnp.take_along_axis(prompts.tokens, index, axis=1)[:, 0]
