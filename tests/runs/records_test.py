"""Files of records that a flipped bit, an editor or a power cut has spoilt."""

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import records


def write_lines(path, lines):
  path.write_bytes(b''.join(line + b'\n' for line in lines))


@pytest.mark.parametrize(
  'change, text',
  [
    # A flipped bit makes the '1' of step 12 a '5'.
    (
      lambda lines: [*lines[:11], b'{"step": 52}', *lines[12:]],
      '52, not .* 12',
    ),
    (lambda lines: [*lines[:11], b'{"step": 2}', *lines[12:]], '2, not .* 12'),
    (
      lambda lines: [*lines[:11], b'{"step": 20}', *lines[12:]],
      '20, not .* 12',
    ),
    (lambda lines: lines[:5] + lines[9:], '10, not step 6'),
    (lambda lines: lines[3:], '4, not step 1'),
    (lambda lines: lines[:5] + lines[4:], '5, not step 6'),
  ],
)
def test_the_first_gap_in_the_records_is_named(change, text, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  lines = [b'{"step": %d}' % step for step in range(1, 21)]
  write_lines(path, change(lines))
  before = path.read_bytes()
  with pytest.raises(
    UserError, match=f'metrics.jsonl, line .* {text}'
  ) as error:
    records.cut(path, 20, complete=True)
  assert len(str(error.value).splitlines()) == 2
  assert path.read_bytes() == before
  # A run without a warm start has a record of its beginning.
  for whole in (lines, [b'{"step": 0}', *lines]):
    write_lines(path, whole)
    records.cut(path, 20, complete=True)
    assert path.read_bytes().count(b'\n') == len(whole)


@pytest.mark.parametrize('complete', [True, False])
def test_what_is_broken_behind_the_checkpoint_goes(complete, tmp_path):
  """As a power cut leaves it: blocks of zeros, and what came after them."""
  path = tmp_path / 'm.jsonl'
  lines = [b'{"step": %d}' % step for step in range(1, 21)]
  rest = [b'\0' * 40 + b'{"step": 21}', b'{"step": 22}', b'{"st', b'[]']
  write_lines(path, lines + rest)
  records.cut(path, 20, complete=complete)
  assert path.read_bytes().splitlines() == lines
