"""Verified checkpoints: Orbax v1 with a digest per leaf.

Orbax commits a step atomically, so a crash never leaves half of one; but a bit
that flips in its files afterwards is restored silently.  Here every step
carries a manifest (shape, dtype and digest of each leaf, and the caller's
metadata), every restore is checked against it, and a step that fails is
skipped in favour of the one before.

    folder/00000120/state/      the arrays, an Orbax checkpoint of its own
    folder/00000120/manifest/   JSON, committed together with them
    folder/00000140.broken/     and others: see `leftovers`

Several processes make the same calls in the same order, on a shared folder.
Each writes and reads its shards; only process 0 decides which steps exist, and
names, renames and removes them.
"""

import concurrent.futures
import functools
import hashlib
import json
import logging
import pathlib
import time

from jaxrl_llm import processes
from jaxrl_llm.atomic import as_json, sync_folder, sync_tree
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import leftovers, orbax_io
from jaxrl_llm.runs.checkpoint_errors import BrokenError, obstacle, one_line
from jaxrl_llm.runs.digests import describe, differences, named_leaves

_log = logging.getLogger(__name__)
# Seconds in which other threads may still create folders of a failed save.
_AFTERMATH = 1.0


class Checkpoints:
  """The steps of one run, in a folder of a local or network file system.

  Saves are asynchronous, one at a time.  The latest `keep_latest` committed
  steps are kept, and the `keep_best` with the highest metric.

  Args:
    folder: holds the steps; created by the first save, in an existing folder.
    keep_latest: number of the newest steps to keep, at least 1.
    keep_best: number of the steps with the highest metric to keep.
    read_only: changes nothing in the folder, as another process may be writing.
      Otherwise the leftovers of crashed saves are removed at once.
  """

  def __init__(
    self,
    folder,
    keep_latest: int = 2,
    keep_best: int = 1,
    *,
    read_only: bool = False,
  ):
    if keep_latest < 1 or keep_best < 0:
      raise UserError(
        f'Cannot keep {keep_latest} latest and {keep_best} best checkpoints.\n'
        'Keep at least 1 of the latest, and 0 or more of the best.'
      )
    self.folder = pathlib.Path(folder).absolute()
    self._keep_latest = keep_latest
    self._keep_best = keep_best
    self._read_only = read_only
    self._pending = None  # (manifest, future of the running save)
    self._metrics = {}  # step -> metric or None, of the steps seen so far
    self._unclean = False  # whether a save has failed
    self._sound = {}  # step -> the sha256 of a manifest that verified
    self._waiter = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    if not read_only:
      processes.on_main(
        functools.partial(leftovers.clean, self.folder), 'leftovers of saves'
      )

  def save(
    self, step: int, state, metadata: dict, metric: float | None = None
  ) -> None:
    """Starts to save a step, after waiting for the save before it.

    Returns once the arrays are copied or held, so that the caller may donate
    them to the next update.  An existing checkpoint of the same step is
    replaced, unless it is identical; it is removed once the new one is
    complete.

    Args:
      step: the counter that names the checkpoint, 0 or more.
      state: one tree of arrays: parameters, optimiser, PRNG keys, counters.
      metadata: JSON values (tuples come back as lists).
      metric: decides which checkpoints are the best; higher is better.

    Raises:
      UserError: this save or the one before it failed (a full disk, say), or
        the state or the metadata holds something that cannot be saved.
    """
    if self._read_only:
      raise UserError(
        f'The checkpoints in {self.folder} are read-only here.\n'
        'Save through the run that owns them.'
      )
    if step < 0:
      raise ValueError(f'A checkpoint step is 0 or more, not {step}.')
    self.wait()
    leaves = named_leaves(state)
    manifest = {
      'step': int(step),
      'metric': None if metric is None else float(metric),
      'metadata': as_json(metadata, 'checkpoint metadata', allow_nan=True),
      'leaves': describe(leaves),
    }
    manifest['sha256'] = _sha256(manifest)
    self._check_same(manifest)
    present, manifest['sha256'] = processes.on_main(
      functools.partial(self._prepare, manifest), f'checkpoint {step}'
    )
    if present:
      return
    try:
      response = orbax_io.start_save(self._path(step), state, manifest)
    except Exception as error:
      raise self._failed(step, error) from error
    finished = self._waiter.submit(self._finish, step, response)
    self._pending = manifest, finished

  def _finish(self, step: int, response) -> None:
    """Waits until a step is on the disk, in a thread of its own."""
    response.result()
    if processes.is_main():
      # Orbax has synced the arrays alone.  The step before is removed after
      # this, and a power cut must not take both.
      sync_tree(self._path(step))
      sync_folder(self.folder)
      sync_folder(self.folder.parent)

  def _prepare(self, manifest: dict) -> tuple[bool, str]:
    """Makes room for a step, unless it already exists unchanged."""
    step, sha256 = manifest['step'], manifest['sha256']
    path = self._path(step)
    if path.exists() and self._sound.get(step) == sha256:
      return True, sha256
    try:
      self.folder.mkdir(exist_ok=True)
      leftovers.move_aside(path, leftovers.REPLACED)
    except OSError as error:
      raise self._failed(step, error) from error
    return False, sha256

  def _check_same(self, manifest: dict) -> None:
    """Raises UserError if the processes have computed different states."""
    local = _sha256(manifest['leaves'])
    digests = processes.gather_objects(local, 'the digests of a checkpoint')
    other = [i for i, digest in enumerate(digests) if digest != digests[0]]
    if other:
      raise UserError(
        f'At step {manifest["step"]} process {other[0]} would save a different '
        'state than process 0.\n'
        'Start all processes with the same program, flags and data.'
      )

  def poll(self) -> None:
    """Finishes the running save as `wait` does, if it has ended.

    Called once per step, it reports a failed save within a step.
    """
    if self._pending is None:
      return
    if not processes.agree(not self._pending[1].done(), 'a running save'):
      self.wait()

  def wait(self) -> None:
    """Waits for the running save, then removes steps that need not be kept.

    Raises:
      UserError: the save failed.  The steps before it are untouched.
    """
    if self._pending is None:
      return
    (manifest, response), self._pending = self._pending, None
    step = manifest['step']
    try:
      response.result()
    except Exception as error:
      raise self._failed(step, error) from error
    self._metrics[step] = manifest['metric']
    self._sound[step] = manifest['sha256']
    try:
      if processes.is_main():
        leftovers.discard(self._replaced(step))
        self._prune(step)
    except (OSError, UserError) as error:
      _log.warning('Could not remove an old checkpoint: %s', one_line(error))

  def close(self) -> None:
    """Waits for the running save."""
    try:
      self.wait()
    finally:
      self._waiter.shutdown()
      if self._unclean:
        time.sleep(_AFTERMATH)
        self._free()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def steps(self) -> list[int]:
    """Returns the committed steps, ascending.  Some may not verify."""
    return processes.on_main(
      functools.partial(leftovers.steps, self.folder), 'the checkpoints'
    )

  def best_step(self) -> int | None:
    """Returns the step of highest metric, the latest of ties, or None."""
    ranked = processes.on_main(self._ranked, 'the best checkpoint')
    return ranked[0] if ranked else None

  def restore(self, template, step: int | None = None, *, part: bool = False):
    """Restores the newest step that verifies.

    A step that does not verify is skipped with a warning that gives the reason,
    and (unless read only) renamed, so that a later save may use its number.

    Args:
      template: the state's tree, of arrays or `jax.ShapeDtypeStruct`s; or a
        function from the step to it, where steps differ.  Leaves are placed in
        their shardings; a leaf without one on the default device.
      step: restores only this step, for evaluation and export.
      part: the template is a part of the state, in dictionaries by name; the
        rest is neither read nor verified.

    Returns:
      `(step, state, metadata)`, or None where there is no checkpoint.

    Raises:
      UserError: checkpoints exist but none verifies; a healthy one holds
        another tree, shape or dtype than the template; or one is unreadable for
        lack of memory, permission or a working disk.
    """
    self.wait()
    steps = self.steps()
    if step is not None:
      if step not in steps:
        raise UserError(
          f'There is no checkpoint step {step} in {self.folder}.\n'
          f'Choose one of {steps}.'
        )
      steps = [step]
    failures = []
    for candidate in reversed(steps):
      try:
        wanted = template(candidate) if callable(template) else template
        state, manifest = self._load(candidate, wanted, part)
      except BrokenError as error:
        failures.append((candidate, str(error)))
        continue
      for bad, why in failures if processes.is_main() else ():
        _log.warning(
          'Checkpoint step %d does not verify (%s); using step %d.',
          *(bad, why, candidate),
        )
        self._set_aside(bad)
      self._metrics[candidate] = manifest['metric']
      self._sound[candidate] = _sha256(manifest)
      return candidate, state, manifest['metadata']
    if failures:
      reasons = '; '.join(f'step {bad}: {why}' for bad, why in failures)
      raise UserError(
        f'No checkpoint in {self.folder} verifies.\n{reasons}.\n'
        'Restore the folder from a copy, or start afresh in another one.'
      )
    return None

  def is_of(self, step: int, state) -> bool:
    """Returns True if a step was saved from this very state, by its digests.

    Only the manifest need verify, not the arrays.
    """
    manifest, _ = processes.on_main(
      functools.partial(self._manifest_or_why, step), f'checkpoint {step}'
    )
    leaves = describe(named_leaves(state))
    return manifest is not None and manifest['leaves'] == leaves

  def _set_aside(self, step):
    if not self._read_only:
      try:
        leftovers.move_aside(self._path(step), leftovers.BROKEN)
      except OSError as error:
        # A later save of this step replaces it.
        _log.warning('Could not rename it: %s', one_line(error))

  def _load(self, step, template, part):
    manifest, why = processes.on_main(
      functools.partial(self._manifest_or_why, step), f'checkpoint {step}'
    )
    if why is not None:
      raise BrokenError(why)
    stored, wanted = manifest['leaves'], named_leaves(template)
    if part:
      stored = {name: stored[name] for name in stored if name in wanted}
    self._compare(step, stored, wanted)
    state, failure = None, None
    try:
      state = orbax_io.load_state(self._stored(step), template, part)
    except Exception as error:
      failure = self._failure(step, 'state', error)
      failure.__cause__ = error
    self._agree_on(failure, step)
    try:
      loaded = describe(named_leaves(state))
    except Exception as error:
      raise self._failure(step, 'state', error) from error
    for name, leaf in stored.items():
      if loaded.get(name) != leaf:
        raise BrokenError(f'the content of {name} has changed')
    return state, manifest

  def _agree_on(self, failure: Exception | None, step: int) -> None:
    """Raises in all processes if one of them could not read its part."""
    why = isinstance(failure, BrokenError), failure and str(failure)
    reasons = processes.gather_objects(why, f'checkpoint {step}')
    if failure is not None:
      raise failure
    for broken, text in reasons:
      if text is not None:
        raise BrokenError(text) if broken else UserError(text)

  def _manifest_or_why(self, step: int) -> tuple:
    """Returns (manifest, None), or (None, why the step is broken)."""
    try:
      return self._manifest(step), None
    except BrokenError as error:
      return None, str(error)

  def _manifest(self, step):
    try:
      manifest = orbax_io.load_manifest(self._stored(step))
      expected = manifest.pop('sha256')
      if expected != _sha256(manifest) or manifest['step'] != step:
        raise BrokenError('its manifest has changed')
    except BrokenError:
      raise
    except Exception as error:
      raise self._failure(step, 'manifest', error) from error
    return manifest

  def _failure(self, step, part, error):
    """Returns the error to raise where a part of a step could not be loaded."""
    cause = obstacle(error)
    if cause is None:
      return BrokenError(f'its {part}: {one_line(error)}')
    return UserError(
      f'Checkpoint step {step} in {self.folder} could not be read:\n'
      f'{one_line(cause)}\n'
      'It is unchanged.  Free memory, or fix permissions or the disk.'
    )

  def _compare(self, step, stored, wanted):
    """Raises UserError if the stored leaves are not those of the template."""
    problems = differences(stored, wanted)
    if problems:
      more = len(problems) - 2
      raise UserError(
        f'Checkpoint step {step} in {self.folder} is of another configuration.'
        f'\n{"; ".join(problems[:2])}'
        f'{f"; and {more} more differences" if more > 0 else ""}.\n'
        'Use the configuration it was saved with, or another folder.'
      )

  def _path(self, step):
    return self.folder / f'{step:08d}'

  def _replaced(self, step):
    return self.folder / f'{step:08d}{leftovers.REPLACED}'

  def _stored(self, step):
    """Returns the folder of a step, or of its old content during a new save."""
    path, replaced = self._path(step), self._replaced(step)
    return replaced if replaced.exists() and not path.exists() else path

  def _ranked(self):
    """Returns the steps that have a metric, best first."""
    for step in leftovers.steps(self.folder):
      if step not in self._metrics:
        try:
          self._metrics[step] = self._manifest(step)['metric']
        except BrokenError:
          self._metrics[step] = None
    known = [
      (self._metrics[step], step) for step in leftovers.steps(self.folder)
    ]
    # A NaN is not a metric: it must never count as the best.
    known = [
      pair for pair in known if pair[0] is not None and pair[0] == pair[0]
    ]
    return [step for _, step in sorted(known, reverse=True)]

  def _prune(self, saved):
    kept = set(leftovers.steps(self.folder)[-self._keep_latest :])
    kept.update(self._ranked()[: self._keep_best])
    for step in set(leftovers.steps(self.folder)) - kept:
      leftovers.discard(self._path(step))
      leftovers.discard(self._replaced(step))
    # The run has passed the point where these broke: they only take room.
    leftovers.discard_broken(self.folder, saved)

  def _free(self):
    """Removes what a failed save has written."""
    if processes.is_main():
      try:
        leftovers.clean(self.folder)
      except (OSError, UserError) as error:
        _log.warning('Could not remove a failed save: %s', one_line(error))

  def _failed(self, step, error):
    """Cleans up after a failed save and returns the error to raise."""
    self._unclean = True
    self._free()
    kept = leftovers.steps(self.folder)
    return UserError(
      f'Saving checkpoint step {step} in {self.folder} failed:\n'
      f'{one_line(error)}\n'
      f'Steps kept: {kept}.  Make room or fix the disk, then resume.'
    )


def _sha256(manifest):
  text = json.dumps(manifest, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()
