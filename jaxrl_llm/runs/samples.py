"""Responses and their rewards, for reading."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import metrics, page, progress

# Steps on the page.
SHOWN_STEPS = 50
# Characters of a text in a terminal.
_WIDTH = 300
_COLOURS = {'number good': 'green', 'number bad': 'red'}


@dataclasses.dataclass(frozen=True)
class Sample:
  """One response.

  Attributes:
    step: the step that sampled it.
    prompt: the row's text, without a template or suffix.
    response: the model's text, without special tokens.
    rewards: each reward function's score by name, before weighting; None where
      the function does not apply.
    reward: the weighted sum.
    advantage: mean over the response's tokens; None outside training.
    tokens: the response's length in tokens.
    finished: True if the model ended it itself.
  """

  step: int
  prompt: str
  response: str
  rewards: dict[str, float | None]
  reward: float | None
  advantage: float | None
  tokens: int
  finished: bool


class SampleLog(contextlib.AbstractContextManager):
  """Keeps samples in `samples.jsonl` and shows the latest as a page.

  They are for reading: nothing is computed from them.  So, unlike with metrics,
  a run continues if the file was removed or cut short, and page and tables
  report what is missing.

  Args:
    workdir: the run folder; must exist.
    resume_step: the step of the restored checkpoint, as for `MetricsWriter`.
      Later samples are removed; None removes all.
    evaluated: False also removes the held-out samples of `resume_step`.

  Raises:
    UserError: the file cannot be written, or a line of it is not a sample.
  """

  def __init__(
    self, workdir, resume_step: int | None = None, evaluated: bool = True
  ):
    path = pathlib.Path(workdir) / 'samples.jsonl'
    self._page = path.with_suffix('.html')
    # What the page shows, so that its cost does not grow with the file.
    self._latest: dict[int, list[Sample]] = {}
    self._steps, self._count = set(), 0
    unfinished = None if evaluated else resume_step
    try:
      metrics.cut(
        path,
        resume_step,
        drop=lambda record: (
          record['step'] == unfinished and record.get('advantage') is None
        ),
      )
      for sample in read_samples(path) if path.exists() else ():
        self._keep(sample)
      self._file = metrics.RecordFile(path)
    except OSError as error:
      raise metrics.cannot_write(path, error.strerror) from error

  def write(self, samples: Sequence[Sample]) -> None:
    """Appends samples, one line each."""
    for sample in samples:
      self._file.write(to_record(sample))
      self._keep(sample)

  def _keep(self, sample: Sample) -> None:
    self._count += 1
    self._steps.add(sample.step)
    self._latest.setdefault(sample.step, []).append(sample)
    if len(self._latest) > SHOWN_STEPS:
      del self._latest[min(self._latest)]

  def sync(self) -> None:
    """Returns when every sample is on the disk; call it before a checkpoint."""
    self._file.sync()

  def __exit__(self, *exc_info):
    self._file.close()

  def write_html(self, title: str, before=(), after=()) -> None:
    """Writes `samples.html`: the samples of the latest `SHOWN_STEPS` steps.

    The page is self-contained: no script, no address outside it.

    Args:
      title: the page's heading.
      before: held-out samples of the initial model.
      after: samples of the same prompts now, shown beside them; the page
        reports how many prompts lack either.

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    pairs = _pairs(before, after)
    alone = len(before) + len(after) - 2 * len(pairs)
    counts = self._count, len(self._steps)
    text = page.render(title, self._latest, counts, pairs, alone)
    try:
      write_atomically(self._page, text)
    except OSError as error:
      raise metrics.cannot_write(self._page, error.strerror) from error


def read_samples(path) -> list[Sample]:
  """Reads the samples of a `samples.jsonl`.

  Raises:
    UserError: a line is not a sample; the message has its number.
  """
  samples = []
  for count, record in enumerate(metrics.read_records(path), 1):
    try:
      samples.append(from_record(record))
    except (TypeError, ValueError, OverflowError) as error:
      raise UserError(
        f'{path}, line {count}: not a sample.\nRemove the line.'
      ) from error
  return samples


# Strings for the numbers that JSON lacks.
_NUMBERS = ('nan', 'inf', '-inf')
_TYPES = dict(
  step=int, prompt=str, response=str, rewards=dict, tokens=int, finished=bool
)


def to_record(sample: Sample) -> dict:
  """Converts a sample to JSON values: its line in `samples.jsonl`."""
  return dataclasses.asdict(sample) | {
    'step': int(sample.step),
    'rewards': {k: _forth(value, k) for k, value in sample.rewards.items()},
    'reward': _forth(sample.reward, 'reward'),
    'advantage': _forth(sample.advantage, 'advantage'),
    'tokens': int(sample.tokens),
    'finished': bool(sample.finished),
  }


def _forth(value, name):
  return None if value is None else metrics.number(value, name)


def from_record(record: dict) -> Sample:
  """Restores a sample from the result of `to_record`.

  Raises:
    TypeError, ValueError, OverflowError: it is not the record of a sample.
  """
  sample = Sample(**record)
  for name, kind in _TYPES.items():
    if type(getattr(sample, name)) is not kind:
      raise TypeError(name)
  scores = {name: _back(value) for name, value in sample.rewards.items()}
  totals = {name: _back(record[name]) for name in ('reward', 'advantage')}
  return dataclasses.replace(sample, rewards=scores, **totals)


def _back(value):
  if value in _NUMBERS or type(value) in (int, float):
    return float(value)
  if value is not None:
    raise ValueError(value)
  return None


def sample_table(samples: Sequence[Sample], *, title: str = ''):
  """Returns a `rich` table of samples, with the beginning of long texts."""
  return _table(title, page.sample_rows(samples))


def before_after_table(before: Sequence[Sample], after: Sequence[Sample]):
  """Returns a `rich` table of two models' responses to the same prompts.

  The prompts have one order; the title reports any that are lost on a side.
  """
  title = 'Before and after'
  pairs = _pairs(before, after)
  prompts = len(before) + len(after) - len(pairs)
  if len(pairs) < prompts:
    title += f' ({len(pairs)} of {prompts}: samples.jsonl lacks the rest)'
  return _table(title, page.pair_rows(pairs))


def _pairs(before, after):
  """Pairs samples of the same prompts; leaves out those without a partner."""
  pairs, start = [], 0
  prompts = [new.prompt for new in after]
  for old in before:
    if old.prompt in prompts[start:]:
      start = prompts.index(old.prompt, start) + 1
      pairs.append((old, after[start - 1]))
  return pairs


def _table(title, rows):
  from rich import box
  from rich.table import Table

  table = Table(title=title or None, title_justify='left', show_lines=True)
  table.box = box.SIMPLE_HEAD
  for index, cell in enumerate(rows[0]):
    is_text = cell.kind == 'text'
    table.add_column(
      _shown(cell),
      ratio=(3 if index else 2) if is_text else None,
      justify='left' if is_text else 'right',
      overflow='fold',
    )
  for cells in rows[1:]:
    table.add_row(*map(_shown, cells))
  return table


def _shown(cell):
  from rich.text import Text

  text = cell.text
  if len(text) > _WIDTH:
    text = text[: _WIDTH - 1] + '…'
  # Text, not str: a model may write what rich would read as markup.
  return Text(progress.visible(text), style=_COLOURS.get(cell.kind, ''))
