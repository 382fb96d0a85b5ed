"""What stands for the writers where nothing is to be written."""


class Silent:
  """Takes what the writers, `Watch` and `Progress` take; keeps nothing.

  Of several processes all but one have it, so that each runs the same program.
  """

  def write(self, *args) -> None:
    """As of `MetricsWriter` and `SampleLog`."""

  def write_html(self, *args, **kwargs) -> None:
    """As of `SampleLog`."""

  def sync(self) -> None:
    """As of `MetricsWriter` and `SampleLog`."""

  def add(self, record: dict) -> list[str]:
    """As of `Watch`; no warnings."""
    del record
    return []

  def update(self, step: int, **numbers: float) -> None:
    """As of `Progress`."""

  def print(self, *renderables) -> None:
    """As of `Progress`."""

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    pass
