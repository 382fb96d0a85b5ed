"""Prompts cut from plain text: the first tokens of every document."""

import json
import pathlib
from typing import NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.files import read_text
from jaxrl_llm.tasks.prompts import encode_text


class CutPrompts(NamedTuple):
  """Prompts cut from a corpus, and what was left out of it.

  Attributes:
    rows: 'prompt' (text) and 'document' (its index in the corpus); no two
      prompts are equal, so `splits.split` holds whole documents out.
    too_short: documents of too few tokens.
    altered: documents whose first tokens, decoded, encode to other tokens.
    repeated: documents that begin like an earlier one.
  """

  rows: list[dict]
  too_short: int
  altered: int
  repeated: int


def cut_prompts(
  path: str | pathlib.Path,
  tokenizer,
  prompt_tokens: int,
  *,
  min_tokens: int | None = None,
  count: int | None = None,
  separator: str | None = '\n\n',
  document_characters: int | None = None,
) -> CutPrompts:
  """Takes the first `prompt_tokens` tokens of every document as a prompt.

  Prompts are kept as text, and every one encodes to exactly `prompt_tokens`
  ids, the BOS included where the tokenizer prepends one.  Documents are taken
  in the file's order; `rows`, `too_short`, `altered` and `repeated` add up to
  the documents looked at.

  Args:
    path: `.json` (one list of strings, a document each) or any other name for
      plain text.
    tokenizer: of `transformers`.
    prompt_tokens: length of a prompt in tokens.
    min_tokens: shortest document in tokens; None for prompt_tokens + 1, which
      leaves something to continue with.
    count: stop after this many prompts; None for all.
    separator: what stands between two documents of plain text.
    document_characters: cut plain text into documents of this many characters
      instead.

  Raises:
    UserError: for a file without documents, or with fewer prompts than `count`.
  """
  if min_tokens is None:
    min_tokens = prompt_tokens + 1
  if prompt_tokens < 1 or min_tokens < prompt_tokens:
    raise UserError(
      f'cut_prompts: prompt_tokens={prompt_tokens} must be at least 1 and at '
      f'most min_tokens={min_tokens}.'
    )
  path = pathlib.Path(path)
  rows, seen = [], set()
  too_short = altered = repeated = 0
  for index, document in enumerate(
    _documents(path, separator, document_characters)
  ):
    if len(rows) == count:
      break
    ids = encode_text(document, tokenizer)
    if len(ids) < min_tokens:
      too_short += 1
      continue
    ids = ids[:prompt_tokens]
    prompt = tokenizer.decode(ids, skip_special_tokens=True)
    if encode_text(prompt, tokenizer) != ids:
      altered += 1
    elif prompt in seen:
      repeated += 1
    else:
      seen.add(prompt)
      rows.append({'prompt': prompt, 'document': index})
  if not rows or (count is not None and len(rows) < count):
    wanted = '' if count is None else f' of {count}'
    raise UserError(
      f'{path}: only {len(rows)}{wanted} prompts of {prompt_tokens} tokens: '
      f'{too_short} documents are too short, {altered} do not survive '
      f'decoding, {repeated} repeat another.'
    )
  return CutPrompts(rows, too_short, altered, repeated)


def _documents(path, separator, document_characters) -> list[str]:
  """The documents of a file, those of only whitespace left out."""
  text = read_text(path)
  if path.suffix == '.json':
    try:
      documents = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
      raise UserError(f'{path}: this is not JSON: {error}.') from error
    if not isinstance(documents, list) or not all(
      isinstance(document, str) for document in documents
    ):
      raise UserError(f'{path}: a corpus in JSON must be one list of strings.')
  elif document_characters is not None:
    if document_characters < 1:
      raise UserError(
        f'document_characters={document_characters} must be positive.'
      )
    documents = [
      text[i : i + document_characters]
      for i in range(0, len(text), document_characters)
    ]
  elif separator:
    documents = text.replace('\r\n', '\n').split(separator)
  else:
    raise UserError('cut_prompts needs a separator or document_characters.')
  return [document for document in documents if document.strip()]
