"""Prompts with the beginning of their reference solution.

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
  """Writes prompts with hints as `prompts.encode_prompts` writes prompts.

  Args:
    tokenizer: of `transformers`, with a backend that knows where in a text its
      tokens end.
    template: text with '{prompt}' and '{hint}', once each; '{prompt}' stands
      for the row's prompt with `suffix`.
    chat_template, system_prompt, suffix: as for `prompts.encode_prompts`.
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
    """A row's prompt with a share of its solution.

    Args:
      row: with a 'prompt' and a 'solution' for which `has_solution` holds.
      share: of the solution's tokens, above 0 and at most 1.
    """
    places = {
      '{prompt}': row['prompt'] + self._suffix,
      '{hint}': beginning(row['solution'], share, self._tokenizer),
    }
    text = ''.join(places.get(piece, piece) for piece in self._pieces)
    ids = prompts_lib.encode_prompt(
      'a prompt with a hint',
      {'prompt': text},
      self._tokenizer,
      self._chat,
      self._system,
    )
    return Hinted(text, ids)


def has_solution(row: dict) -> bool:
  """Whether a hint can be taken from a row."""
  return isinstance(row.get('solution'), str) and bool(row['solution'].strip())


def beginning(text: str, share: float, tokenizer) -> str:
  """The text of the first share of a text's tokens, rounded down, at least one.

  It is cut where a token ends in the text, so that it is a beginning of it
  exactly, whatever the tokenizer's decoder makes of its tokens.
  """
  found = tokenizer(
    text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
  )
  ends = [end for _, end in found['offset_mapping']]
  return text[: ends[max(int(share * len(ends)), 1) - 1]]


def check_template(template: str) -> None:
  """Raises UserError unless both places occur, once each."""
  for place in _PLACES:
    if template.count(place) != 1:
      raise UserError(
        f'the template of hints is {template!r}: it has {place} '
        f'{template.count(place)} times\n'
        "write it once, as in '{prompt}{hint}'"
      )
