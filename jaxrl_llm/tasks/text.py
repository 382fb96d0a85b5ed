"""Cuts prompts from plain text: the first tokens of every document."""

import pathlib
from typing import NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.datasets import parse, read_text
from jaxrl_llm.tasks.prompts import encode_texts


class CutPrompts(NamedTuple):
  """Prompts cut from a corpus, and counts of the documents left out.

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
  path: str | pathlib.Path, tokenizer, prompt_tokens: int
) -> CutPrompts:
  """Takes the first `prompt_tokens` tokens of every document as a prompt.

  Prompts are kept as text, and every one encodes to exactly `prompt_tokens`
  ids, including the BOS if the tokenizer prepends one.  Every document is
  longer than its prompt, so that there is something to continue with.
  Documents are taken in file order.

  Args:
    path: `.json` (one list of strings, one per document) or any other name for
      plain text with blank lines between documents.
    tokenizer: of `transformers`.
    prompt_tokens: length of a prompt in tokens.

  Raises:
    UserError: the file gives no prompt.
  """
  if prompt_tokens < 1:
    raise UserError(
      f'cut_prompts: prompt_tokens={prompt_tokens} must be at least 1.'
    )
  path = pathlib.Path(path)
  rows, seen = [], set()
  too_short = altered = repeated = 0
  for index, ids in enumerate(encode_texts(_documents(path), tokenizer)):
    if len(ids) <= prompt_tokens:
      too_short += 1
      continue
    ids = ids[:prompt_tokens]
    prompt = tokenizer.decode(ids, skip_special_tokens=True)
    if encode_texts([prompt], tokenizer) != [ids]:
      altered += 1
    elif prompt in seen:
      repeated += 1
    else:
      seen.add(prompt)
      rows.append({'prompt': prompt, 'document': index})
  if not rows:
    raise UserError(
      f'{path} gives no prompt of {prompt_tokens} tokens: {too_short} '
      f'documents are too short, {altered} do not survive decoding.'
    )
  return CutPrompts(rows, too_short, altered, repeated)


def _documents(path) -> list[str]:
  """Reads the documents of a file, without those of only whitespace."""
  text = read_text(path)
  if path.suffix == '.json':
    documents = parse(str(path), text)
    if not isinstance(documents, list) or not all(
      isinstance(document, str) for document in documents
    ):
      raise UserError(f'{path}: a corpus in JSON must be one list of strings.')
  else:
    documents = text.replace('\r\n', '\n').split('\n\n')
  return [document for document in documents if document.strip()]
