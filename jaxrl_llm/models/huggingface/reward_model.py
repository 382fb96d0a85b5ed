"""Reward models from *ForSequenceClassification folders, and their scores."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import value_head
from jaxrl_llm.models.config import ModelConfig, check_length
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.models.prompts import Prompts
from jaxrl_llm.tasks.prompts import padded


def load_reward_model(path, dtype='float32', param_dtype='float32'):
  """Reads a reward model from a folder as `folders.save_trunk` writes it.

  Args:
    path: a folder or hub name, *ForSequenceClassification with one label.
    dtype: of the computation.
    param_dtype: of the trunk's parameters; the head's are float32.

  Returns:
    (ModelConfig of the trunk, parameters).

  Raises:
    UserError: as `folders.load_trunk_config`, or it is a language model.
  """
  config = folders.load_trunk_config(path, dtype=dtype)
  trunk, head = folders.load_trunk(path, config, param_dtype)
  if head is None:
    raise UserError(
      f'{path} is a language model, which gives no score.\n'
      'Name a reward model: *ForSequenceClassification with num_labels=1.'
    )
  return config, {'trunk': trunk, 'value': value_head.init_head(config, head)}


def score_texts(
  config: ModelConfig,
  params: Any,
  texts: Sequence[Sequence[int]],
  batch_size: int,
) -> np.ndarray:
  """Scores whole texts of any length, those of similar length together.

  Batches are 24, 32, 48, 64, 96, … tokens wide, so that few programs are
  compiled and little of a batch is padding.

  Args:
    config, params: the reward model.
    texts: N lists of at least one and at most `config.max_length` tokens.
    batch_size: texts read at one time; the last batch is padded to it.

  Returns:
    [N] float32, as from `value_head.score`.

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
    prompts = Prompts(tokens=tokens, lengths=lengths)
    nothing = np.zeros((batch_size, 1, 0), np.int32)
    none = np.zeros((batch_size, 1), np.int32)
    # Each process scores its own texts.
    with sharding.on_own_device():
      scores = value_head.score(
        config, params, prompts, nothing, none, batch_size
      )
    pending.append(scores)
  results = np.zeros(len(texts), np.float32)
  if pending:
    scores = np.concatenate(jax.device_get(pending))[:, 0]
    results[order] = scores[: len(order)]
  return results


def _width(longest: int) -> int:
  """Returns the least of 24, 32, 48, 64, 96, … that fits `longest` tokens."""
  power = max(1 << (longest - 1).bit_length(), 32)
  return power if longest > 3 * power // 4 else 3 * power // 4
