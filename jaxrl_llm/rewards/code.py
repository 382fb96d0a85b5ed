"""Rewards for programs, computed by running them in a `sandbox`."""

import concurrent.futures
import logging
import os
import time
from collections.abc import Callable, Sequence

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import interruptible, programs, sandbox, step_scores

__all__ = ['code_tests']
_log = logging.getLogger(__name__)


def code_tests(
  score: step_scores.Grade | None = None,
  timeout: float = 10.0,
  memory: int = 2**29,
  parallel: int | None = None,
  packages: Sequence[str] = (),
  batch_timeout: float | None = None,
) -> Callable[..., list[float | None]]:
  """Factory: runs the program in the completion against the row's tests.

  Columns, of which a row has one kind:

    test, entry_point            a function check(candidate), and its candidate
                                 (HumanEval)
    test_list, test_setup_code   assertions, and code to run before them (MBPP);
                                 entry_point if the function is named like a
                                 built-in one
    input_output                 JSON: inputs, outputs and, for calls instead of
                                 standard input, fn_name (APPS)
    test_cases                   JSON, or a list: input, output and testtype,
                                 stdin or functional (LiveCodeBench); the latter
                                 calls entry_point, perhaps of a class Solution

  Printed output is compared line by line, without spaces at the ends of lines
  and lines at the end.  `programs.find_program` extracts the program.  One that
  fails, crashes, or exceeds time or memory scores 0; failure to run programs at
  all is an error, and so is a row whose tests test nothing.

  It needs no worker processes (`workers`): their time-out would leave a program
  that never ends without a score.  Programs run in parallel, equal ones once.
  If a batch is abandoned (`interruptible.checked`), running programs end by
  their own limits.  Scores of programs that depend on chance, the clock or
  nearly all of their time may not repeat.

  Args:
    score: converts passed tests to a reward, as in `step_scores`; None for
      `all_passed()`.
    timeout: seconds for each program with its tests.
    memory: bytes of address space per process.
    parallel: programs to run at a time; None for the number of cores.
    packages: installed packages that programs may import, such as numpy.
    batch_timeout: seconds for a whole batch; programs that have not ended by
      then are not scored (None), and their number is logged.  None for no
      limit: N programs take up to N · timeout / parallel seconds.

  References:
    Chen et al., `Evaluating Large Language Models Trained on Code
    <https://arxiv.org/abs/2107.03374>`_, 2021
    Austin et al., `Program Synthesis with Large Language Models
    <https://arxiv.org/abs/2108.07732>`_, 2021
    Hendrycks et al., `Measuring Coding Challenge Competence With APPS
    <https://arxiv.org/abs/2105.09938>`_, 2021
  """
  if isinstance(packages, str) or not all(packages):
    raise UserError(f'code_tests: packages={packages!r} must be a list.')
  limits = dict(parallel=parallel, batch_timeout=batch_timeout)
  for name, limit in limits.items():
    if limit is not None and limit <= 0:
      raise UserError(f'code_tests: {name}={limit} must be above 0.')
  grade = score or step_scores.all_passed()
  settings = dict(memory=memory, packages=tuple(packages))

  def run(job, deadline):
    program, tests = job
    left = deadline - time.monotonic()
    if left <= 0:
      return None
    result = sandbox.run(
      program, timeout=min(timeout, left), **tests._asdict(), **settings
    )
    late = result.outcome is sandbox.Outcome.TIMED_OUT and left < timeout
    return None if late else result

  def passes_tests(prompts, completions, **columns):
    deadline = time.monotonic() + (batch_timeout or float('inf'))
    columns = {k: columns[k] for k in programs.COLUMNS if k in columns}
    jobs = []
    for i, pair in enumerate(zip(prompts, completions, strict=True)):
      row = {name: column[i] for name, column in columns.items()}
      tests = programs.read_tests(i, pair[0], row)
      jobs.append((programs.find_program(*pair, tests.entry_point), tests))
    different = list(dict.fromkeys(jobs))
    sandbox.isolation()  # Tried once, not by every thread.
    run_one = lambda job: run(job, deadline)
    results = _results(run_one, different, parallel or _cores())
    late = [result for result in results.values() if result is None]
    if late:
      _log.warning(
        '%d of %d programs had not ended after batch_timeout=%s s',
        *(len(late), len(different), batch_timeout),
      )
    results = [results[job] for job in jobs]
    return [None if each is None else grade(each.passed) for each in results]

  return passes_tests


def _results(run, jobs: list, parallel: int) -> dict:
  """Returns the result of each job; drops waiting jobs on an error."""
  pool = concurrent.futures.ThreadPoolExecutor(parallel)
  try:
    futures = {job: pool.submit(run, job) for job in jobs}
    unfinished = lambda s: concurrent.futures.wait(futures.values(), s).not_done
    interruptible.wait(lambda seconds: not unfinished(seconds))
    return {job: future.result() for job, future in futures.items()}
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
