"""Prompts that contain the beginning of their reference solution.

One datum, with a share of 0.5 and the template '{prompt}{hint}':

  prompt '3+5*2-4=', solution '3+10-4=13-4=9'  →  '3+5*2-4=3+10-4'

References:
  Liu et al., `GHPO <https://arxiv.org/abs/2507.10628>`_, 2025
"""

import re
from typing import NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks import templates

_PLACES = '{prompt}', '{hint}'


class Hinted(NamedTuple):
  """A prompt with a hint, as text and as token ids, special ones included."""

  text: str
  ids: list[int]


class Hints:
  """Encodes prompts with hints, as `prompts.encode_prompts` encodes prompts.

  Args:
    tokenizer: of `transformers`, with a backend that knows where its tokens end
      in a text.
    template: text with '{prompt}' and '{hint}', once each; '{prompt}' is the
      row's prompt with `suffix`.
    chat_template, system_prompt, suffix: as in `prompts.encode_prompts`.
  """

  def __init__(
    self,
    tokenizer,
    template: str = '{prompt}{hint}',
    *,
    chat_template: str | None = 'auto',
    system_prompt: str | None = None,
    suffix: str = '',
  ):
    check_template(template)
    self._tokenizer = tokenizer
    self._pieces = re.split(r'(\{prompt\}|\{hint\})', template)
    self._chat = templates.template_text(
      tokenizer, chat_template, system_prompt
    )
    self._system = system_prompt
    self._suffix = suffix

  def encode(self, row: dict, share: float) -> Hinted:
    """Encodes a row's prompt with a share of its solution.

    Args:
      row: with a 'prompt' and a 'solution' for which `has_solution` holds.
      share: of the solution's tokens, above 0 and at most 1.
    """
    places = {
      '{prompt}': row['prompt'] + self._suffix,
      '{hint}': beginning(row['solution'], share, self._tokenizer),
    }
    text = ''.join(places.get(piece, piece) for piece in self._pieces)
    names, rows = ['a prompt with a hint'], [{'prompt': text}]
    [ids] = prompts_lib.encode_rows(
      names, rows, self._tokenizer, self._chat, self._system
    )
    return Hinted(text, ids)


def has_solution(row: dict) -> bool:
  """Returns True if a hint can be taken from the row."""
  return isinstance(row.get('solution'), str) and bool(row['solution'].strip())


def beginning(text: str, share: float, tokenizer) -> str:
  """Returns the first share of a text's tokens, rounded down, at least one.

  It is cut where a token ends in the text, so that it is an exact prefix,
  whatever the tokenizer's decoder makes of its tokens.
  """
  encoded = tokenizer(
    text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
  )
  ends = [end for _, end in encoded['offset_mapping']]
  return text[: ends[max(int(share * len(ends)), 1) - 1]]


def check_template(template: str) -> None:
  """Raises UserError unless both placeholders occur, once each."""
  for place in _PLACES:
    if template.count(place) != 1:
      raise UserError(
        f'the template of hints is {template!r}: it has {place} '
        f'{template.count(place)} times\n'
        "write it once, as in '{prompt}{hint}'"
      )
