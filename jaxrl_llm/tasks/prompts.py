"""Converts rows of text to token ids, and ids to batches.

A row is a dictionary with a 'prompt'; its other keys are columns that reward
functions may ask for.  All lengths are in tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import templates

# The scoring code supplies these itself; a data set cannot.
_RESERVED_COLUMNS = ('prompts', 'completions', 'completion_ids', 'finished')
_BUCKET = 32  # tokens


class EncodedPrompts(NamedTuple):
  """Rows and their token ids, after the length policy.

  Attributes:
    tokens: one int32 array per row, of 1 to `max_tokens` ids.
    rows: the rows that were kept.
    dropped: number of rows over budget that were left out.
    max_tokens: the budget.
    pad_id: padding of batches; its positions are never read.
    tokenizer_hash: sha256 of the tokenizer's definition.
    template_hash: sha256 of chat template and system prompt; None without.
  """

  tokens: list[np.ndarray]
  rows: list[dict]
  dropped: int
  max_tokens: int
  pad_id: int
  tokenizer_hash: str
  template_hash: str | None


class PromptBatch(NamedTuple):
  """P prompts padded to one width.

  Attributes:
    tokens: int32 [P, S], left-aligned ids.
    lengths: int32 [P], tokens per prompt.
    rows: the P rows of the data set.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  rows: list[dict]


def encode_texts(texts: Sequence[str], tokenizer) -> list[list[int]]:
  """Returns raw texts' ids, with the tokenizer's BOS but without its EOS.

  A tokenizer that appends an end token (some do) would end the prompt before
  the model has written anything, so only the leading BOS is added, and only if
  the text does not spell it out.  An empty text becomes the BOS alone, if the
  tokenizer has one, so that there is something to start from.
  """
  ids = _ids(texts, tokenizer)
  bos = tokenizer.bos_token_id
  if bos is None:
    return ids
  encoded = [each or [bos] for each in ids]
  # Inferred from these texts, not from an empty one: where BOS and EOS are the
  # same token, an empty text would not show whether it is prepended or
  # appended.
  open_ = [i for i, each in enumerate(encoded) if each[0] != bos]
  wholes = _ids([texts[i] for i in open_], tokenizer, add_special_tokens=True)
  for i, whole in zip(open_, wholes, strict=True):
    if whole[:1] == [bos]:
      encoded[i] = [bos, *encoded[i]]
  return encoded


def _ids(
  texts: Sequence[str], tokenizer, add_special_tokens: bool = False
) -> list[list[int]]:
  if not texts:
    return []
  # Not verbose: the caller decides whether a text is too long.
  return tokenizer(
    list(texts),
    add_special_tokens=add_special_tokens,
    return_attention_mask=False,
    return_token_type_ids=False,
    verbose=False,
  )['input_ids']


def encode_prompts(
  rows: Sequence[dict],
  tokenizer,
  max_tokens: int,
  *,
  chat_template: str | None = 'auto',
  system_prompt: str | None = None,
  suffix: str = '',
  overlong: str = 'error',
) -> EncodedPrompts:
  """Tokenises the prompts of a data set and applies the length policy.

  Args:
    rows: dictionaries with a 'prompt' of type str.
    tokenizer: of `transformers`.
    max_tokens: greatest length of a prompt, special tokens included; a prompt
      of exactly this length is within budget.
    chat_template: 'auto' wraps the prompt as a user's message where the
      tokenizer has a chat template; None never does; any other text is used as
      the template.  A template writes its own special tokens: none are added.
    system_prompt: put before the user's message; needs a chat template.
    suffix: appended to every prompt before it is tokenised, such as a separator
      that the model expects.
    overlong: 'error', or 'drop' to leave out and count prompts over budget.

  Raises:
    UserError: a prompt is over budget, empty or not expressible in the
      vocabulary, or no row is left.
  """
  if overlong not in ('error', 'drop'):
    raise UserError(f"overlong={overlong!r} must be 'error' or 'drop'.")
  if max_tokens < 1:
    raise UserError(f'the prompt budget must be positive, not {max_tokens}.')
  if not rows:
    raise UserError('the data set has no rows: nothing to prompt with.')
  template = templates.template_text(tokenizer, chat_template, system_prompt)
  names = [f'row {i}' for i in range(len(rows))]
  encoded = encode_rows(names, rows, tokenizer, template, system_prompt, suffix)
  long = [i for i, ids in enumerate(encoded) if len(ids) > max_tokens]
  if long and overlong == 'error':
    raise UserError(
      f'{len(long)} of {len(rows)} prompts exceed {max_tokens} tokens; the '
      f'longest has {max(map(len, encoded))}, the first is row {long[0]}.\n'
      "Raise the prompt budget, or leave them out with overlong='drop'."
    )
  if len(long) == len(rows):
    raise UserError(
      f'none of {len(rows)} prompts fits into {max_tokens} tokens; the '
      f'shortest has {min(map(len, encoded))}.\nRaise the prompt budget.'
    )
  out = set(long)
  kept = [i for i in range(len(rows)) if i not in out]
  result = from_ids(
    [encoded[i] for i in kept], [rows[i] for i in kept], tokenizer, max_tokens
  )
  return result._replace(
    dropped=len(long),
    template_hash=None
    if template is None
    else sha256(json.dumps([template, system_prompt])),
  )


def from_ids(
  ids: Sequence[Sequence[int]], rows: Sequence[dict], tokenizer, max_tokens: int
) -> EncodedPrompts:
  """Builds prompts from existing token ids; none is left out.

  Args:
    ids: N lists of 1 to `max_tokens` ids.
    rows: N.
    tokenizer: the one that produced the ids.
    max_tokens: the budget.
  """
  padding = tokenizer.pad_token_id, tokenizer.eos_token_id
  return EncodedPrompts(
    tokens=[np.asarray(each, np.int32) for each in ids],
    rows=list(rows),
    dropped=0,
    max_tokens=max_tokens,
    pad_id=next((i for i in padding if i is not None), 0),
    tokenizer_hash=_tokenizer_hash(tokenizer),
    template_hash=None,
  )


def encode_targets(
  rows: Sequence[dict],
  tokenizer,
  max_tokens: int | None,
  eos_id: int,
  column: str = 'solution',
) -> list[np.ndarray]:
  """Returns the ids of each row's response and the end token, for training.

  The text is tokenised apart from its prompt, without special tokens, so that
  prompt ids + response ids could have been sampled.

  Args:
    rows: dictionaries with a text in the column.
    tokenizer: of `transformers`.
    max_tokens: greatest length, the end token included; None for any.
    eos_id: the end token.
    column: that of the texts, such as 'solution' or 'chosen'.

  Returns:
    One int32 array per row.

  Raises:
    UserError: a text is missing, over budget or not expressible.
  """
  for i, row in enumerate(rows):
    if not isinstance(row.get(column), str):
      raise UserError(
        f'row {i} has no text in its column {column}, which supervised '
        f'training needs; its columns are {sorted(row)}.'
      )
  texts = [row[column] for row in rows]
  names = [f'the {column} of row {i}' for i in range(len(rows))]
  encoded = [
    np.asarray([*ids, eos_id], np.int32)
    for ids in encode(names, texts, tokenizer, bos=False)
  ]
  budget = np.inf if max_tokens is None else max_tokens
  long = [i for i, ids in enumerate(encoded) if len(ids) > budget]
  if long:
    raise UserError(
      f'{len(long)} of {len(rows)} {column}s exceed {max_tokens} tokens with '
      f'their end token; the longest has {max(map(len, encoded))}, the first '
      f'is row {long[0]}.\nRaise the response budget, or shorten them.'
    )
  return encoded


def padded(
  sequences: Sequence[Sequence[int]], pad_id: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (tokens, lengths): int32 [N, width] padded at the right, int32 [N].

  Raises:
    ValueError: a sequence is longer than `width`.
  """
  lengths = np.asarray([len(ids) for ids in sequences], np.int32)
  tokens = np.full((len(sequences), width), pad_id, np.int32)
  for row, ids in zip(tokens, sequences, strict=True):
    row[: len(ids)] = ids
  return tokens, lengths


def take(encoded: EncodedPrompts, indices: Sequence[int]) -> EncodedPrompts:
  """Returns the prompts at `indices`, in that order, as a set of their own."""
  return encoded._replace(
    tokens=[encoded.tokens[i] for i in indices],
    rows=[encoded.rows[i] for i in indices],
  )


def gather(encoded: EncodedPrompts, indices: Sequence[int]) -> PromptBatch:
  """Collects the prompts at `indices`, in that order, into one batch.

  The width is the least multiple of 32 that holds the longest of them, but at
  most the budget, so that few shapes are ever compiled.
  """
  chosen = [encoded.tokens[i] for i in indices]
  longest = max(map(len, chosen))
  width = min(-(-longest // _BUCKET) * _BUCKET, encoded.max_tokens)
  tokens, lengths = padded(chosen, encoded.pad_id, width)
  return PromptBatch(tokens, lengths, [encoded.rows[i] for i in indices])


def columns(rows: Sequence[dict]) -> dict[str, list]:
  """Returns the rows' columns for reward functions, without the prompts.

  A row that lacks a column has None there.

  Raises:
    UserError: a column has a reserved name.
  """
  names = dict.fromkeys(name for row in rows for name in row)
  taken = [name for name in names if name in _RESERVED_COLUMNS]
  if taken:
    raise UserError(
      f'the data set has a column {taken[0]!r}, a name reserved for what '
      'the model wrote.\nRename the column.'
    )
  names.pop('prompt', None)
  return {name: [row.get(name) for row in rows] for name in names}


def encode_rows(
  names: Sequence[str],
  rows: Sequence[dict],
  tokenizer,
  template: str | None,
  system_prompt: str | None = None,
  suffix: str = '',
) -> list[list[int]]:
  """Encodes the prompts of rows.

  Args:
    names: of the rows, for messages.
    rows: each with a 'prompt'.
    tokenizer, system_prompt, suffix: as in `encode_prompts`.
    template: from `templates.template_text`.

  Raises:
    UserError: a prompt is missing, empty, or not expressible.
  """
  texts = []
  for name, row in zip(names, rows, strict=True):
    if not isinstance(row.get('prompt'), str):
      raise UserError(
        f'{name} has no text in its column prompt; its columns are '
        f'{sorted(row)}.'
      )
    text = row['prompt'] + suffix
    if template is not None:
      turns, settings = {'user': text}, dict(add_generation_prompt=True)
      text = templates.render(
        tokenizer, template, system_prompt, turns, **settings
      )
    texts.append(text)
  prompts = [f'the prompt of {name}' for name in names]
  # A template has written the special tokens; adding them again would double
  # the BOS.
  encoded = encode(prompts, texts, tokenizer, bos=template is None)
  for prompt, ids in zip(prompts, encoded, strict=True):
    if not ids:
      raise UserError(
        f'{prompt} is empty, and the tokenizer has no BOS token to start from.'
        '\nRemove the row, or give every prompt a suffix.'
      )
  return encoded


def encode(
  names: Sequence[str], texts: Sequence[str], tokenizer, *, bos: bool
) -> list[list[int]]:
  """Encodes texts that the vocabulary can express.

  Args:
    names: of the texts, for messages.
    texts: N.
    tokenizer: of `transformers`.
    bos: adds the BOS as `encode_texts` does; else no special tokens.

  Raises:
    UserError: a text is not expressible.
  """
  # JSON's escapes can write text that no tokenizer can read.
  for name, text in zip(names, texts, strict=True):
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f'{name} holds {text[error.start]!r}, half of a surrogate pair, at '
        f'character {error.start}.\nRemove it: it is not a character.'
      ) from error
  encoded = (encode_texts if bos else _ids)(texts, tokenizer)
  unk = tokenizer.unk_token_id
  for name, text, ids in zip(names, texts, encoded, strict=True):
    if unk in ids:
      _check_known(name, text, tokenizer, unk)
  return encoded


def _check_known(where: str, text: str, tokenizer, unk: int) -> None:
  """Raises UserError if a text's unknown tokens stand for characters."""
  # Some tokenizers use one id for all special tokens; then it means nothing.
  special = tokenizer.bos_token_id, tokenizer.eos_token_id
  if unk in special or tokenizer.unk_token in text:
    return
  lost = [
    c
    for c in dict.fromkeys(text)
    if unk in tokenizer(c, add_special_tokens=False)['input_ids']
  ]
  raise UserError(
    f'{where} holds characters that the tokenizer lacks: '
    f'{"".join(lost[:20])!r}.\nRemove them, or use another tokenizer.'
  )


def _tokenizer_hash(tokenizer) -> str:
  """Returns the sha256 of all that decides the ids: not padding, truncation."""
  definition = json.loads(tokenizer.backend_tokenizer.to_str())
  for state in ('padding', 'truncation'):
    definition.pop(state, None)
  return sha256(json.dumps(definition, sort_keys=True))


def sha256(text: str) -> str:
  """Returns the digest of a text in hexadecimal."""
  return hashlib.sha256(text.encode()).hexdigest()
