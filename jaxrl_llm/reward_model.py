"""Reward models: one number for a whole response, learned from preferences.

A reward model is a critic with a trunk of its own (`critic.separate`), read at
one place: the score of a response is the value of the state after its last
token.  That is where *ForSequenceClassification of `transformers` reads it.
Parameters are {'trunk': …, 'value': …} of the critic.

`Outputs.values` of a critic stand before their tokens.  Here they are moved by
one, so that index t is the score of the response up to and with token t; the
state after token T is there too, and no batch needs a column for it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import critic, policy, sharding
from jaxrl_llm.batches import split_prompts
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import Batch, Outputs
from jaxrl_llm.models import pretrained
from jaxrl_llm.models.config import ModelConfig, check_length
from jaxrl_llm.tasks.prompts import padded
from jaxrl_llm.training import Forward

Array = jax.Array


def forward(config: ModelConfig) -> Forward:
  """The forward pass for `estimators.reward_model`.

  `trainable['critic']` holds the parameters, as {'trunk': …, 'value': …}.  The
  head's bias gets no gradient: a constant cancels in every pair, and what is
  left of it by rounding Adam would blow up to steps of full size.

  A reward model gives no probabilities: those of the batch are handed on.

  Args:
    config: of the trunk.
  """

  def apply(trainable, frozen, prompts: policy.Prompts, batch: Batch):
    del frozen
    params = trainable['critic']
    head = params['value']
    head = {**head, 'bias': jax.lax.stop_gradient(head['bias'])}
    values = _values(config, {**params, 'value': head}, prompts, batch.tokens)
    return Outputs(log_probs=batch.log_probs, values=values[:, :, 1:])

  return apply


@functools.partial(jax.jit, static_argnames=('config', 'micro_prompts'))
def score(
  config: ModelConfig,
  params: Any,
  prompts: policy.Prompts,
  responses: Array,
  lengths: Array,
  micro_prompts: int,
) -> Array:
  """Scores of whole responses, `micro_prompts` prompts at a time.

  Args:
    config, params: the reward model.
    prompts: P prompts.
    responses: [P, G, T] int32; anything may stand behind a response's end.
    lengths: [P, G] int32, tokens; after 0 the prompt itself is scored, and T
      may be 0.
    micro_prompts: prompts, with all their responses, read at one time.

  Returns:
    [P, G] float32, in nats where the model was trained by `bradley_terry`.
  """

  def part(inputs):
    prompts, responses, lengths = inputs
    values = _values(config, params, prompts, responses)
    return jnp.take_along_axis(values, lengths[:, :, None], axis=2)[:, :, 0]

  parts = split_prompts((prompts, responses, lengths), micro_prompts)
  scores = jax.lax.map(part, parts)
  return scores.swapaxes(0, 1).reshape(lengths.shape)


def load(path, dtype='float32', param_dtype='float32'):
  """Reads a reward model: a folder as `pretrained.save_trunk` writes it.

  Args:
    path: a folder or hub name, *ForSequenceClassification with one label.
    dtype: of the computation.
    param_dtype: of the trunk's parameters; the head's are float32.

  Returns:
    (ModelConfig of the trunk, parameters).

  Raises:
    UserError: as `pretrained.load_trunk_config`, or it is a language model.
  """
  config = pretrained.load_trunk_config(path, dtype=dtype)
  trunk, head = pretrained.load_trunk(path, config, param_dtype)
  if head is None:
    raise UserError(
      f'{path} is a language model, which gives no score.\n'
      'Name a reward model: *ForSequenceClassification with num_labels=1.'
    )
  return config, {'trunk': trunk, 'value': critic.init_head(config, head)}


def score_texts(
  config: ModelConfig,
  params: Any,
  texts: Sequence[Sequence[int]],
  batch_size: int,
) -> np.ndarray:
  """Scores of whole texts of any length, the longest ones together.

  Batches are 24, 32, 48, 64, 96, … tokens wide, so that few programs are
  compiled and little of a batch is padding.

  Args:
    config, params: the reward model.
    texts: N lists of at least one and at most `config.max_length` tokens.
    batch_size: texts read at one time; the last batch is filled up.

  Returns:
    [N] float32, as of `score`.

  Raises:
    UserError: a text is too long.
  """
  order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
  pending = []
  for start in range(0, len(order), batch_size):
    rows = [texts[i] for i in order[start : start + batch_size]]
    longest = len(rows[-1])
    check_length(config, longest)
    rows += [[0]] * (batch_size - len(rows))
    width = min(_width(longest), config.max_length)
    tokens, lengths = padded(rows, 0, width)
    prompts = policy.Prompts(tokens=tokens, lengths=lengths)
    nothing = np.zeros((batch_size, 1, 0), np.int32)
    none = np.zeros((batch_size, 1), np.int32)
    # Each of several processes scores texts of its own.
    with sharding.on_own_device():
      pending.append(score(config, params, prompts, nothing, none, batch_size))
  found = np.zeros(len(texts), np.float32)
  if pending:
    scores = np.concatenate(jax.device_get(pending))[:, 0]
    found[order] = scores[: len(order)]
  return found


def _width(longest: int) -> int:
  """The least of 24, 32, 48, 64, 96, … that holds `longest` tokens."""
  power = max(1 << (longest - 1).bit_length(), 32)
  return power if longest > 3 * power // 4 else 3 * power // 4


def _values(
  config: ModelConfig, params: Any, prompts: policy.Prompts, responses: Array
) -> Array:
  """[P, G, T + 1]: before every token, and after the last one."""
  trunk = critic.separate(config).config
  hidden = policy.read_through(trunk, params['trunk'], prompts, responses)
  return critic.apply_head(params['value'], hidden)
