"""A progress bar on a terminal; a plain line now and then elsewhere."""

import sys


class Progress:
  """Shows how far a loop is, with its latest numbers.

    with Progress(total=steps, initial=restored) as progress:
      for step in ...:
        progress.update(step, reward=0.4)

  Args:
    total: the last step.
    initial: the step to start from, above 0 on resume.
    every: without a terminal, print a line each time this many steps pass.
    label: what the steps belong to.
    stream: where to; the standard error stream by default.
  """

  def __init__(
    self,
    total: int,
    initial: int = 0,
    *,
    every: int = 10,
    label: str = 'train',
    stream=None,
  ):
    self._stream = sys.stderr if stream is None else stream
    self._total = total
    self._every = every
    self._label = label
    self._step = initial
    self._bar = None
    if self._stream.isatty():
      from tqdm import tqdm

      self._bar = tqdm(
        total=total,
        initial=initial,
        desc=label,
        file=self._stream,
        dynamic_ncols=True,
      )

  def update(self, step: int, **numbers: float) -> None:
    """Moves to a step and shows its numbers, such as `reward=0.4`."""
    shown = {name: f'{value:.4g}' for name, value in numbers.items()}
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._step)
    elif step // self._every > self._step // self._every or step == self._total:
      pairs = ''.join(f'  {name} {value}' for name, value in shown.items())
      line = f'{self._label} {step}/{self._total}{pairs}'
      print(line, file=self._stream, flush=True)
    self._step = step

  def print(self, *renderables) -> None:
    """Prints text or rich tables above the bar."""
    from rich.console import Console

    if self._bar is not None:
      self._bar.clear()
    console = Console(file=self._stream, highlight=False)
    for renderable in renderables:
      console.print(renderable, markup=False)
    if self._bar is not None:
      self._bar.refresh()

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()
