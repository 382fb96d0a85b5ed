"""What a run's folder has lost that a resumed run goes on from."""

import dataclasses

from experiments.course import Course
from jaxrl_llm import distributed
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_folder import RunFolder


def check(folder: RunFolder, course: Course, restored: bool) -> None:
  """Raises UserError if samples or checkpoints of a run are gone.

  All processes call it; process 0 looks.

  Args:
    folder: of the run.
    course: how far the run is now.
    restored: whether that is by a checkpoint.
  """
  text = distributed.on_main(
    lambda: _lost(folder, course, restored), 'what the run folder holds'
  )
  if text:
    raise UserError(text)


def _lost(folder: RunFolder, course: Course, restored: bool) -> str:
  if restored:
    path = folder.path / 'samples.jsonl'
    if path.exists():
      return ''
    return (
      f'{path} is missing, but the checkpoint is of step {course.step}\n'
      'restore it from a copy, or put an empty file in its place'
    )
  path = folder.path / 'metrics.jsonl'
  if not folder.resuming or not path.exists():
    return ''
  records = path.read_bytes().count(b'\n')
  # A second checkpoint waits for the first: where a record follows both,
  # there was one.
  every = folder.former['checkpoints']['every']
  due = [
    step
    for step in range(1, records - 1)
    if dataclasses.replace(course, step=step).checkpoint_is_due(every)
  ]
  if len(due) < 2:
    return ''
  return (
    f'{folder.path.absolute() / "checkpoints"} has no checkpoint, but {path} '
    f'has {records} records\nrestore the folder from a copy, or start in '
    'another --workdir'
  )
