"""Rewards computed by a model.

Worker processes look up these names too, and start without JAX: imports are
deferred until a model is loaded.
"""

import math
from collections.abc import Callable, Sequence

from jaxrl_llm.errors import UserError

__all__ = ['reward_model']


def reward_model(
  path: str,
  chat_template: str | None = 'auto',
  system_prompt: str | None = None,
  suffix: str = '',
  end_token: bool = True,
  max_tokens: int | None = None,
  overlong: str = 'error',
  batch_size: int = 16,
  dtype: str = 'float32',
  mean: float = 0.0,
  std: float = 1.0,
) -> Callable[..., list[float | None]]:
  """Factory: (s − mean) / std with s a reward model's score of the whole text.

  It tokenises prompt and response with the model's own tokenizer and chat
  template, and reads the score where `transformers` does: at the last token
  that is not the padding token of its config.json.  It computes on this
  process's devices, not in workers.

  Args:
    path: a folder or hub name of a *ForSequenceClassification model with one
      label, such as `folders.save_trunk` writes.
    chat_template, system_prompt, suffix: as in `tasks.prompts.encode_prompts`;
      '' counts as None.
    end_token: without a chat template, appends the end token to a response that
      has `finished`; as the model was trained.  A template ends finished
      responses its own way.
    max_tokens: of prompt and response together; None for the model's limit.
    overlong: treatment of a longer text: 'error', or 'none' for no score.
    batch_size, dtype: texts per batch, of parameters and computation.
    mean, std: subtracted from a score, and its divisor, nats.

  Raises:
    UserError: the model does not exist or gives more than one score, or a
      setting is invalid.
  """
  from jaxrl_llm.models.huggingface import folders
  from jaxrl_llm.models.huggingface import reward_model as model
  from jaxrl_llm.tasks.pairs import encode_responses
  from jaxrl_llm.tasks.templates import template_text

  if overlong not in ('error', 'none'):
    raise UserError(
      f"reward_model: overlong={overlong!r} must be 'error' or 'none'"
    )
  if batch_size < 1:
    raise UserError(f'reward_model: batch_size is {batch_size}, not 1 or more')
  if not (0 < std < math.inf and math.isfinite(mean)):
    raise UserError(f'reward_model: {mean=} and {std=}; std must be above 0')
  config, params = model.load_reward_model(path, dtype=dtype, param_dtype=dtype)
  most = config.max_length if max_tokens is None else max_tokens
  if not 1 <= most <= config.max_length:
    raise UserError(
      f'reward_model: max_tokens is {max_tokens}; {path} reads 1 to '
      f'{config.max_length} tokens'
    )
  tokenizer = folders.load_tokenizer(path)
  folders.check_vocabulary(config, tokenizer)
  padding = folders.pad_token_id(path)
  settings = dict(
    chat_template=chat_template or None,
    system_prompt=system_prompt or None,
    suffix=suffix,
    end_token=end_token,
  )
  # Fails here, not at the first batch.
  template_text(tokenizer, chat_template or None, system_prompt or None)

  def scores_texts(
    prompts: Sequence[str],
    completions: Sequence[str],
    finished: Sequence[bool] | None = None,
  ) -> list[float | None]:
    ended = [True] * len(completions) if finished is None else finished
    texts = [
      _unpadded(ids, padding)
      for ids in encode_responses(
        prompts, completions, ended, tokenizer, **settings
      )
    ]
    fitting = [ids for ids in texts if len(ids) <= most]
    if (long := len(texts) - len(fitting)) and overlong == 'error':
      raise UserError(
        f'reward_model: {long} of {len(texts)} texts exceed {most} tokens of '
        f'{path}; the longest has {max(map(len, texts))}.\nShorten prompts '
        'or responses, raise max_tokens, or give them no score: '
        "overlong='none'."
      )
    scores = iter(model.score_texts(config, params, fitting, batch_size))
    rescaled = lambda: (float(next(scores)) - mean) / std
    return [rescaled() if len(ids) <= most else None for ids in texts]

  return scores_texts


def _unpadded(ids: list[int], padding: int | None) -> list[int]:
  """Returns the ids up to the last one that is not padding, at least one."""
  end = len(ids)
  while end > 1 and ids[end - 1] == padding:
    end -= 1
  return ids[:end]
