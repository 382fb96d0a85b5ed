"""Responses and their rewards, for reading."""

import dataclasses
import pathlib
from collections.abc import Sequence

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import page
from jaxrl_llm.runs.metrics import RecordFile, cut, number, read_records


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


class SampleLog:
  """Keeps samples in `samples.jsonl` and shows them as tables.

  They are for reading: nothing is computed from them.  So, unlike with metrics,
  a run continues if the file was removed or cut short, and page and tables
  report what is missing.

  Args:
    workdir: the run folder; must exist.
    resume_step: the step of the restored checkpoint, as for `MetricsWriter`.
      Later samples are removed; None removes all.
    evaluated: False also removes the held-out samples of `resume_step`.
  """

  def __init__(
    self, workdir, resume_step: int | None = None, evaluated: bool = True
  ):
    self._workdir = pathlib.Path(workdir)
    unfinished = None if evaluated else resume_step
    try:
      cut(
        self._workdir / 'samples.jsonl',
        resume_step,
        drop=lambda record: (
          record['step'] == unfinished and record.get('advantage') is None
        ),
      )
      self._file = RecordFile(self._workdir / 'samples.jsonl')
    except OSError as error:
      raise UserError(
        f'Samples cannot be written in {workdir}: {error.strerror}.\n'
        'Make room or change its permissions, then resume.'
      ) from error

  def write(self, samples: Sequence[Sample]) -> None:
    """Appends samples, one line each."""
    for sample in samples:
      self._file.write(to_record(sample))

  def sync(self) -> None:
    """Returns when every sample is on the disk; call it before a checkpoint."""
    self._file.sync()

  def close(self) -> None:
    self._file.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def write_html(
    self,
    title: str,
    before: Sequence[Sample] = (),
    after: Sequence[Sample] = (),
    steps: int = 50,
  ) -> None:
    """Writes `samples.html` from the content of `samples.jsonl`.

    The page is self-contained: no script, no address outside it.

    Args:
      title: the page's heading.
      before: held-out samples of the initial model.
      after: samples of the same prompts now, shown beside them; the page
        reports how many prompts lack either in the file.
      steps: number of the latest steps to show (the page reports it).

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    samples = read_samples(self._workdir / 'samples.jsonl')
    pairs = _pairs(before, after)
    alone = len(before) + len(after) - 2 * len(pairs)
    text = page.render(title, samples, pairs, steps, alone)
    page.write_page(self._workdir / 'samples.html', text)


def read_samples(path) -> list[Sample]:
  """Reads the samples of a `samples.jsonl`.

  Raises:
    UserError: a line is not a sample; the message has its number.
  """
  samples = []
  for count, record in enumerate(read_records(path), 1):
    try:
      samples.append(from_record(record))
    except (TypeError, ValueError, OverflowError) as error:
      raise UserError(
        f'{path}, line {count}: not a sample.\nRemove the line.'
      ) from error
  return samples


# Strings for the numbers that JSON lacks.
_NUMBERS = ('nan', 'inf', '-inf')
_TYPES = {
  'step': int,
  'prompt': str,
  'response': str,
  'rewards': dict,
  'tokens': int,
  'finished': bool,
}


def to_record(sample: Sample) -> dict:
  """Converts a sample to JSON values: its line in `samples.jsonl`."""
  record = dataclasses.asdict(sample)
  record['rewards'] = {
    name: None if value is None else number(value, name)
    for name, value in sample.rewards.items()
  }
  for name in ('reward', 'advantage'):
    if record[name] is not None:
      record[name] = number(record[name], name)
  record.update(
    step=int(sample.step),
    tokens=int(sample.tokens),
    finished=bool(sample.finished),
  )
  return record


def from_record(record: dict) -> Sample:
  """Restores a sample from the result of `to_record`.

  Raises:
    TypeError, ValueError, OverflowError: it is not the record of a sample.
  """
  sample = Sample(**record)
  for name, kind in _TYPES.items():
    if type(getattr(sample, name)) is not kind:
      raise TypeError(name)
  rewards = {name: _back(value) for name, value in sample.rewards.items()}
  return dataclasses.replace(
    sample,
    rewards=rewards,
    reward=_back(sample.reward),
    advantage=_back(sample.advantage),
  )


def _back(value):
  if value is None:
    return None
  if isinstance(value, bool) or isinstance(value, str) != (value in _NUMBERS):
    raise ValueError(value)
  number = float(value)
  return number if isinstance(value, str) else value


def sample_table(samples: Sequence[Sample], *, title='', width: int = 300):
  """Creates a table for a terminal.

  Args:
    samples: its rows.
    title: above the table.
    width: characters of each text to show; '…' replaces the rest, and the
      whole text is in `samples.jsonl`.

  Returns:
    A `rich.table.Table`; print it with `Progress.print`.
  """
  from rich.text import Text

  names = page.reward_names(samples)
  columns = ['prompt', 'response', *names, 'reward', 'advantage', 'tokens']
  table = _table(title, columns, texts=2)
  for sample in samples:
    sign = page.sign(sample.advantage)
    scores = [page.shown(sample.rewards.get(name)) for name in names]
    style = {'good': 'green', 'bad': 'red', '': ''}[sign]
    table.add_row(
      _shorten(sample.prompt, width),
      _shorten(sample.response, width),
      *scores,
      page.shown(sample.reward),
      Text(page.shown(sample.advantage), style=style),
      page.length(sample),
    )
  return table


def before_after_table(
  before: Sequence[Sample],
  after: Sequence[Sample],
  *,
  title: str = 'Before and after',
  width: int = 300,
):
  """Creates a table of the responses of two models to the same prompts.

  Args:
    before: one response per prompt.
    after: responses to the same prompts in the same order; the title reports
      any that are lost on either side.
    title: above the table.
    width: as in `sample_table`.

  Returns:
    A `rich.table.Table`.
  """
  from rich.text import Text

  columns = ['prompt', 'before', 'after', 'reward before', 'reward after']
  pairs = _pairs(before, after)
  prompts = len(before) + len(after) - len(pairs)
  if len(pairs) < prompts:
    title += f' ({len(pairs)} of {prompts}: samples.jsonl lacks the rest)'
  table = _table(title, columns, texts=3)
  for old, new in pairs:
    style = {'good': 'green', 'bad': 'red', '': ''}[page.change(old, new)]
    table.add_row(
      _shorten(old.prompt, width),
      _shorten(old.response, width),
      _shorten(new.response, width),
      page.shown(old.reward),
      Text(page.shown(new.reward), style=style),
    )
  return table


def _pairs(before, after):
  """Pairs samples of the same prompts; leaves out those without a partner."""
  pairs, rest = [], list(after)
  for old in before:
    prompts = [new.prompt for new in rest]
    if old.prompt in prompts:
      place = prompts.index(old.prompt)
      pairs.append((old, rest[place]))
      rest = rest[place + 1 :]
  return pairs


def _table(title, columns, texts):
  from rich import box
  from rich.table import Table

  table = Table(
    title=title or None,
    title_justify='left',
    box=box.SIMPLE_HEAD,
    show_lines=True,
  )
  for index, column in enumerate(columns):
    is_text = index < texts
    table.add_column(
      column,
      ratio=3 if index and is_text else 2 if is_text else None,
      justify='left' if is_text else 'right',
      overflow='fold',
    )
  return table


def _shorten(text, width):
  from rich.text import Text

  # Text, not str: a model may write what rich would read as markup.
  if len(text) > width:
    text = text[: width - 1] + '…'
  return Text(page.visible(text))
