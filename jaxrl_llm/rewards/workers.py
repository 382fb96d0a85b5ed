"""Reward functions in worker processes that can be killed.

Math parsers hang in C code, and generated programs do anything.  A time-out by
signal fails in threads, and a pool's `future.result(timeout)` does not free the
worker.  So each process scores one sample at a time, and one that does not
answer is killed with all that it started (see `containment`); a new process
replaces it while the others continue.
"""

import functools
import json
import math
import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import containment as containment_lib
from jaxrl_llm.rewards import interruptible, learned
from jaxrl_llm.rewards.calling import select_arguments, shortened
from jaxrl_llm.rewards.pool import Job, Pool
from jaxrl_llm.rewards.worker_process import Reply

# Bytes.  The interpreter alone takes 10 MB.
_LEAST_MEMORY = 1 << 26

# Reasons for a missing score.
FAILURES = ('timeout', 'crash', 'error', 'memory')


class Failures(NamedTuple):
  """Samples of a batch without a score because scoring them failed.

  Attributes:
    counts: number of samples by kind, for all of `FAILURES`.
    messages: for each kind that occurred, its first sample's: the cause, the
      sample's index, and its completion.
  """

  counts: dict[str, int]
  messages: dict[str, str]

  @property
  def total(self) -> int:
    """Total number of failures, of all kinds."""
    return sum(self.counts.values())


class Workers:
  """A reward function that runs in its own processes, sample by sample.

    with Workers('mine.py:verify', workers=4, timeout=2.0) as workers:
      pending = workers.submit(prompts, completions, {'answer': answers})
      ...  # The device computes meanwhile.
      scores = pending.result()

  It is itself a reward function, `workers(prompts=, completions=, **columns)`,
  and fits a `RewardPart`.

  Every sample is a separate call with lists of length 1: a function that
  compares samples with each other cannot run in this way.  A process serves one
  sample after another, so the function's state (caches, an open program)
  persists, and a sample that breaks it may break later ones in the same
  process.  A process that crashes or runs out of memory after it has served
  other samples is therefore replaced and the sample tried once more.

  A sample has no score if it is not answered within `timeout` seconds, crashes
  its process, asks for more memory, raises an exception or returns anything but
  a finite number: None, counted by kind in `Pending.failures`.  So h samples
  that hang delay a batch by ⌈h / workers⌉ time-outs.  Scores that depend on a
  time-out are not reproducible.

  Printed output is discarded.  This is not a sandbox: the function keeps full
  access to files and network.  It sees the environment variables that locate
  files and devices, and those listed in `environment`.  Processes survive
  Ctrl-C and end with `close`, when the last reference is gone, and when this
  process ends for any reason.

  Args:
    name: a function or factory of `rewards.functions` or `.code`,
      'file.py:function', or 'module:function'.  Loaded only in the workers.
    settings: arguments of a factory, JSON values.
    workers: number of processes.
    timeout: seconds of wall time per sample, from when a process takes it.
    memory: bytes that a process may write to, including the interpreter's 10 MB
      and libraries.  Processes that the function starts may use as much each.
    containment: a kind of `containment.KINDS`; the strongest by default.
    environment: names of further variables that the function reads, such as
      ('OPENAI_API_KEY',).
    load_timeout: seconds allowed for loading the function.
    field: prefix of messages about name and settings.

  Attributes:
    name: as given.
    parameters: those of the function.
    containment: the kind in use.
    memory_limited: whether the system enforces `memory`; macOS does not.

  Raises:
    UserError: the function cannot be loaded, or an argument is invalid.
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
    # The first process has found out what works here.
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
    """Starts scoring N responses and returns at once.

    Args:
      prompts, completions: N strings each.
      columns: N JSON values each; columns that the function does not name are
        not sent.

    Raises:
      UserError: a required column is missing, a column holds values that JSON
        cannot express, or the workers are closed.
    """
    arguments = {'prompts': prompts, 'completions': completions, **columns}
    arguments = select_arguments(self.name, self.parameters, arguments)
    samples = _encode_each(self.name, arguments, len(completions))
    pending = Pending(self.name, completions, self._pool)
    self._pool.put(
      [
        Job(functools.partial(pending.settle, index), arguments)
        for index, arguments in enumerate(samples)
      ]
    )
    return pending

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str], **columns
  ) -> list[float | None]:
    """Scores N responses; raises as `submit` and `Pending.result` do."""
    return self.submit(prompts, completions, columns).result()

  def close(self) -> None:
    """Ends the processes.  Pending scores then raise UserError."""
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
  """Creates a reward function in worker processes; see `Workers`.

    RewardPart('correct', isolated('gsm8k_answer', workers=4, timeout=2.0))

  Args:
    name: a function or factory.
    workers: number of processes.
    timeout: seconds per sample.
    memory: bytes per process.
    environment: names of further variables that the function reads.
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
  """Scores that workers have not yet delivered."""

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
    """Records the outcome of a sample; the workers call it once for each."""
    with self._lock:
      self._replies[index] = reply
      self._left -= 1
      if not self._left:
        self._done.set()

  def done(self) -> bool:
    """Returns True if `result` would return, or raise, at once."""
    return self._done.is_set()

  def result(self) -> list[float | None]:
    """Waits for the N scores; None where there is none.

    A check set by `interruptible.checked` may end the wait.  The samples stay
    with the workers.

    Raises:
      UserError: the function raised one; or every sample failed with an error
        before there was any score, so the function is at fault and not the
        responses; or the workers were closed or cannot be restarted, or the
        function's file changed before a restart.
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
    """Waits for all samples; returns the number and causes of failures."""
    interruptible.wait(self._done.wait)
    counts, messages = dict.fromkeys(FAILURES, 0), {}
    for index, reply in enumerate(self._replies):
      kind = getattr(reply, 'kind', None)
      if kind not in counts:
        continue
      counts[kind] += 1
      completion = shortened(self._completions[index])
      message = f'{reply.message} (sample {index}, completion {completion!r})'
      messages.setdefault(kind, message)
    return Failures(counts, messages)


def merge_failures(
  batches: Iterable[Mapping[str, Failures]],
) -> dict[str, Failures]:
  """Merges the failures of several batches, by the name of the reward.

  The first message of each kind is kept; it numbers samples within its batch.
  """
  merged: dict[str, Failures] = {}
  for batch in batches:
    for name, (counts, messages) in batch.items():
      before = merged.get(name, Failures(dict.fromkeys(FAILURES, 0), {}))
      merged[name] = Failures(
        {kind: before.counts[kind] + counts[kind] for kind in FAILURES},
        messages | before.messages,
      )
  return merged


def _encode_each(
  name: str, arguments: Mapping[str, Sequence[Any]], count: int
) -> list[bytes]:
  """Encodes the arguments of `count` calls, one sample each, as JSON objects.

  Args:
    name: the function's name, for the message.
    arguments: `count` values each.
    count: number of completions.

  Raises:
    UserError: the number of values is not `count`, or one is not a JSON value.
  """
  for column, values in arguments.items():
    if len(values) != count:
      raise UserError(
        f'there are {count} completions to score but {len(values)} entries in '
        f'{column!r}.'
      )
    for i, value in enumerate(values):
      if not _is_json(value):
        raise UserError(
          f'the column {column!r} holds a {type(value).__name__} at sample {i}.'
          f'\n{name!r} runs in worker processes, which take JSON values: text, '
          'numbers,\nbooleans, None, lists, and dictionaries with string keys.'
        )
  return [
    json.dumps({key: [values[i]] for key, values in arguments.items()}).encode()
    for i in range(count)
  ]


def _is_json(value: Any) -> bool:
  """Returns True if JSON preserves the value: not a tuple, not an array."""
  kind = type(value)
  if kind is list:
    return all(map(_is_json, value))
  if kind is dict:
    return all(type(key) is str for key in value) and all(
      map(_is_json, value.values())
    )
  return value is None or kind in (str, int, float, bool)


def _check(spec: Mapping[str, Any], workers: int) -> None:
  """Raises UserError for an invalid argument."""

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
    # The value is not shown: it may be the secret itself.
    raise UserError(
      f'{field}: environment must list names of variables that are set\n'
      "export them in the shell and write environment=('OPENAI_API_KEY',)"
    )
  kinds = containment_lib.KINDS
  if spec['containment'] not in (None, *kinds):
    raise UserError(
      f'{field}: containment is {spec["containment"]!r}\n'
      f'choose one of {", ".join(kinds)}'
    )
  for key, value in spec['settings'].items():
    if not _is_json(value):
      raise UserError(
        f'{field}: {key} is {value!r}, which is not a JSON value\n'
        'it is sent to worker processes; write a list for a tuple'
      )
