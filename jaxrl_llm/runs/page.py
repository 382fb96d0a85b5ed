"""Renders the samples as one self-contained page of HTML."""

import html
import math
import pathlib

from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.runs.metrics import cannot_write

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #646a73;
  --line: #dfe2e6; --paper: #fff; --head: #f5f6f8; --good: #137a3f;
  --goodbg: #e8f5ec; --bad: #b3261e; --badbg: #fceeed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa1ab;
  --line: #363b42; --paper: #16181c; --head: #1f2227; --good: #6fd195;
  --goodbg: #17301f; --bad: #ff8a80; --badbg: #3a1d1b; } }
body { margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { color: var(--soft); margin: .25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { background: var(--head); color: var(--soft); font-size: .8rem;
  font-weight: 600; text-align: left; }
th, td { border-bottom: 1px solid var(--line); padding: .45rem .6rem;
  vertical-align: top; }
td.text { font: 13px/1.5 ui-monospace, monospace; min-width: 13rem;
  overflow-wrap: anywhere; white-space: pre-wrap; }
th.number, td.number { font-variant-numeric: tabular-nums; text-align: right;
  white-space: nowrap; }
td.good { background: var(--goodbg); color: var(--good); }
td.bad { background: var(--badbg); color: var(--bad); }
"""


def visible(text: str) -> str:
  """Replaces control characters by their pictures, so that none acts or hides.

  Line ends and tabs stay; half a surrogate pair becomes the replacement sign.
  """
  return ''.join(_picture(char) for char in text)


def _picture(char):
  code = ord(char)
  if char in '\n\t' or 0x20 <= code < 0x7F:
    return char
  if code < 0x20:
    return chr(0x2400 + code)
  if code == 0x7F:
    return '\u2421'
  if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000:
    return '\ufffd'
  # Marks that reorder what follows could make a page show other text.
  if 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
    return f'\\u{code:04x}'
  return char


def shown(value: float | None) -> str:
  """Formats a number for reading; a dash for None."""
  return '–' if value is None else f'{value:.3g}'


def length(sample) -> str:
  """Formats the length in tokens; '+' if the limit, not the model, ended it."""
  return f'{sample.tokens}{"" if sample.finished else "+"}'


def sign(advantage: float | None) -> str:
  """Returns 'good', 'bad', or '' for a zero, absent or NaN advantage."""
  if advantage is None or math.isnan(advantage) or advantage == 0:
    return ''
  return 'good' if advantage > 0 else 'bad'


def change(old, new) -> str:
  """Returns the sign of a prompt's change of reward."""
  if old.reward is None or new.reward is None:
    return ''
  return sign(new.reward - old.reward)


def reward_names(samples) -> list[str]:
  """Returns each reward's name once, in order of first appearance.

  A single reward that equals the sum in every row is left out.
  """
  names = list(dict.fromkeys(name for row in samples for name in row.rewards))
  if len(names) == 1 and all(
    row.rewards.get(names[0]) == row.reward for row in samples
  ):
    return []
  return names


def render(title: str, samples, pairs, steps: int, alone: int = 0) -> str:
  """Renders the page.

  Args:
    title: the page's heading.
    samples: all samples, by step ascending.
    pairs: (before, after) samples of the same prompts; may be empty.
    steps: number of the latest steps to show.
    alone: number of samples of before or after without a counterpart.
  """
  by_step = {}
  for sample in samples:
    by_step.setdefault(sample.step, []).append(sample)
  latest = sorted(by_step)[-steps:][::-1]
  note = f'{len(samples)} samples of {len(by_step)} steps, the latest first.'
  if len(latest) < len(by_step):
    note += (
      f' The latest {len(latest)} steps are shown; all are in samples.jsonl.'
    )
  note += ' Tokens with + : cut off by the limit.'
  parts = [
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_safe(title)}</title>\n<style>{_STYLE}</style>\n'
    f'<h1>{_safe(title)}</h1>\n<p>{note}</p>\n'
  ]
  if pairs:
    parts.append(_before_after(pairs))
  if alone:
    parts.append(
      f'<p>{alone} held-out prompts lack a sample of before or after in '
      'samples.jsonl.</p>\n'
    )
  parts += [_step_table(step, by_step[step]) for step in latest]
  return ''.join(parts) + '</html>\n'


def write_page(path, text: str) -> None:
  """Writes the page atomically.

  Raises:
    UserError: the disk is full or the folder cannot be written.
  """
  try:
    write_atomically(pathlib.Path(path), text)
  except OSError as error:
    raise cannot_write(path, error.strerror) from error


def _safe(text):
  return html.escape(visible(text))


def _cell(text, kind):
  return f'<td class="{kind}">{_safe(text)}</td>'


def _table(heads, texts, rows):
  head = ''.join(
    f'<th{"" if index < texts else " class=number"}>{_safe(name)}</th>'
    for index, name in enumerate(heads)
  )
  body = ''.join(f'<tr>{"".join(cells)}</tr>\n' for cells in rows)
  return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def _step_table(step, samples):
  names = reward_names(samples)
  heads = ['prompt', 'response', *names, 'reward', 'advantage', 'tokens']
  rows = [
    [
      _cell(row.prompt, 'text'),
      _cell(row.response, 'text'),
      *(_cell(shown(row.rewards.get(name)), 'number') for name in names),
      _cell(shown(row.reward), 'number'),
      _cell(shown(row.advantage), f'number {sign(row.advantage)}'.strip()),
      _cell(length(row), 'number'),
    ]
    for row in samples
  ]
  return f'<h2>{_safe(f"Step {step}")}</h2>\n{_table(heads, 2, rows)}'


def _before_after(pairs):
  heads = ['prompt', 'before', 'after', 'reward before', 'reward after']
  rows = [
    [
      _cell(old.prompt, 'text'),
      _cell(old.response, 'text'),
      _cell(new.response, 'text'),
      _cell(shown(old.reward), 'number'),
      _cell(shown(new.reward), f'number {change(old, new)}'.strip()),
    ]
    for old, new in pairs
  ]
  return (
    f'<h2>Before and after, held-out prompts</h2>\n{_table(heads, 3, rows)}'
  )
