"""Selects prompts by how often a model's responses to them were right.

A file of rates has a JSON object per line:

  {"prompt": "3+5*2-4=", "pass_rate": 0.625, "samples": 8}

A rate is None (null) where it is unknown.  A line with "settings" records how
the rates were measured and belongs to no prompt.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import datasets

COLUMN = 'pass_rate'


class Chosen(NamedTuple):
  """Rows within the bounds, and counts of the others.

  Attributes:
    rows: as given, with their rate in the column `pass_rate`.
    below, above: number of rows with a lower or a higher rate.
    unrated: number of rows whose rate is None.
  """

  rows: list[dict]
  below: int
  above: int
  unrated: int


def read_rates(path: str) -> dict[str, float | None]:
  """Reads rates by prompt; those of a repeated prompt are averaged.

  Each is weighted by its number of samples.

  Raises:
    UserError: the file is missing, or a line is not a record; names the line.
  """
  sums = {}
  for where, record in datasets.json_lines(pathlib.Path(path)):
    if isinstance(record, dict) and 'settings' in record:
      continue
    prompt, rate, samples = _checked(where, record)
    total, count = sums.get(prompt, (0.0, 0))
    if rate is not None:
      total, count = total + rate * samples, count + samples
    sums[prompt] = total, count
  return {
    prompt: total / count if count else None
    for prompt, (total, count) in sums.items()
  }


def filter_by_rate(
  rows: Sequence[dict],
  rates: Mapping[str, float | None],
  low: float = 0.0,
  high: float = 1.0,
) -> Chosen:
  """Selects the rows whose rate lies within [low, high].

  Raises:
    UserError: a row's prompt has no record, a row has a column `pass_rate` of
      its own, or no row is left.
  """
  missing = [row for row in rows if row['prompt'] not in rates]
  if missing:
    raise UserError(
      f'{len(missing)} of {len(rows)} training prompts have no record of their '
      f'pass rate; the first is {missing[0]["prompt"]!r:.60}\n'
      'measure them with experiments.label'
    )
  conflicts = sum(COLUMN in row for row in rows)
  if conflicts:
    raise UserError(
      f'{conflicts} rows already have a column {COLUMN!r}\nrename it'
    )
  row_rates = [rates[row['prompt']] for row in rows]
  known = [rate for rate in row_rates if rate is not None]
  chosen = Chosen(
    rows=[
      row | {COLUMN: rate}
      for row, rate in zip(rows, row_rates, strict=True)
      if rate is not None and low <= rate <= high
    ],
    below=sum(rate < low for rate in known),
    above=sum(rate > high for rate in known),
    unrated=len(row_rates) - len(known),
  )
  if not chosen.rows:
    raise UserError(
      f'no training prompt has a pass rate within [{low:g}, {high:g}]: '
      f'{chosen.below} are below, {chosen.above} above, {chosen.unrated} '
      'without\nwiden the bounds'
    )
  return chosen


def _checked(where: str, record) -> tuple[str, float | None, int]:
  """Returns a record's prompt, rate and number of samples."""
  if not isinstance(record, dict) or not isinstance(record.get('prompt'), str):
    raise UserError(
      f'{where}: this is not a record with a prompt: {record!r:.60}'
    )
  rate, samples = record.get(COLUMN), record.get('samples')
  if rate is None and COLUMN in record:
    return record['prompt'], None, 0
  known = type(rate) in (int, float) and 0 <= rate <= 1
  if not known or type(samples) is not int or samples < 1:
    raise UserError(
      f'{where}: {COLUMN} is {rate!r} of {samples!r} samples\n'
      'give a number from 0 to 1, and the number of responses behind it'
    )
  return record['prompt'], float(rate), samples
