"""A stand-in for the writers where nothing is to be written."""

import contextlib


class Silent(contextlib.AbstractContextManager):
  """Accepts the calls of the writers, `Watch` and `Progress`; keeps nothing.

  With several processes, all but one use it, so that each runs the same
  program.
  """

  def write(self, *args) -> None:
    """As in `MetricsWriter` and `SampleLog`."""

  def last(self) -> tuple[dict, dict]:
    """As in `MetricsWriter`; no numbers."""
    return {}, {}

  def write_html(self, *args, **kwargs) -> None:
    """As in `SampleLog`."""

  def sync(self) -> None:
    """As in `MetricsWriter` and `SampleLog`."""

  def add(self, record: dict) -> list[str]:
    """As in `Watch`; no warnings."""
    del record
    return []

  def update(self, step: int, **numbers: float) -> None:
    """As in `Progress`."""

  def print(self, *renderables) -> None:
    """As in `Progress`."""

  def __exit__(self, *exc_info):
    pass
