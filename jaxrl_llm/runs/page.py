"""Renders samples as rows of cells, and as one self-contained page of HTML."""

import html
import math
from typing import NamedTuple

from jaxrl_llm.runs.progress import visible

# The browser's own colours and translucent ones suit a light and a dark page.
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 78rem; overflow-wrap: anywhere; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0; opacity: .75; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th { background: #8882; font-size: .8rem; text-align: left; }
th, td { border-bottom: 1px solid #8885; padding: .45rem .6rem;
  vertical-align: top; }
td.text { font: 13px/1.5 ui-monospace, monospace; min-width: 13rem;
  white-space: pre-wrap; }
.number { font-variant-numeric: tabular-nums; overflow-wrap: normal;
  text-align: right; white-space: nowrap; }
.good { background: #1a54; } .bad { background: #d334; }
@media (max-width: 40rem) { body { margin: 1rem auto; padding: 0 .5rem; }
  th, td { padding: .35rem .3rem; } td.text { min-width: 7.5rem; } }
"""


class Cell(NamedTuple):
  """A cell: its text, and 'text', 'number', 'number good' or 'number bad'."""

  text: str
  kind: str = 'number'


def sample_rows(samples) -> list[list[Cell]]:
  """Returns the rows of a table of samples; the first contains the heads.

  A single reward that equals the sum in every row is left out, and so is the
  advantage where no sample has one.
  """
  names = list(dict.fromkeys(name for row in samples for name in row.rewards))
  if len(names) == 1 and all(
    row.rewards.get(names[0]) == row.reward for row in samples
  ):
    names = []
  trained = any(row.advantage is not None for row in samples)
  numbers = [*names, 'reward', *['advantage'] * trained, 'tokens']
  rows = [[Cell('prompt', 'text'), Cell('response', 'text')]]
  rows[0] += map(Cell, numbers)
  for row in samples:
    cells = [Cell(row.prompt, 'text'), Cell(row.response, 'text')]
    cells += [_number(row.rewards.get(name)) for name in names]
    cells.append(_number(row.reward))
    if trained:
      cells.append(_number(row.advantage, row.advantage))
    cells.append(Cell(f'{row.tokens}{"" if row.finished else "+"}'))
    rows.append(cells)
  return rows


def pair_rows(pairs) -> list[list[Cell]]:
  """Returns the rows of a table of (before, after) samples, as above."""
  texts = [Cell(name, 'text') for name in ('prompt', 'before', 'after')]
  rows = [[*texts, Cell('reward before'), Cell('reward after')]]
  for old, new in pairs:
    lost = None in (old.reward, new.reward)
    change = None if lost else new.reward - old.reward
    texts = [Cell(x, 'text') for x in (old.prompt, old.response, new.response)]
    rows.append([*texts, _number(old.reward), _number(new.reward, change)])
  return rows


def _number(value: float | None, change: float | None = None) -> Cell:
  """Returns the cell of a number, coloured by a change that is not 0 or NaN."""
  kind = 'number'
  if change and not math.isnan(change):
    kind += ' good' if change > 0 else ' bad'
  return Cell('–' if value is None else f'{value:.3g}', kind)


def render(title: str, latest: dict, counts: tuple, pairs, alone: int) -> str:
  """Renders the page.

  Args:
    title: the page's heading.
    latest: step → samples to show.
    counts: number of samples and of steps in the file.
    pairs: (before, after) samples of the same prompts.
    alone: number of samples of before or after without a counterpart.
  """
  note = f'{counts[0]} samples of {counts[1]} steps, the latest first.'
  if len(latest) < counts[1]:
    note += f' The latest {len(latest)} are shown; all are in samples.jsonl.'
  note += ' Tokens with + : cut off by the limit.'
  parts = [
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_safe(title)}</title>\n<style>{_STYLE}</style>\n'
    f'<h1>{_safe(title)}</h1>\n<p>{note}</p>\n'
  ]
  if pairs:
    parts.append(_table('Before and after, held-out prompts', pair_rows(pairs)))
  if alone:
    parts.append(
      f'<p>{alone} held-out prompts lack a sample of before or after in '
      'samples.jsonl.</p>\n'
    )
  for step in sorted(latest, reverse=True):
    trained = [row for row in latest[step] if row.advantage is not None]
    others = [row for row in latest[step] if row.advantage is None]
    for phase, samples in (('training', trained), ('held out', others)):
      if samples:
        parts.append(_table(f'Step {step}, {phase}', sample_rows(samples)))
  return ''.join(parts) + '</html>\n'


def _safe(text):
  return html.escape(visible(text))


def _table(title, rows):
  lines = []
  for tag, cells in zip(['th'] + ['td'] * len(rows), rows, strict=False):
    line = (f'<{tag} class="{c.kind}">{_safe(c.text)}</{tag}>' for c in cells)
    lines.append(f'<tr>{"".join(line)}</tr>\n')
  table = f'<table>\n{"".join(lines)}</table>'
  return f'<h2>{_safe(title)}</h2>\n<div class="wide">{table}</div>\n'
