"""Scores whole responses with a weighted sum of reward functions.

A reward function has the signature that TRL uses,

  fn(prompts, completions, **columns) -> list[float | None]

with lists of N strings and columns of N entries each.  All arguments are passed
by keyword, and a function without `**kwargs` gets only those it names.  None
leaves the function out of the sample's sum; anything else that is not a finite
float32 is an error.  Nothing is replaced by 0 or broadcast silently.
"""

import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import calling
from jaxrl_llm.rewards.calling import shortened
from jaxrl_llm.rewards.workers import FAILURES, Workers


class RewardPart(NamedTuple):
  """One reward function, the name it is logged under, and its weight."""

  name: str
  function: Callable[..., Sequence[float | None]]
  weight: float = 1.0


class Failures(NamedTuple):
  """Samples of a batch that could not be scored.

  Attributes:
    counts: number of samples by kind, for all of `workers.FAILURES`.
    messages: for each kind that occurred, its first sample's: the cause, the
      sample's index, and its completion.
  """

  counts: dict[str, int]
  messages: dict[str, str]

  @property
  def total(self) -> int:
    """Total number of failures, of all kinds."""
    return sum(self.counts.values())


class Scores(NamedTuple):
  """Scores of N responses.

  Attributes:
    total: float64 [N], Σ weight · score over the parts that gave one; else 0.
    valid: bool [N], False where a part failed, or none with a weight scored.
    parts: float64 [N] per part, unweighted; NaN where it gave None or failed.
    failed: bool [N] per part: True where it failed.
    failures: by name, for parts that run in worker processes.
  """

  total: np.ndarray
  valid: np.ndarray
  parts: dict[str, np.ndarray]
  failed: dict[str, np.ndarray]
  failures: Mapping[str, Failures] = types.MappingProxyType({})


def score(
  parts: Sequence[RewardPart],
  prompts: Sequence[str],
  completions: Sequence[str],
  columns: dict[str, Sequence[Any]],
) -> Scores:
  """Scores N responses with every part and adds them up; see `start`."""
  return start(parts, prompts, completions, columns)()


def start(
  parts: Sequence[RewardPart],
  prompts: Sequence[str],
  completions: Sequence[str],
  columns: dict[str, Sequence[Any]],
) -> Callable[[], Scores]:
  """Starts scoring N responses; returns a function that waits for the scores.

  Parts in worker processes (`Workers`) start at once.  The others are called
  one by one when the returned function is first called.

  Args:
    parts: at least one, with distinct names and finite weights.
    prompts, completions: N strings each, without the end token.
    columns: N entries each: the data set's columns, `completion_ids` (lists of
      int, the end token included) and `finished` (bool: ended by itself).

  Raises:
    UserError: here, for parts or arguments that do not fit; from the returned
      function, naming reward, sample and completion, when a reward function
      fails or returns anything but N finite numbers or Nones.
  """
  _check(parts, columns)
  arguments = {'prompts': prompts, 'completions': completions, **columns}

  def begin(part: RewardPart) -> Callable[[], tuple[np.ndarray, dict]]:
    function = part.function
    if isinstance(function, Workers):
      pending = function.submit(prompts, completions, columns)
      # float64 turns None into NaN.
      scores = lambda: np.asarray(pending.result(), np.float64)
      return lambda: (scores(), pending.failures())
    taken = calling.parameters(function)
    taken = calling.select_arguments(part.name, taken, arguments)
    return lambda: (_part_scores(part, taken, completions), {})

  begun = {part.name: begin(part) for part in parts}
  there = [p.name for p in parts if isinstance(p.function, Workers)]

  @functools.cache
  def finish() -> Scores:
    # Workers come last: they work while the others are called.
    order = [*(name for name in begun if name not in there), *there]
    done = {name: begun[name]() for name in order}
    values = {name: done[name][0] for name in begun}
    failed = {
      name: np.isin(np.arange(len(prompts)), [*done[name][1]]) for name in begun
    }
    failures = {name: _count(done[name][1].values()) for name in there}
    return Scores(*_total(parts, values, failed), values, failed, failures)

  return finish


def merge_failures(
  batches: Iterable[Mapping[str, Failures]],
) -> dict[str, Failures]:
  """Merges the failures of several batches, by the name of the reward.

  The first message of each kind is kept; it numbers samples within its batch.
  """
  merged: dict[str, Failures] = {}
  for batch in batches:
    for name, (counts, messages) in batch.items():
      before = merged.get(name, _count(()))
      merged[name] = Failures(
        {kind: before.counts[kind] + counts[kind] for kind in FAILURES},
        messages | before.messages,
      )
  return merged


def _count(causes: Iterable[tuple[str, str]]) -> Failures:
  """Counts failures, each a kind and a message."""
  failures = Failures(dict.fromkeys(FAILURES, 0), {})
  for kind, message in causes:
    failures.counts[kind] += 1
    failures.messages.setdefault(kind, message)
  return failures


def _total(
  parts: Sequence[RewardPart],
  scores: dict[str, np.ndarray],
  failed: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the weighted sums of the scores, and which of them are valid."""
  stacked = np.stack(list(scores.values()))
  weights = np.asarray([part.weight for part in parts], np.float64)[:, None]
  # A part without weight measures the response and does not reward it.
  scored = (~np.isnan(stacked) & (weights != 0)).any(axis=0)
  valid = scored & ~np.any(list(failed.values()), axis=0)
  with np.errstate(over='ignore', invalid='ignore'):
    total = np.where(valid, np.nansum(weights * stacked, axis=0), 0.0)
  fits = np.abs(total) <= calling.LARGEST
  if not fits.all():
    raise UserError(
      'the weighted sum of rewards overflows float32 at sample '
      f'{int(np.argmin(fits))}.\nLower the weights.'
    )
  return total, valid


def _check(parts: Sequence[RewardPart], columns: Mapping[str, Any]) -> None:
  """Raises UserError if names or weights do not fit."""
  names = [part.name for part in parts]
  if not names or len(set(names)) < len(names):
    raise UserError(f'reward parts need distinct names, not {names}.')
  for part in parts:
    if not callable(part.function):
      raise UserError(
        f'reward {part.name!r} is not a function but '
        f'{type(part.function).__name__}.\nA function that takes neither '
        'prompts nor completions is a factory: it must return a reward.'
      )
    if not math.isfinite(part.weight):
      raise UserError(f'reward {part.name!r} has the weight {part.weight}.')
  clash = sorted({'prompts', 'completions'} & set(columns))
  if clash:
    raise UserError(f'a column cannot be called {clash[0]!r}: rename it.')


def _part_scores(
  part: RewardPart, arguments: dict, completions: Sequence[str]
) -> np.ndarray:
  """Calls one function and returns float64 [N], NaN for None."""
  try:
    # Copies: a function that changes its arguments affects no other.
    result = part.function(**{k: list(v) for k, v in arguments.items()})
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    raise UserError(
      f'reward {part.name!r} raised {type(error).__name__}: '
      f'{shortened(str(error))}\n{_culprit(part, arguments, completions)}'
    ) from error
  return np.asarray(calling.as_floats(part.name, result, completions))


def _culprit(part: RewardPart, arguments: dict, completions) -> str:
  """Returns the sample on which the function fails, trying one at a time."""
  for i, completion in enumerate(completions):
    try:
      part.function(**{name: [v[i]] for name, v in arguments.items()})
    except (Exception, SystemExit):
      return f'at sample {i}, completion {shortened(completion)!r}.'
  return 'on the whole batch; no sample alone makes it fail.'
