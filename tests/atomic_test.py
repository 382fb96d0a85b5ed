"""JSON values come back as they were, and files are whole."""

import math
import os

import pytest
from mistakes import refused

from jaxrl_llm import atomic


def test_values_come_back_as_json_has_them():
  value = {'a': (1, 2.5, None), 'b': {'c': 'é', 'd': [True, {}]}}
  copy = atomic.as_json(value, 'record')
  assert copy == {'a': [1, 2.5, None], 'b': {'c': 'é', 'd': [True, {}]}}
  assert math.isnan(atomic.as_json([math.nan], 'record', allow_nan=True)[0])


@pytest.mark.parametrize(
  'value, text',
  [
    ({1: 'a'}, 'The record has a key 1, at 1'),
    ({'a': [{'b': {2: 0}}]}, 'The record has a key 2, at a/b/2'),
    ({'a': object()}, 'The record cannot be written as JSON: '),
    ([math.inf], 'The record cannot be written as JSON'),
  ],
)
def test_what_json_would_change_is_refused(value, text):
  with refused(text):
    atomic.as_json(value, 'record')


@pytest.mark.parametrize('content', ['neu: ü\n', b'\x00\xff\r\n'])
def test_what_is_written_is_what_is_read(content, tmp_path):
  path = tmp_path / 'x'
  path.write_text('old')
  atomic.write_atomically(path, content)
  written = content if isinstance(content, bytes) else content.encode()
  assert path.read_bytes() == written
  assert list(tmp_path.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'x.json'
  atomic.write_atomically(path, 'old')

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError):
    atomic.write_atomically(path, 'new')
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]
