"""One measurement: times, compilation, memory, and the machine's limit.

A benchmark prints one line of JSON, made by `report`:

  benchmark, system: names of the benchmark and of the library.
  seconds: {'median', 'quartiles', 'rounds'} of the timed rounds.
  compile_seconds, compiled: XLA's time, and its number of programs.
  recompiled: programs compiled during the timed rounds; 0 is right.
  peak_bytes, peak_of: the accelerator's peak memory where there is one, else
    the process's largest resident set.
  machine: this machine, and `measured`, its speed in the same process: FLOP/s
    of large matrix products and bytes/s of a triad.
"""

import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_COMPILED = '/jax/core/compile/backend_compile_duration'
# Bytes of a triad's arrays: far larger than caches.
_TRIAD_BYTES = 1 << 28
_SQUARES = (1024, 2048, 4096)


class Roofline(NamedTuple):
  """The machine's greatest speeds.

  Attributes:
    flops: FLOP/s of matrix products.
    bandwidth: bytes/s to and from memory.
  """

  flops: float
  bandwidth: float

  def seconds(self, *phases: tuple[float, float]) -> float:
    """Returns the least time of phases, one after another.

    Args:
      *phases: (FLOPs, bytes) each, which overlap within a phase: it takes as
        long as the slower of the two.

    References:
      Williams et al., `Roofline <https://doi.org/10.1145/1498765.1498785>`_,
      2009
    """
    return sum(
      max(flops / self.flops, size / self.bandwidth) for flops, size in phases
    )


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
  """Returns a call's result, once it is there, and the seconds it took."""
  start = time.perf_counter()
  result = jax.block_until_ready(call())
  return result, time.perf_counter() - start


class Compilations:
  """Counts what XLA compiles, from its creation on.

  It turns the persistent cache off, so that times are those of a first run.
  """

  def __init__(self):
    self._seconds, self._ends = [], []
    jax.config.update('jax_enable_compilation_cache', False)
    jax.monitoring.register_event_duration_secs_listener(self._add)

  def _add(self, event: str, seconds: float, **_) -> None:
    if event == _COMPILED:
      self._seconds.append(seconds)
      self._ends.append(time.perf_counter())

  def found(self) -> dict[str, float]:
    """Returns fields of a report: `compile_seconds` and `compiled`."""
    return {
      'compile_seconds': rounded(sum(self._seconds)),
      'compiled': len(self._ends),
    }

  def between(self, start: float, end: float) -> int:
    """Counts programs compiled between two readings of `time.perf_counter`."""
    return sum(start <= reading <= end for reading in self._ends)


class Rounds(NamedTuple):
  """Times of repeated rounds.

  Attributes:
    seconds: time of each round that counts.
    start, end: bounds of them all, readings of `time.perf_counter`.
  """

  seconds: list[float]
  start: float
  end: float


def repeat(call: Callable[[int], Any], rounds: int) -> Rounds:
  """Times rounds of a call, after a first one, which compiles.

  Args:
    call: takes the round's number, 0 for the first.
    rounds: number of rounds that count.
  """
  times = []
  for number in range(rounds + 1):
    begin = time.perf_counter()
    jax.block_until_ready(call(number))
    end = time.perf_counter()
    times.append(end - begin)
    if not number:
      start = end
  return Rounds(times[1:], start, end)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
  """Returns median, quartiles and number of rounds.

  Args:
    seconds: time of each round, at least one.
  """
  low, median, high = np.percentile(seconds, (25, 50, 75)).tolist()
  return {
    'median': rounded(median),
    'quartiles': [rounded(low), rounded(high)],
    'rounds': len(seconds),
  }


def beside(least: float, seconds: float) -> dict[str, float]:
  """Returns the roofline's seconds and their fraction of the measured ones."""
  return {'seconds': rounded(least), 'fraction': rounded(least / seconds)}


def rounded(number: float) -> float:
  """Rounds to four significant digits."""
  return float(f'{number:.4g}')


def peak_bytes() -> tuple[int, str]:
  """Returns the peak of used memory so far, in bytes, and its owner.

  Returns:
    (bytes, 'device' where the accelerator counts them, else 'process').
  """
  statistics = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in statistics:
    return statistics['peak_bytes_in_use'], 'device'
  unit = 1 if sys.platform == 'darwin' else 1024
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return used * unit, 'process'


def measure_roofline(dtype: str, rounds: int = 5) -> Roofline:
  """Measures one device's best speed in matrix products and a triad.

  Takes some seconds, and 800 MB: call it once the peak of memory is known.

  Args:
    dtype: of the matrices; products are as exact as those of the model.
    rounds: number per size; the best one counts.
  """
  product = jax.jit(lambda a, b: a @ b)
  flops = 0.0
  for size in _SQUARES:
    a, b = jnp.ones((2, size, size), dtype)
    seconds = _best(lambda a=a, b=b: product(a, b), rounds)
    flops = max(flops, 2.0 * size**3 / seconds)
  return Roofline(flops, _triad(rounds))


def _triad(rounds: int) -> float:
  """Measures bytes/s of a ← a / 2 + b, in place: no new page is touched."""
  triad = jax.jit(lambda a, b: 0.5 * a + b, donate_argnums=0)
  a, b = jnp.ones((2, _TRIAD_BYTES // 4), jnp.float32)
  times = []
  for _ in range(rounds + 1):
    start = time.perf_counter()
    a = jax.block_until_ready(triad(a, b))
    times.append(time.perf_counter() - start)
  return 3 * a.nbytes / min(times[1:])


def _best(call: Callable[[], Any], rounds: int) -> float:
  jax.block_until_ready(call())
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return min(times)


def machine() -> dict[str, Any]:
  """Returns facts about this machine, without names of hosts."""
  facts = {'cores': len(os.sched_getaffinity(0)), 'processor': _processor()}
  device = jax.devices()[0]
  if device.platform != 'cpu':
    facts['device'] = device.device_kind
  tunables = os.environ.get('GLIBC_TUNABLES')
  return facts | ({'GLIBC_TUNABLES': tunables} if tunables else {})


def _processor() -> str:
  """Returns the processor's name and its widest vectors."""
  fields = {}
  if sys.platform == 'linux':
    with open('/proc/cpuinfo', encoding='utf-8') as lines:
      for line in lines:
        name, _, value = line.partition(':')
        fields.setdefault(name.strip(), value.strip())
  name = fields.get('model name', platform.machine())
  known = fields.get('flags', '').split()
  wide = [flag for flag in ('avx2', 'avx512f', 'amx_tile') if flag in known]
  return ' '.join([name, *wide])


def versions(*packages: str) -> dict[str, str]:
  """Returns the versions of installed packages, and of Python."""
  result = {'python': platform.python_version()}
  return result | {name: importlib.metadata.version(name) for name in packages}


def report(
  benchmark: str,
  seconds: Sequence[float],
  compiled: dict[str, float],
  dtype: str = 'float32',
  peak: tuple[int, str] | None = None,
  **fields,
) -> tuple[dict[str, Any], Roofline]:
  """Returns the fields that every benchmark has; measures the roofline.

  Args:
    benchmark: its name.
    seconds: times of the rounds that count.
    compiled: from `Compilations.found`, or `compile_seconds` alone.
    dtype: of the matrix products.
    peak: as in `peak_bytes`; None calls it.
    **fields: the benchmark's own fields.
  """
  # Before the roofline, whose arrays are large.
  size, owner = peak or peak_bytes()
  roofline = measure_roofline(dtype)
  reached = {
    'dtype': dtype,
    'flops_per_second': rounded(roofline.flops),
    'bytes_per_second': rounded(roofline.bandwidth),
  }
  return {
    'benchmark': benchmark,
    'system': 'jaxrl_llm',
    **fields,
    'seconds': summary(seconds),
    **compiled,
    'peak_bytes': size,
    'peak_of': owner,
    'machine': machine() | {'measured': reached},
    'versions': versions('jax', 'jaxlib', 'flax', 'optax'),
  }, roofline


def show(fields: dict[str, Any]) -> None:
  """Prints one line of JSON."""
  print(json.dumps(fields), flush=True)
