"""Verified checkpoints: Orbax v1 with a digest per leaf.

Orbax commits a step atomically, but restores a bit that flipped in its files
silently.  Here each step carries a manifest (shape, dtype and digest of each
leaf, and the caller's metadata), each restore is checked against it, and a step
that fails is skipped in favour of the one before.

    folder/00000120/state/      the arrays, an Orbax checkpoint of its own
    folder/00000120/manifest/   JSON, committed together with them
    folder/00000140.orbax-checkpoint-tmp…  an interrupted save or removal

Several processes make the same calls in the same order, on a shared folder.
Each writes and reads its shards; only process 0 decides which steps exist.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import re
import shutil
import time
from concurrent import futures

from jaxrl_llm import processes
from jaxrl_llm.atomic import as_json, sync_folder, sync_tree
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import orbax_io
from jaxrl_llm.runs.digests import describe, differences, named_leaves

_log = logging.getLogger(__name__)
# Other names are the user's.  Earlier versions wrote the last two.
_DEAD = r'\d{8,}\.(orbax-checkpoint-tmp.*|broken|discarded)'
# Seconds in which other threads may still create folders of a failed save.
_AFTERMATH = 1.0


class _BrokenError(Exception):
  """A step does not verify; the message gives the reason."""


class Checkpoints(contextlib.AbstractContextManager):
  """The steps of one run, in a folder of a local or network file system.

  Args:
    folder: holds the steps; created by the first save, in an existing folder.
    keep_latest: number of the newest steps to keep, at least 1.
    keep_best: number of the steps with the highest metric to keep.
    read_only: changes nothing in the folder, as another process may be writing.
      Otherwise the remains of interrupted saves are removed at once.
  """

  def __init__(self, folder, keep_latest=2, keep_best=1, *, read_only=False):
    self.folder = pathlib.Path(folder).absolute()
    self._keep = keep_latest, keep_best
    self._read_only = read_only
    self._pending = None  # (manifest, future of the running save)
    self._sound = None  # (step, leaves) of the last step saved or verified
    self._broken = set()  # steps that a restore has skipped
    self._waiter = futures.ThreadPoolExecutor(1, 'checkpoint')
    if not read_only:
      processes.on_main(self._remove, 'the remains of checkpoints')

  def __exit__(self, *exc_info):
    self.wait()

  def save(self, step: int, state, metadata: dict, metric=None) -> None:
    """Starts to save a step, after waiting for the save before it.

    Returns once the arrays are copied or held, so that the caller may donate
    them.  If the last step is saved again with equal arrays, only its metadata
    and metric are replaced, atomically.

    Args:
      step: the counter that names the checkpoint, 0 or more.
      state: a tree of arrays, PRNG keys included.
      metadata: JSON values (tuples come back as lists).
      metric: a number, where higher is better, or None.

    Raises:
      UserError: this save or the one before it failed (a full disk, say), or
        something cannot be saved.
    """
    if self._read_only:
      raise UserError(f'{self.folder} is read-only: save through its own run.')
    self.wait()
    manifest = {
      'step': int(step),
      'metric': None if metric is None else float(metric),
      'metadata': as_json(metadata, 'checkpoint metadata', allow_nan=True),
      'leaves': describe(named_leaves(state)),
    }
    digests = processes.gather_objects(_sha256(manifest['leaves']), 'digests')
    for process, digest in enumerate(digests):
      if digest != digests[0]:
        raise UserError(
          f'At step {step} process {process} would save another state than '
          'process 0.\nStart all with the same program, flags and data.'
        )
    manifest['sha256'] = _sha256(manifest)
    if processes.on_main(lambda: self._replace(manifest), f'step {step}'):
      return self._committed(manifest)
    try:
      response = orbax_io.start_save(self._path(step), state, manifest)
    except Exception as error:
      raise self._failed(step, error) from error
    self._pending = manifest, self._waiter.submit(self._finish, step, response)

  def _replace(self, manifest: dict) -> bool:
    """Makes room for a step; True if a new manifest was all that it needed."""
    step, path = manifest['step'], self._path(manifest['step'])
    try:
      self.folder.mkdir(exist_ok=True)
      if path.exists() and self._sound == (step, manifest['leaves']):
        orbax_io.save_manifest(path, manifest)
        return True
      # Before its successor is complete: a run meets an old step only after it
      # has resumed from an older one, which is still there.
      self._remove([step])
    except OSError as error:
      raise self._failed(step, error) from error
    return False

  def _finish(self, step: int, response) -> None:
    """Waits until a step is on the disk, in a thread of its own."""
    response.result()
    if processes.is_main():
      # Orbax has synced the arrays alone.  The step before is removed after
      # this, and a power cut must not take both.
      sync_tree(self._path(step))
      sync_folder(self.folder)
      sync_folder(self.folder.parent)

  def poll(self) -> None:
    """Does what `wait` does if the running save has ended or failed."""
    if self._pending is not None:
      running = not self._pending[1].done()
      if not processes.agree(running, 'a running save'):
        self.wait()

  def wait(self) -> None:
    """Waits for the running save, then removes steps that need not be kept.

    Raises:
      UserError: the save failed; the steps before it are untouched.
    """
    if self._pending is not None:
      (manifest, finished), self._pending = self._pending, None
      try:
        finished.result()
      except Exception as error:
        raise self._failed(manifest['step'], error) from error
      self._committed(manifest)

  def _committed(self, manifest: dict) -> None:
    """Notes a step that is on the disk and removes superfluous ones."""
    self._sound = manifest['step'], manifest['leaves']
    self._broken.discard(manifest['step'])
    latest, best = self._keep
    try:
      if processes.is_main():
        steps = self._steps()
        kept = {*steps[-latest:], *self._ranked()[:best]}
        self._remove({*steps, *self._broken} - kept)
    except (OSError, UserError) as error:
      _log.warning('Could not remove an old checkpoint: %s', error)

  def _failed(self, step: int, error: Exception) -> UserError:
    """Cleans up after a failed save and returns the error to raise."""
    time.sleep(_AFTERMATH)
    if processes.is_main():
      self._remove()
    return UserError(
      f'Saving checkpoint step {step} in {self.folder} failed:\n'
      f'{orbax_io.one_line(error)}\n'
      f'Steps kept: {self._steps()}.  Make room or fix the disk, then resume.'
    )

  def steps(self) -> list[int]:
    """Returns the committed steps, ascending, without those skipped before."""
    return processes.on_main(self._steps, 'the checkpoints')

  def best_step(self) -> int | None:
    """Returns the step of highest metric, the latest of ties, or None."""
    ranked = processes.on_main(self._ranked, 'the best checkpoint')
    return ranked[0] if ranked else None

  def restore(self, template, step: int | None = None, *, part: bool = False):
    """Restores the newest step that verifies.

    A step that does not is skipped with a warning that gives the reason, and
    removed once a later save is complete.

    Args:
      template: the state's tree, of arrays or `jax.ShapeDtypeStruct`s in their
        shardings (if any), or a function from the step to it.
      step: restores only this step, for evaluation and export.
      part: the template is a part of the state, in dictionaries by name; the
        rest is neither read nor verified.

    Returns:
      `(step, state, metadata)`, or None where there is no checkpoint.

    Raises:
      UserError: none verifies; a healthy one holds another tree, shape or dtype
        than the template; or one cannot be read just now.
    """
    self.wait()
    steps, failures = self.steps(), {}
    if step is not None:
      if step not in steps:
        raise UserError(
          f'There is no checkpoint step {step} in {self.folder}.\n'
          f'Choose one of {steps}.'
        )
      steps = [step]
    for step in reversed(steps):
      try:
        state, manifest = self._load(step, template, part)
        break
      except _BrokenError as error:
        failures[step] = f'step {step} does not verify ({error})'
    else:
      if not failures:
        return None
      raise UserError(
        f'No checkpoint in {self.folder} verifies.\n'
        f'{"; ".join(failures.values())}.\n'
        'Restore the folder from a copy, or start afresh in another one.'
      )
    for reason in failures.values() if processes.is_main() else ():
      _log.warning('Checkpoint %s; using step %d.', reason, step)
    self._broken.update(failures)
    if not part:
      self._sound = step, manifest['leaves']
    return step, state, manifest['metadata']

  def _load(self, step: int, template, part: bool) -> tuple:
    """Returns the state and the manifest of a step that verifies."""
    manifest = self._in_all(step, 'manifest', self._manifest, step)
    # A network file system may show other processes an older one.
    manifest = processes.gather_objects(manifest, 'the manifest')[0]
    template = template(step) if callable(template) else template
    stored, wanted = manifest['leaves'], named_leaves(template)
    if part:
      stored = {name: stored[name] for name in stored if name in wanted}
    if problems := differences(stored, wanted):
      more = f' (2 of {len(problems)})' if len(problems) > 2 else ''
      raise UserError(
        f'Checkpoint step {step} in {self.folder} is of another configuration.'
        f'\n{"; ".join(problems[:2])}{more}.\n'
        'Use the configuration it was saved with, or another folder.'
      )
    source = self._path(step), template, part
    state = self._in_all(step, 'state', orbax_io.load_state, *source)
    loaded = self._in_all(step, 'state', describe, named_leaves(state))
    for name, leaf in stored.items():
      if loaded.get(name) != leaf:
        raise _BrokenError(f'the content of {name} has changed')
    return state, manifest

  def _in_all(self, step: int, part: str, read, *arguments):
    """Reads a part in every process; if one of them cannot, raises in all."""
    result = failure = None
    try:
      result = read(*arguments)
    except Exception as error:
      failure = orbax_io.may_pass(error), orbax_io.one_line(error)
    failures = processes.gather_objects(failure, f'checkpoint {step}')
    # What may pass comes first: the step need not be damaged.
    for passing, text in sorted(filter(None, failures), reverse=True):
      if not passing:
        raise _BrokenError(f'its {part}: {text}')
      raise UserError(
        f'Checkpoint step {step} in {self.folder} could not be read:\n{text}\n'
        'It is unchanged.  Free memory, or fix permissions or the disk.'
      )
    return result

  def _manifest(self, step: int) -> dict:
    manifest = orbax_io.load_manifest(self._path(step))
    same = manifest.pop('sha256') == _sha256(manifest)
    if not same or manifest['step'] != step:
      raise ValueError('it has changed')
    return manifest

  def _path(self, step: int) -> pathlib.Path:
    return self.folder / f'{step:08d}'

  def _paths(self, pattern: str) -> list[pathlib.Path]:
    try:
      paths = self.folder.iterdir() if self.folder.is_dir() else ()
      return sorted(path for path in paths if re.fullmatch(pattern, path.name))
    except OSError as error:
      raise UserError(f'The checkpoints cannot be listed: {error}.') from error

  def _steps(self) -> list[int]:
    steps = {int(path.name) for path in self._paths(r'\d{8,}')}
    return sorted(steps - self._broken)

  def _ranked(self) -> list[int]:
    """Returns the steps that have a metric, best first."""
    pairs = []
    for step in self._steps():
      try:
        metric = self._manifest(step)['metric']
      except Exception as error:
        if orbax_io.may_pass(error):
          raise UserError(f'Step {step} cannot be read: {error}') from error
        continue
      # A NaN is not a metric: it must never count as the best.
      if metric is not None and metric == metric:
        pairs.append((metric, step))
    return [step for _, step in sorted(pairs, reverse=True)]

  def _remove(self, steps=()) -> None:
    """Removes steps, and what interrupted saves and removals have left.

    A crash halfway leaves no step in part; what cannot be removed takes room.
    """
    for path in filter(pathlib.Path.exists, map(self._path, steps)):
      name = f'{path.name}.orbax-checkpoint-tmp-{time.time_ns()}'
      path.rename(path.with_name(name))
    for path in self._paths(_DEAD):
      try:
        shutil.rmtree(path)
      except OSError as error:
        _log.warning('Could not remove %s: %s', path, error)


def _sha256(manifest) -> str:
  text = json.dumps(manifest, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()
