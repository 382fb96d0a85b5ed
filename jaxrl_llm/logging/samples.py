"""What the model wrote and what it earned, for reading."""

import dataclasses
import pathlib
from collections.abc import Sequence

from jaxrl_llm.errors import UserError
from jaxrl_llm.logging import page
from jaxrl_llm.logging.records import RecordFile, cut, number, read_records


@dataclasses.dataclass(frozen=True)
class Sample:
  """One response.

  Attributes:
    step: the step that sampled it.
    prompt: the row's own text; what a template or a suffix adds is not in it.
    response: what the model wrote, without special tokens.
    rewards: each reward function's score by name, before weighting; None where
      the function does not apply.
    reward: the weighted sum.
    advantage: mean over the response's tokens; None outside training.
    tokens: the response's length in tokens.
    finished: whether the model ended it itself.
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

  Args:
    workdir: the run folder; must exist.
    resume_step: the step of the restored checkpoint, as for `MetricsWriter`.
      Later samples are removed; None removes all.
  """

  def __init__(self, workdir, resume_step: int | None = None):
    self._workdir = pathlib.Path(workdir)
    try:
      cut(self._workdir / 'samples.jsonl', resume_step)
      self._file = RecordFile(self._workdir / 'samples.jsonl')
    except OSError as error:
      raise UserError(
        f'Samples cannot be written in {workdir}: {error.strerror}.\n'
        'Make room or change its permissions, then resume.'
      ) from error

  def write(self, samples: Sequence[Sample]) -> None:
    """Appends samples, each one line."""
    for sample in samples:
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
      self._file.write(record)

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
    """Writes `samples.html` from all that `samples.jsonl` holds.

    The page stands alone: no script, no address outside it.

    Args:
      title: the page's heading.
      before: held-out samples of the model as it was, to be set beside
      after: those of the same prompts now.
      steps: show only this many of the latest steps (the page says so).

    Raises:
      UserError: the disk is full or the folder cannot be written.
    """
    samples = read_samples(self._workdir / 'samples.jsonl')
    text = page.render(title, samples, _pairs(before, after), steps)
    page.write(self._workdir / 'samples.html', text)


def read_samples(path) -> list[Sample]:
  """The samples of a `samples.jsonl`.

  Raises:
    UserError: a line is not a sample; the message has its number.
  """
  samples = []
  for count, record in enumerate(read_records(path), 1):
    try:
      sample = Sample(**record)
      rewards = {k: _back(value) for k, value in sample.rewards.items()}
    except (TypeError, AttributeError) as error:
      raise UserError(
        f'{path}, line {count}: not a sample.\nRemove the line.'
      ) from error
    samples.append(
      dataclasses.replace(
        sample,
        rewards=rewards,
        reward=_back(sample.reward),
        advantage=_back(sample.advantage),
      )
    )
  return samples


def _back(value):
  return float(value) if isinstance(value, str) else value


def sample_table(samples: Sequence[Sample], *, title='', width: int = 300):
  """A table for a terminal.

  Args:
    samples: its rows.
    title: above the table.
    width: characters of each text to show; '…' stands for the rest, and the
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
  """The responses of two models to the same prompts, side by side.

  Args:
    before: one response per prompt.
    after: responses to the same prompts in the same order.
    title: above the table.
    width: as in `sample_table`.

  Returns:
    A `rich.table.Table`.

  Raises:
    ValueError: the prompts differ.
  """
  from rich.text import Text

  columns = ['prompt', 'before', 'after', 'reward before', 'reward after']
  table = _table(title, columns, texts=3)
  for old, new in _pairs(before, after):
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
  if [old.prompt for old in before] != [new.prompt for new in after]:
    raise ValueError('The samples before and after are of different prompts.')
  return list(zip(before, after, strict=True))


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
