"""A progress bar on a terminal; an occasional line elsewhere."""

import contextlib
import sys
import unicodedata

# Steps between two lines, without a terminal.
_EVERY = 10

# Format characters that texts need: joiners and the Mongolian vowel separator
# select letter shapes, the Arabic, Syriac and Kaithi signs are themselves
# visible, and hieroglyph controls arrange signs.
_NEEDED = frozenset(
  '\u200c\u200d\u180e'
  '\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2'
  '\U000110bd\U000110cd'
) | {chr(code) for code in range(0x13430, 0x13440)}


def visible(text: str, keep: str = '\n\t') -> str:
  """Replaces characters that act on a reader's screen or hide.

  Control characters become their pictures, format characters and line
  separators \\uXXXX escapes, half a surrogate pair the replacement sign.

  Args:
    text: any text.
    keep: control characters that stay.
  """
  if text.isprintable():
    return text
  return ''.join(c if c in keep else _picture(c) for c in text)


def _picture(char):
  code, kind = ord(char), unicodedata.category(char)
  if code < 0x20 or code == 0x7F:
    return chr(0x2400 + min(code, 0x21))
  if kind in ('Cc', 'Cs'):
    return '\ufffd'
  # Tags, some of them unassigned, and marks that reorder the text around them.
  if kind in ('Cf', 'Zl', 'Zp') or 0xE0000 <= code < 0xE0080:
    escaped = f'\\u{code:04x}' if code < 0x10000 else f'\\U{code:08x}'
    return char if char in _NEEDED else escaped
  return char


def say(text: str) -> None:
  """Prints to standard error; does nothing where that cannot be written."""
  with contextlib.suppress(OSError):
    print(visible(text), file=sys.stderr, flush=True)


def _raise():
  raise  # what is being handled


class Progress(contextlib.AbstractContextManager):
  """Shows the progress of a loop, with its latest numbers.

    with Progress(total=steps, initial=restored) as progress:
      for step in ...:
        progress.update(step, reward=0.4)

  Once the stream cannot be written (its reader is gone, the disk is full) it
  prints nothing more: a run does not end because nobody watches it.

  Args:
    total: the last step.
    initial: the step to start from, above 0 on resume.
    stream: standard error by default.
  """

  def __init__(self, total: int, initial: int = 0, *, stream=None):
    self._stream = sys.stderr if stream is None else stream
    self._total, self._step = total, initial
    self._bar, self._silent = None, False
    if self._stream.isatty():
      from tqdm import tqdm

      with self._or_silent():
        bar = {'desc': 'train', 'total': total, 'initial': initial}
        self._bar = tqdm(**bar, file=self._stream, dynamic_ncols=True)

  def update(self, step: int, **numbers: float) -> None:
    """Moves to a step and shows its numbers, such as `reward=0.4`."""
    shown = {visible(k, keep=''): f'{x:.4g}' for k, x in numbers.items()}
    before, self._step = self._step, step
    with self._or_silent():
      if self._bar is not None:
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - before)
      elif step // _EVERY > before // _EVERY or step == self._total:
        pairs = ''.join(f'  {name} {value}' for name, value in shown.items())
        self.print(f'train {step}/{self._total}{pairs}')

  def print(self, *renderables) -> None:
    """Prints text or rich tables above the bar."""
    from rich.console import Console
    from tqdm import tqdm

    if self._silent:
      return
    console = Console(file=self._stream, highlight=False)
    console.on_broken_pipe = _raise  # it would end the process
    with self._or_silent(), tqdm.external_write_mode(self._stream):
      for each in renderables:
        # Rich would break lines at 80 characters, even within paths.
        if isinstance(each, str):
          console.print(visible(each), markup=False, soft_wrap=True)
        else:
          console.print(each)

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

  def __exit__(self, *exc_info):
    with self._or_silent():
      if self._bar is not None:
        self._bar.close()
