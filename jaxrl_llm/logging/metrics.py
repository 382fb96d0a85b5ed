"""Numbers per step: JSON lines for programs, TensorBoard for eyes."""

import logging
import pathlib

from jaxrl_llm.errors import UserError
from jaxrl_llm.logging.records import RecordFile, cut, number, read_records


class MetricsWriter:
  """Writes one record per step to `metrics.jsonl`, `timings.jsonl` and `tb/`.

  `metrics.jsonl` holds what the run computed and nothing of the clock, so that
  two runs of one configuration can be compared byte by byte; clock readings, in
  seconds, and what else depends on the process go to `timings.jsonl`.  Floats
  are written in full (their shortest exact form); NaN and the infinities as the
  strings "nan", "inf", "-inf", which `read_metrics` turns back.

  Args:
    workdir: the run folder; must exist.
    resume_step: the step of the restored checkpoint.  Records after it are
      removed, so that the file goes on as if nothing had happened.  None
      removes all records: the run starts at its beginning.

  Raises:
    UserError: the records do not reach `resume_step`.
  """

  def __init__(self, workdir, resume_step: int | None = None):
    from tensorboardX import SummaryWriter

    workdir = pathlib.Path(workdir)
    paths = [workdir / f'{name}.jsonl' for name in ('metrics', 'timings')]
    try:
      cut(paths[0], resume_step, complete=True)
      cut(paths[1], resume_step)
      self._metrics, self._timings = map(RecordFile, paths)
      self._board = SummaryWriter(
        str(workdir / 'tb'),
        purge_step=0 if resume_step is None else resume_step + 1,
      )
    except OSError as error:
      raise UserError(
        f'Records cannot be written in {workdir}: {error.strerror}.\n'
        'Make room or change its permissions, then resume.'
      ) from error
    # It would say at every NaN that there is one; the record says it already.
    logging.getLogger('tensorboardX.x2num').setLevel(logging.ERROR)
    self._last = resume_step

  def write(self, step: int, metrics: dict, timings: dict | None = None):
    """Writes a step's record.

    Args:
      step: above that of every record before.
      metrics: numbers by name, written in this order.
      timings: clock readings by name, in seconds, and counts of the process.

    Raises:
      ValueError: the step does not follow, or a metric is not one number.
      UserError: the disk is full.
    """
    if self._last is not None and step <= self._last:
      raise ValueError(f'Step {step} does not follow step {self._last}.')
    step = int(step)
    metrics, timings = (
      {name: number(value, name) for name, value in (values or {}).items()}
      for values in (metrics, timings)
    )
    self._metrics.write({'step': step, **metrics})
    if timings:
      self._timings.write({'step': step, **timings})
    self._last = step
    timings = {f'timings/{name}': value for name, value in timings.items()}
    for name, value in {**metrics, **timings}.items():
      self._board.add_scalar(name, float(value), step)

  def sync(self) -> None:
    """Returns when every record is on the disk.

    Call it before a checkpoint: no checkpointed step may lack its record.
    """
    self._metrics.sync()
    self._timings.sync()
    self._board.flush()

  def close(self) -> None:
    self._metrics.close()
    self._timings.close()
    self._board.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


def read_metrics(path) -> list[dict]:
  """The records of `metrics.jsonl` or `timings.jsonl`, every value a number.

  Raises:
    UserError: a line is not a record; the message has its number.
  """
  return [
    {
      name: float(value) if isinstance(value, str) else value
      for name, value in record.items()
    }
    for record in read_records(path)
  ]
