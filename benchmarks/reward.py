"""The job's reward, which also tells when a step passes; needs Python alone.

Every system calls it once in a step, with the texts of all responses.
"""

import itertools
import time
from collections.abc import Sequence

# Seconds of `time.perf_counter`, one reading per call of `vowels`.
calls = []


def vowels(completions: Sequence[str], **columns) -> list[float]:
  """Which share of a text's characters are vowels."""
  del columns
  calls.append(time.perf_counter())
  return [
    sum(map(text.count, 'aeiou')) / max(len(text), 1) for text in completions
  ]


def intervals() -> list[float]:
  """Seconds between one call of `vowels` and the next: a whole step each."""
  return [after - before for before, after in itertools.pairwise(calls)]
