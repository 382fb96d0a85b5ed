"""A progress bar on a terminal; an occasional line elsewhere."""

import contextlib
import sys


def say(text: str) -> None:
  """Prints to standard error; does nothing where that cannot be written."""
  with contextlib.suppress(OSError):
    print(text, file=sys.stderr, flush=True)


def _raise():
  raise  # what is being handled


class Progress:
  """Shows the progress of a loop, with its latest numbers.

    with Progress(total=steps, initial=restored) as progress:
      for step in ...:
        progress.update(step, reward=0.4)

  Once the stream cannot be written (its reader is gone, the disk is full) it
  prints nothing more: a run does not end because nobody watches it.

  Args:
    total: the last step.
    initial: the step to start from, above 0 on resume.
    every: without a terminal, prints a line each time this many steps pass.
    label: the name before the step.
    stream: standard error by default.
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
    self._silent = False
    if self._stream.isatty():
      from tqdm import tqdm

      with self._or_silent():
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
    with self._or_silent():
      self._show(step, shown)
    self._step = step

  def _show(self, step, shown):
    if self._silent:
      return
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._step)
    elif step // self._every > self._step // self._every or step == self._total:
      pairs = ''.join(f'  {name} {value}' for name, value in shown.items())
      line = f'{self._label} {step}/{self._total}{pairs}'
      print(line, file=self._stream, flush=True)

  def print(self, *renderables) -> None:
    """Prints text or rich tables above the bar."""
    from rich.console import Console

    if self._silent:
      return
    console = Console(file=self._stream, highlight=False)
    console.on_broken_pipe = _raise  # it would end the process
    with self._or_silent():
      if self._bar is not None:
        self._bar.clear()
      for renderable in renderables:
        # Rich would break lines at 80 characters, even within paths.
        whole = isinstance(renderable, str)
        console.print(renderable, markup=False, soft_wrap=whole)
      if self._bar is not None:
        self._bar.refresh()

  def close(self) -> None:
    if self._bar is not None:
      with self._or_silent():
        self._bar.close()

  @contextlib.contextmanager
  def _or_silent(self):
    try:
      yield
    except OSError:
      self._silent = True
      if self._bar is not None:
        # A closed bar writes nothing more, not even from its own thread.
        with contextlib.suppress(OSError):
          self._bar.close()
        self._bar = None

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()
