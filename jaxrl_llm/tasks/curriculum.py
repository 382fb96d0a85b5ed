"""An order of prompts that begins with easy ones."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.prompts import EncodedPrompts, PromptBatch, take
from jaxrl_llm.tasks.sources import PromptSource, derive_seed


class Curriculum:
  """A seeded order over the easiest rows of a data set, which grow to all.

  Rows are sorted by a column, ties in their original order.  Their share grows
  in K stages of equal length and by equal steps: 1/K, 2/K, … of the rows.  The
  last stage, with all of them, begins at step `steps` and does not end.  Within
  a stage every row of its share is visited once before any is visited again.

  A batch is a pure function of (seed, number), as in `PromptSource`, whose
  interface this has.

  Args:
    encoded: at least one row.
    column: a column of numbers, least first; '-name' is greatest first.
    prompts_per_step: P, per batch.
    seed: not negative.
    steps: number after which all rows are available.
    stages: K, from 2 to steps + 1.
    batches_per_step: batches that count as a step.

  Raises:
    UserError: a row has no number in the column, or numbers are out of range.
  """

  def __init__(
    self,
    encoded: EncodedPrompts,
    column: str,
    prompts_per_step: int,
    seed: int,
    *,
    steps: int,
    stages: int = 10,
    batches_per_step: int = 1,
  ):
    if not 2 <= stages <= steps + 1:
      raise UserError(
        f'a curriculum over {steps} steps cannot have {stages} stages\n'
        f'choose from 2 to {steps + 1}; the last stage has all prompts'
      )
    self._column = column
    self._steps = steps
    self._stages = stages
    self._batches = batches_per_step
    self._values = _numbers(encoded.rows, column.removeprefix('-'))
    sign = -1.0 if column.startswith('-') else 1.0
    order = np.argsort(sign * self._values, kind='stable').tolist()
    self._whole = PromptSource(encoded, prompts_per_step, seed)
    # Positions of the available rows, in order of difficulty.
    self._available = [
      order[: -(-len(order) * (stage + 1) // stages)] for stage in range(stages)
    ]
    self._sources = [
      PromptSource(
        take(encoded, rows),
        prompts_per_step,
        derive_seed(seed, f'stage {stage}'),
      )
      for stage, rows in enumerate(self._available)
    ]

  def indices(self, number: int) -> list[int]:
    """Returns the positions of batch `number` among the encoded prompts."""
    stage, within = self._place(number)
    rows = self._available[stage]
    return [rows[i] for i in self._sources[stage].indices(within)]

  def batch(self, number: int) -> PromptBatch:
    """Returns batch `number`, counted from 0."""
    stage, within = self._place(number)
    return self._sources[stage].batch(within)

  def share(self, number: int) -> float:
    """Returns the share of the rows that batch `number` is drawn from."""
    available = self._available[self._place(number)[0]]
    return len(available) / len(self._values)

  def difficulty(self, number: int) -> float:
    """Returns the column's mean over the rows of batch `number`."""
    return float(self._values[self.indices(number)].mean())

  def fingerprint(self) -> dict[str, Any]:
    """Returns the facts that give a stored step number its prompts."""
    return self._whole.fingerprint() | {
      'curriculum': self._column,
      'curriculum_steps': self._steps,
      'curriculum_stages': self._stages,
      'batches_per_step': self._batches,
    }

  def _place(self, number: int) -> tuple[int, int]:
    """Returns (stage, number of the batch within it)."""
    last = self._stages - 1
    stage = min(number // self._batches * last // self._steps, last)
    begin = -(-stage * self._steps // last)
    return stage, number - begin * self._batches


def _numbers(rows: Sequence[dict], column: str) -> np.ndarray:
  """Returns the numbers of a column: float64 [N].

  Raises:
    UserError: rows lack a finite number there; reports how many.
  """
  values = [row.get(column) for row in rows]
  wrong = [
    i
    for i, value in enumerate(values)
    if type(value) not in (int, float) or not math.isfinite(value)
  ]
  if wrong:
    raise UserError(
      f'the curriculum needs a number in the column {column!r}: {len(wrong)} '
      f'of {len(rows)} rows have none, the first {values[wrong[0]]!r:.40}\n'
      f'the columns are {", ".join(sorted(rows[wrong[0]]))}'
    )
  return np.asarray(values, np.float64)
