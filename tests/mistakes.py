"""Mistakes of users: tables of them, one a line, and their messages."""

import contextlib

import pytest
from ml_collections import ConfigDict

from jaxrl_llm.errors import UserError


def table(lines: str, **names) -> list:
  """Parameters (mistake, texts of its message) from lines `mistake | a | b`."""
  found = []
  for line in lines.replace('\\\n', '').strip().splitlines():
    for name, value in names.items():
      line = line.replace(name, value)
    mistake, *texts = (part.strip() for part in line.split(' | '))
    found.append(pytest.param(mistake, texts, id=mistake.replace('::', ':')))
  return found


def changes(text: str) -> dict:
  """{dotted name: value} of `a.b=1; c=dict(d=2)`; `...` takes a field out."""
  pairs = (each.partition('=')[::2] for each in text.split('; ') if each)
  return {name: eval(value, {'nan': float('nan')}) for name, value in pairs}


def change(config, values: dict):
  """Puts values of any type into an unlocked configuration."""
  for name, value in values.items():
    *sections, last = name.split('.')
    place = config
    for section in sections:
      place = place[section]
    if last in place:
      del place[last]  # What takes its place may be of another type.
    if value is not ...:
      place[last] = ConfigDict(value) if isinstance(value, dict) else value
  return config


def check(message: str, *texts) -> None:
  """Asserts that a message is short and holds `texts`."""
  assert 1 <= len(message.strip().splitlines()) <= 3, message
  for text in texts:
    assert text in message, (text, message)


@contextlib.contextmanager
def refused(*texts):
  """Expects a UserError; gives what pytest says of it."""
  with pytest.raises(UserError) as caught:
    yield caught
  check(str(caught.value), *texts)


def assert_refused(ended, *texts) -> None:
  """Asserts status 2 and a short message of a script that holds `texts`."""
  assert ended.code == 2 and 'Traceback' not in ended.err, ended
  # XLA or a resumed run may have said something before.
  check(ended.err[ended.err.index('error: ') :], *texts)
