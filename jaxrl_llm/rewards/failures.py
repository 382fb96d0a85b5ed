"""Samples that have no score because scoring them failed, counted by kind."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

# Why a sample has no score.
FAILURES = ('timeout', 'crash', 'error', 'memory')


class Failures(NamedTuple):
  """Samples of a batch that have no score because scoring them failed.

  Attributes:
    counts: their number by kind, for all of `FAILURES`.
    messages: by each kind that occurred, of its first sample: what happened,
      which sample, and its completion.
  """

  counts: dict[str, int]
  messages: dict[str, str]

  @property
  def total(self) -> int:
    """Their number, of all kinds."""
    return sum(self.counts.values())


def merge(batches: Iterable[Mapping[str, Failures]]) -> dict[str, Failures]:
  """Failures of several batches as of one, by the name of the reward.

  Of each kind the first message stays; it numbers samples within its batch.
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
