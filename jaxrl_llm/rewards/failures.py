"""Samples without a score because scoring them failed, counted by kind."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Reasons for a missing score.
FAILURES = ('timeout', 'crash', 'error', 'memory')


class Failures(NamedTuple):
  """Samples of a batch without a score because scoring them failed.

  Attributes:
    counts: number of samples by kind, for all of `FAILURES`.
    messages: for each kind that occurred, its first sample's: the cause, the
      sample's index, and its completion.
  """

  counts: dict[str, int]
  messages: dict[str, str]

  @property
  def total(self) -> int:
    """Total number of failures, of all kinds."""
    return sum(self.counts.values())


def merge(batches: Iterable[Mapping[str, Failures]]) -> dict[str, Failures]:
  """Merges the failures of several batches, by the name of the reward.

  The first message of each kind is kept; it numbers samples within its batch.
  """
  merged: dict[str, Failures] = {}
  for batch in batches:
    for name, (counts, messages) in batch.items():
      before = merged.get(name, Failures(dict.fromkeys(FAILURES, 0), {}))
      merged[name] = Failures(
        {kind: before.counts[kind] + counts[kind] for kind in FAILURES},
        messages | before.messages,
      )
  return merged
