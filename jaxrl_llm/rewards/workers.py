"""Reward functions in worker processes that can be killed.

Math parsers hang in C code and generated programs do what they like.  A
time-out by signal fails in threads, and a pool's `future.result(timeout)` does
not free the worker.  So a process scores one sample at a time, and what does
not answer is killed with all it has started (`containment` says how, and what
is left where); a new process takes its place while the others go on.
"""

import functools
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import containment as containment_lib
from jaxrl_llm.rewards import interruptible, learned
from jaxrl_llm.rewards.arguments import encode_each, is_json, select
from jaxrl_llm.rewards.failures import FAILURES, Failures
from jaxrl_llm.rewards.pool import Job, Pool
from jaxrl_llm.rewards.results import shortened
from jaxrl_llm.rewards.worker_process import Reply

# Bytes.  The interpreter alone takes 10 MB.
_LEAST_MEMORY = 1 << 26


class Workers:
  """A reward function that runs in processes of its own, sample by sample.

    with Workers('mine.py:verify', workers=4, timeout=2.0) as workers:
      pending = workers.submit(prompts, completions, {'answer': answers})
      ...  # The device computes meanwhile.
      scores = pending.result()

  It is itself a reward function, `workers(prompts=, completions=, **columns)`,
  and fits a `RewardPart`.

  Every sample is a call of its own with lists of length 1.  A function that
  compares samples with each other cannot be run in this way.  A process serves
  one sample after another, so that what the function keeps (caches, an open
  program) stays, and what a sample breaks may break later ones in the same
  process; a process that crashes or runs out of memory at a sample after it has
  served others is therefore replaced and the sample tried once more.

  A sample without an answer after `timeout` seconds has no score, and neither
  has one that crashes its process, asks for more memory, raises an exception or
  returns anything but a finite number: None, counted by kind in
  `Pending.failures`.  So h samples that hang delay a batch by ⌈h / workers⌉
  time-outs.  Scores that depend on a time-out are not reproducible.

  What the function prints is discarded.  Its process has the user's files and
  network: it is killable, not a sandbox.  It has the environment variables that
  find files and devices, and those that `environment` names.  Processes survive
  Ctrl-C and end with `close`, when the last reference is gone, and when this
  process ends, however it does.

  Args:
    name: of a function or a factory of `rewards.functions` or `.code`, or
      'file.py:function', or 'module:function'.  Loaded in the workers alone.
    settings: arguments of a factory, JSON values.
    workers: number of processes.
    timeout: seconds of wall time per sample, from when a process takes it.
    memory: bytes of its own that a process may write to, the interpreter's
      10 MB and what libraries take included.  Processes that the function
      starts may have as many each.
    containment: a kind of `containment.KINDS`; the strongest by default.
    environment: names of variables that the function reads besides, such as
      ('OPENAI_API_KEY',).
    load_timeout: seconds that a process may take to load the function.
    field: what messages about name and settings begin with.

  Attributes:
    name: as given.
    parameters: what the function takes.
    containment: the kind that is in use.
    memory_limited: whether the system enforces `memory`; macOS does not.

  Raises:
    UserError: the function cannot be loaded, or an argument makes no sense.
  """

  def __init__(
    self,
    name: str,
    settings: Mapping[str, Any] | None = None,
    *,
    workers: int = 2,
    timeout: float = 5.0,
    memory: int = 2 << 30,
    containment: str | None = None,
    environment: Sequence[str] = (),
    load_timeout: float = 120.0,
    field: str | None = None,
  ):
    self.name = name
    spec = {
      'name': name,
      'settings': dict(settings or {}),
      'field': field or f'reward {name!r}',
      'containment': containment,
      'memory': memory,
      'timeout': timeout,
      'environment': environment,
    }
    _check(spec, workers)
    self._pool = Pool(spec, load_timeout)
    self._finalizer = weakref.finalize(self, self._pool.close)
    first, ready = self._pool.launch()
    self.parameters = ready.parameters
    self.memory_limited = ready.memory_limited
    # The others need not find out again what works here.
    self.containment = spec['containment'] = ready.containment
    self._pool.serve(first)
    for _ in range(workers - 1):
      self._pool.serve(None)

  def submit(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
  ) -> 'Pending':
    """Begins to score N responses and returns at once.

    Args:
      prompts, completions: N strings each.
      columns: N JSON values each; those that the function does not name are
        not sent.

    Raises:
      UserError: the function needs a column that there is not, or one holds
        what JSON has no form for, or the workers are closed.
    """
    given = {'prompts': prompts, 'completions': completions, **columns}
    given = select(self.name, self.parameters, given)
    samples = encode_each(self.name, given, len(completions))
    pending = Pending(self.name, completions, self._pool)
    self._pool.put(
      [
        Job(functools.partial(pending.settle, index), given)
        for index, given in enumerate(samples)
      ]
    )
    return pending

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], **columns
  ) -> list[float | None]:
    """Scores N responses; raises as `submit` and `Pending.result` do."""
    return self.submit(prompts, completions, columns).result()

  def close(self) -> None:
    """Ends the processes.  What is pending then raises UserError."""
    self._finalizer()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


def isolated(
  name: str,
  workers: int = 2,
  timeout: float = 5.0,
  memory: int = 2 << 30,
  environment: Sequence[str] = (),
  **settings: Any,
) -> Workers:
  """A reward function in worker processes, as `Workers` describes them.

    RewardPart('correct', isolated('gsm8k_answer', workers=4, timeout=2.0))

  Args:
    name: of a function or factory.
    workers: number of processes.
    timeout: seconds per sample.
    memory: bytes per process.
    environment: names of variables that the function reads besides.
    **settings: arguments of a factory.
  """
  return Workers(
    name,
    settings,
    workers=workers,
    timeout=timeout,
    memory=memory,
    environment=environment,
  )


class Pending:
  """Scores that workers are about to find."""

  def __init__(self, name: str, completions: Sequence[str], pool: Pool):
    self._name = name
    self._completions = list(completions)
    self._pool = pool
    self._replies = [None] * len(completions)
    self._left = len(completions)
    self._lock = threading.Lock()
    self._done = threading.Event()
    if not self._left:
      self._done.set()

  def settle(self, index: int, reply: Reply | Exception) -> None:
    """Notes what came of a sample; for the workers to call, once for each."""
    with self._lock:
      self._replies[index] = reply
      self._left -= 1
      if not self._left:
        self._done.set()

  def done(self) -> bool:
    """Whether `result` would return, or raise, at once."""
    return self._done.is_set()

  def result(self) -> list[float | None]:
    """Waits for the N scores; None where there is none.

    What `interruptible.checked` was given may end the wait.  The samples stay
    with the workers.

    Raises:
      UserError: the function raised one; or every sample failed with an error
        before there was any score, so that the function is at fault and not
        the responses; or the workers were closed, or cannot be started any
        more, or the function's file has changed when one was replaced.
    """
    interruptible.wait(self._done.wait)
    for index, reply in enumerate(self._replies):
      if isinstance(reply, Exception):
        raise reply
      if reply.kind == 'user':
        raise UserError(
          f'reward {self._name!r}, given sample {index} alone: {reply.message}'
        )
    failures, count = self.failures(), len(self._replies)
    if not self._pool.worked and 0 < failures.counts['error'] == count:
      raise UserError(
        f'reward {self._name!r} fails on every sample of the first batch:\n'
        f'{failures.messages["error"]}'
      )
    return [reply.score for reply in self._replies]

  def failures(self) -> Failures:
    """Waits, and tells how many samples failed, and why."""
    interruptible.wait(self._done.wait)
    counts, messages = dict.fromkeys(FAILURES, 0), {}
    for index, reply in enumerate(self._replies):
      kind = getattr(reply, 'kind', None)
      if kind not in counts:
        continue
      counts[kind] += 1
      completion = shortened(self._completions[index])
      found = f'{reply.message} (sample {index}, completion {completion!r})'
      messages.setdefault(kind, found)
    return Failures(counts, messages)


def _check(spec: Mapping[str, Any], workers: int) -> None:
  """Raises UserError for an argument that makes no sense."""

  def is_number(value, kinds):
    return isinstance(value, kinds) and not isinstance(value, bool)

  field, timeout, memory = spec['field'], spec['timeout'], spec['memory']
  if not is_number(workers, int) or workers < 1:
    raise UserError(f'{field}: workers is {workers!r}, not a positive integer')
  if not is_number(timeout, (int, float)) or not 0 < timeout < math.inf:
    raise UserError(f'{field}: timeout is {timeout!r}, not a number of seconds')
  if not is_number(memory, int) or memory < _LEAST_MEMORY:
    raise UserError(
      f'{field}: memory is {memory!r}\n'
      f'it is a number of bytes, at least {_LEAST_MEMORY}'
    )
  if spec['name'] in learned.__all__:
    raise UserError(
      f"{field}: {spec['name']} computes on this process's devices\n"
      'leave out workers'
    )
  named = spec['environment']
  if not isinstance(named, list | tuple) or not all(
    isinstance(name, str) and name in os.environ for name in named
  ):
    # Not shown: it may be the secret itself.
    raise UserError(
      f'{field}: environment is not a list of names of variables that are set\n'
      "export them in the shell and write environment=('OPENAI_API_KEY',)"
    )
  kinds = containment_lib.KINDS
  if spec['containment'] not in (None, *kinds):
    raise UserError(
      f'{field}: containment is {spec["containment"]!r}\n'
      f'choose one of {", ".join(kinds)}'
    )
  for key, value in spec['settings'].items():
    if not is_json(value):
      raise UserError(
        f'{field}: {key} is {value!r}, which is no JSON value\n'
        'it is sent to worker processes; write a list for a tuple'
      )
