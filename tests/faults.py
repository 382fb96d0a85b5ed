"""Faults at named places of a script: signals, NaN gradients, a full disk."""

import functools
import hashlib
import importlib
import json
import os
import random
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import scripts

# Phase → where the function is that a run is in meanwhile.  Of those in `MADE`
# it is the function that this one returns.
PLACES = {
  'model': ('experiments.build', 'model'),
  'warm start': ('experiments.offline', 'WarmStart.step'),
  'rollout': ('jaxrl_llm.rollouts.responses', '_draw'),
  'branches': ('jaxrl_llm.rollouts.branches', 'branch'),
  'reward': ('jaxrl_llm.rollouts.responses', 'start_scoring'),
  'update': ('jaxrl_llm.training.update', 'make_update'),
  'record': ('jaxrl_llm.runs', 'MetricsWriter.write'),
  'save': ('jaxrl_llm.runs.checkpoints', 'Checkpoints.save'),
  'evaluation': ('experiments.schedule', 'evaluate'),
  'export': ('experiments.stored_runs', 'export'),
}
MADE = ('reward', 'update')

# Longest delays, in seconds: about what the phases of the tiny run take.
LONGEST = {'save': 0.05, 'evaluation': 0.05, 'export': 0.1, 'compile': 0.05}


def interrupt(
  plan, workdir, config, compiled=None, before=None
) -> list[scripts.Ended]:
  """Starts a run again and again, and sends each a signal in a phase.

  Args:
    plan: for each start the signal, the phase, and the records that are
      written before it.
    workdir: of the run.
    config: its file.
    compiled: as of `scripts.train`, but that a start which is to be hit while
      it compiles finds nothing compiled by default.
    before: what each process calls before the fault is set.

  Returns:
    How each of them ended.  That the signal fell into its phase is asserted.
  """
  rng, log = random.Random(0), workdir.with_name('faults.jsonl')
  ends = []
  log.touch()
  for number, phase, after in plan:
    delay = rng.uniform(0, LONGEST.get(phase, 0.01))
    fault = functools.partial(
      strike, number, phase, str(workdir), str(log), after, delay, before
    )
    if phase == 'compile' and compiled is None:
      cache = workdir.with_name('nothing compiled')
    else:
      cache = compiled
    script = scripts.train(workdir, config, compiled=cache, before=fault)
    ends.append(script.wait())
    ends[-1].records = scripts.steps_written(workdir)
    kept = [path.name for path in workdir.glob('checkpoints/*')]
    ends[-1].newest = max(kept, default='')
  said = [json.loads(line) for line in log.read_text().splitlines()]
  hit = [(each['signal'], each['phase'], each['after']) for each in said]
  assert hit == list(plan), ends[-1]
  return ends


def strike(
  number: int, phase: str, workdir, log, after=0, delay=0.0, before=None
) -> None:
  """Sends this process a signal while it is in a phase.

  The log gets a JSON line just before.

  Args:
    number: of the signal.
    phase: of `PLACES`, or 'compile'.
    workdir: of the run.
    log: file to add to.
    after: records that the run has written at least.
    delay: seconds from the beginning of the phase; where that ends earlier, the
      signal comes at its end.  A compilation that ends earlier is left alone.
    before: called first, if any.
  """
  if before is not None:
    before()
  first = threading.Lock()

  def due() -> bool:
    return not first.locked() and scripts.steps_written(workdir) >= after

  def hit(ended: bool) -> None:
    if not first.acquire(blocking=False):
      return
    said = {
      'signal': number,
      'phase': phase,
      'after': after,
      'ended': ended,
      'records': scripts.steps_written(workdir),
    }
    with open(log, 'a') as file:
      file.write(json.dumps(said) + '\n')
    os.kill(os.getpid(), number)

  if phase == 'compile':
    threading.Thread(
      target=_watch_compiling, args=(due, hit, delay), daemon=True
    ).start()
    return

  def around(call, *args, **kwargs):
    if not due():
      return call(*args, **kwargs)
    timer = threading.Timer(delay, hit, [False])
    timer.daemon = True
    timer.start()
    result = jax.block_until_ready(call(*args, **kwargs))
    if phase == 'save':
      args[0].wait()
    hit(True)
    if number == signal.SIGKILL:
      time.sleep(60)  # the timer's hit may be under way
    return result

  _replace(phase, around)


def fill_disk(left: int, phase: str, workdir, after: int = 0) -> None:
  """Fills the file system of a run in a phase; the file is called `ballast`."""
  path = os.path.join(workdir, 'ballast')

  def around(call, *args, **kwargs):
    if scripts.steps_written(workdir) >= after and not os.path.exists(path):
      free = os.statvfs(workdir)
      with open(path, 'wb') as file:
        file.write(bytes(max(free.f_bavail * free.f_bsize - left, 0)))
    return call(*args, **kwargs)

  _replace(phase, around)


def nan_gradients(workdir, where) -> None:
  """Updates whose loss is finite and whose gradient is not."""
  from jaxrl_llm.training import update as update_lib

  make, seen = update_lib.make_update, {}

  def spoilt_update(forward, *args, **kwargs):
    def spoilt_forward(*given):
      outputs = forward(*given)
      return outputs.replace(log_probs=_spoilt(outputs.log_probs))

    sound = make(forward, *args, **kwargs)
    spoilt = make(spoilt_forward, *args, **kwargs)

    def update(*given):
      records = scripts.steps_written(workdir)
      seen[records] = seen.get(records, -1) + 1
      chosen = spoilt if (records, seen[records]) in where else sound
      return chosen(*given)

    return update

  update_lib.make_update = spoilt_update


def tell_restored(path) -> None:
  """Writes the sha256 of each array that the run restores, by its name."""
  from jaxrl_llm.runs.checkpoints import Checkpoints
  from jaxrl_llm.runs.digests import named_leaves

  restore = Checkpoints.restore

  def told(self, *args, **kwargs):
    found = restore(self, *args, **kwargs)
    if found is not None and self.folder.name == 'checkpoints':
      hashes = {
        name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for name, leaf in named_leaves(found[1]).items()
      }
      with open(path, 'w') as file:
        json.dump(hashes, file)
    return found

  Checkpoints.restore = told


@jax.custom_vjp
def _spoilt(x):
  return x


_spoilt.defvjp(
  lambda x: (x, None), lambda _, slope: (jnp.full_like(slope, jnp.nan),)
)


def _replace(phase: str, around) -> None:
  """Calls `around(function, …)` in place of a phase's function."""
  module, path = PLACES[phase]
  *owners, name = path.split('.')
  owner = importlib.import_module(module)
  for each in owners:
    owner = getattr(owner, each)
  function = getattr(owner, name)

  @functools.wraps(function)
  def replacement(*args, **kwargs):
    if phase in MADE:
      return functools.partial(around, function(*args, **kwargs))
    return around(function, *args, **kwargs)

  setattr(owner, name, replacement)


def _watch_compiling(due, hit, delay: float) -> None:
  while True:
    if _compiling() and due():
      time.sleep(delay)
      if _compiling():
        hit(False)
        return
    time.sleep(0.001)


def _compiling() -> bool:
  """Whether the main thread is in XLA's compiler."""
  frame = sys._current_frames().get(threading.main_thread().ident)
  while frame is not None:
    if 'backend_compile' in frame.f_code.co_name:
      return True
    frame = frame.f_back
  return False
