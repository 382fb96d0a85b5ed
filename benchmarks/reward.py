"""The job's reward, which also records the time of each step.

It needs only Python.  Every system calls it once in a step, with the texts of
all responses.
"""

import itertools
import time
from collections.abc import Sequence

# Seconds of `time.perf_counter`, one reading per call of `vowels`.
calls = []


def vowels(completions: Sequence[str], **columns) -> list[float]:
  """Returns the share of vowels among each text's characters."""
  del columns
  calls.append(time.perf_counter())
  return [
    sum(map(text.count, 'aeiou')) / max(len(text), 1) for text in completions
  ]


def intervals() -> list[float]:
  """Returns the seconds from each call of `vowels` to the next: whole steps."""
  return [after - before for before, after in itertools.pairwise(calls)]
