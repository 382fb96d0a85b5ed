"""Preferences: a chosen and a rejected response to each prompt.

A row is {'prompt': …, 'chosen': …, 'rejected': …}, the column names of TRL.
The columns chosen_finished and rejected_finished may be False: the response was
cut off and has no end.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import datasets, prompts, templates

# A response of HH-RLHF follows the first and never contains the second.
_ANSWER, _QUESTION = '\n\nAssistant:', '\n\nHuman:'


class Pairs(NamedTuple):
  """Rows of a data set of preferences, and counts of rows left out.

  Attributes:
    rows: with a prompt, and distinct chosen and rejected responses.
    apart: rows whose dialogues differ before the last response.
    equal: rows whose responses are equal.
    empty: rows with an empty response.
  """

  rows: list[dict]
  apart: int
  equal: int
  empty: int


class Pair(NamedTuple):
  """Token ids of two texts: their common beginning and how each continues."""

  prompt: list[int]
  chosen: list[int]
  rejected: list[int]


def hh_rlhf(path: str | pathlib.Path | None) -> Pairs:
  """Reads Anthropic's dialogues, with a preference between two last responses.

  A prompt is the dialogue up to and including the last "Assistant:"; prompt and
  response together are the original dialogue.

  Args:
    path: a file such as harmless-base/train.jsonl.gz, or the folder of that;
      None for the training split of Anthropic/hh-rlhf on the hub.

  Raises:
    UserError: as in `datasets.read_rows`; a row is not a pair of such
      dialogues, or all are left out.

  References:
    Bai et al., `Training a Helpful and Harmless Assistant
    <https://arxiv.org/abs/2204.05862>`_, 2022
  """
  file = path and datasets.find_file(path, 'train.jsonl.gz', 'train.jsonl')
  hub = 'Anthropic/hh-rlhf'
  rows, left_out = [], {'apart': 0, 'equal': 0, 'empty': 0}
  for where, row in datasets.read(file, hub, 'train', prompt_column='chosen'):
    # The reader has renamed the first column to 'prompt'.
    prompt, chosen = _divided(where, 'chosen', row['prompt'])
    other, rejected = _divided(where, 'rejected', row.get('rejected'))
    if prompt != other or _QUESTION in chosen + rejected:
      left_out['apart'] += 1
    elif chosen == rejected:
      left_out['equal'] += 1
    elif not chosen.strip() or not rejected.strip():
      left_out['empty'] += 1
    else:
      rows.append({'prompt': prompt, 'chosen': chosen, 'rejected': rejected})
  if not rows:
    raise UserError(
      f'{file or hub}: no row is a pair with one prompt: {left_out}'
    )
  return Pairs(rows, **left_out)


def finished(rows: Sequence[dict], name: str) -> list[bool]:
  """Returns for each response of a column whether it ended by itself.

  Args:
    rows: those without a column NAME_finished count as finished.
    name: the column, 'chosen' or 'rejected'.

  Raises:
    UserError: the column holds neither True nor False.
  """
  column = f'{name}_finished'
  values = [row.get(column, True) for row in rows]
  for i, value in enumerate(values):
    if not isinstance(value, bool):
      raise UserError(
        f'row {i} has {value!r:.40} in its column {column}\n'
        'write true or false, or leave the column out'
      )
  return values


def encode_responses(
  given: Sequence[str],
  responses: Sequence[str],
  finished: Sequence[bool],
  tokenizer,
  *,
  chat_template: str | None = 'auto',
  system_prompt: str | None = None,
  suffix: str = '',
  end_token: bool = True,
) -> list[list[int]]:
  """Encodes prompts, each with its response, as a reward model reads them.

  Prompt and response are joined before tokenisation.  With a chat template they
  are a user's and an assistant's message, and a finished response ends as the
  template ends it; without one the end token may follow.

  Args:
    given: N prompts.
    responses: N texts, without the end token.
    finished: N; False for a response that was cut off and has no end.
    tokenizer: of `transformers`.
    chat_template, system_prompt, suffix: as in `prompts.encode_prompts`.
    end_token: without a template, appends the tokenizer's end token to a
      finished response.

  Raises:
    UserError: a text is empty or not expressible in the vocabulary, the
      template fails, or there is no end token to append.
  """
  template = templates.template_text(tokenizer, chat_template, system_prompt)
  if template is None and end_token and tokenizer.eos_token_id is None:
    raise UserError(
      'the tokenizer has no end token to append to a response.\n'
      'Set end_token=False, or use another tokenizer.'
    )
  texts = []
  for prompt, response, ended in zip(given, responses, finished, strict=True):
    text = prompt + suffix + response
    if template is not None:
      turns = {'user': prompt + suffix, 'assistant': response}
      settings = dict(continue_final_message=not ended)
      text = templates.render(
        tokenizer, template, system_prompt, turns, **settings
      )
    texts.append(text)
  names = [f'prompt and response {i}' for i in range(len(texts))]
  encoded = prompts.encode(names, texts, tokenizer, bos=template is None)
  if template is None and end_token:
    encoded = [
      [*ids, tokenizer.eos_token_id] if ended else ids
      for ids, ended in zip(encoded, finished, strict=True)
    ]
  for name, ids in zip(names, encoded, strict=True):
    if not ids:
      raise UserError(f'{name} are both empty')
  return encoded


def encode_pairs(
  rows: Sequence[dict], tokenizer, max_tokens: int | None, **settings
) -> list[Pair]:
  """Encodes preferences: how both texts begin, and how each continues.

  The prompt ends where the tokens differ, not where its text ends: a score does
  not depend on it, and the ids are those of `encode_responses`, bit for bit.

  Args:
    rows: with a prompt, chosen and rejected, and the columns of `finished`.
    tokenizer: of `transformers`.
    max_tokens: most tokens of prompt and response together; None for any
      number.
    **settings: as in `encode_responses`.

  Raises:
    UserError: as in `encode_responses`; a column is not text; two texts have
      the same tokens, or none in common; one is over budget.
  """
  for i, row in enumerate(rows):
    for name in ('prompt', 'chosen', 'rejected'):
      if not isinstance(row.get(name), str):
        raise UserError(
          f'row {i} has no text in its column {name}, which preferences need; '
          f'its columns are {sorted(row)}.'
        )
  shown = [row['prompt'] for row in rows]
  both = [
    encode_responses(
      shown,
      [row[name] for row in rows],
      finished(rows, name),
      tokenizer,
      **settings,
    )
    for name in ('chosen', 'rejected')
  ]
  lengths = [max(len(one), len(two)) for one, two in zip(*both, strict=True)]
  budget = math.inf if max_tokens is None else max_tokens
  long = [i for i, length in enumerate(lengths) if length > budget]
  if long:
    raise UserError(
      f'{len(long)} of {len(rows)} pairs exceed {max_tokens} tokens; the '
      f'longest has {max(lengths)}, the first is row {long[0]}.\n'
      'Raise the budget, or leave them out.'
    )
  return [_cut(i, *pair) for i, pair in enumerate(zip(*both, strict=True))]


def _cut(index: int, chosen: list[int], rejected: list[int]) -> Pair:
  if chosen == rejected:
    raise UserError(
      f'the responses of row {index} are the same tokens.\nRemove the row.'
    )
  # Each response keeps a token, even if one continues where the other ends.
  most = min(len(chosen), len(rejected)) - 1
  common = 0
  while common < most and chosen[common] == rejected[common]:
    common += 1
  if not common:
    raise UserError(
      f'the two texts of row {index} have no token in common to start from.\n'
      'Give every prompt a text, or use a tokenizer with a BOS token.'
    )
  return Pair(chosen[:common], chosen[common:], rejected[common:])


def _divided(where: str, name: str, dialogue) -> tuple[str, str]:
  """Splits a dialogue after its last "Assistant:"."""
  if not isinstance(dialogue, str) or _ANSWER not in dialogue:
    raise UserError(
      f'{where}: {name} is not a dialogue of "Human:" and "Assistant:": '
      f'{dialogue!r:.60}.'
    )
  end = dialogue.rindex(_ANSWER) + len(_ANSWER)
  return dialogue[:end], dialogue[end:]
