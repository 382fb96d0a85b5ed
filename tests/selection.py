"""Which parameters of a test the ordinary run tries, and which the slow one."""

from collections.abc import Iterable

import pytest


def mostly_slow(values: Iterable, *quick) -> list:
  """All values as parameters, behind the marker but for those that are named.

  For tests of one property on many cases, of which each takes a second or more.
  """
  values = list(values)
  assert all(each in values for each in quick), quick
  return [
    each if each in quick else pytest.param(each, marks=pytest.mark.slow)
    for each in values
  ]
