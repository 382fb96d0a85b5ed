"""Rewards for programs, by running them; see `sandbox` for what that means."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import interruptible, programs, sandbox, test_scores

__all__ = ['code_tests']


def code_tests(
  score: test_scores.Grade | None = None,
  stop: Sequence[str] = programs.STOP,
  timeout: float = 10.0,
  memory: int = 2**29,
  parallel: int | None = None,
) -> Callable[..., list[float]]:
  """Factory: runs the program in the completion against the row's tests.

  Columns, those of HumanEval or those of MBPP:

    test, entry_point            a function check(candidate), and its candidate
    test_list, test_setup_code   assertions, and what to run before them

  With `entry_point`, which MBPP's rows may have too, a program cannot bring
  built-in functions of its own into the tests.  `programs.find_program` says
  how the program is found.  One that fails, crashes, or exceeds time or memory
  scores 0; that a program cannot be run at all is an error.

  It needs no worker processes (`workers`), whose time-out would leave a program
  that never ends without a score.  Programs run in parallel, equal ones once.
  A batch of N takes up to N · timeout / parallel seconds; where it is given up
  (`interruptible.checked`), programs that are running end by their own limits.
  Scores of programs that use chance, the clock or nearly all of their time need
  not repeat.

  Args:
    score: what passed tests are worth, of `grades`; `all_passed()` if None.
    stop: what ends a completion that continues the prompt's function.
    timeout: seconds for each program with its tests.
    memory: bytes of address space for each of its processes.
    parallel: programs that run at a time; None for as many as there are cores.

  References:
    Chen et al., `Evaluating Large Language Models Trained on Code
    <https://arxiv.org/abs/2107.03374>`_, 2021
    Austin et al., `Program Synthesis with Large Language Models
    <https://arxiv.org/abs/2108.07732>`_, 2021
  """
  if isinstance(stop, str) or '' in stop:
    raise UserError(f'code_tests: stop={stop!r} must be a list of texts.')
  if parallel is not None and parallel < 1:
    raise UserError(f'code_tests: parallel={parallel} must be at least 1.')
  grade = score or test_scores.all_passed()

  def run(job):
    program, entry_point, (setup, tests) = job
    return sandbox.run(
      program,
      tests,
      setup=setup,
      entry_point=entry_point,
      timeout=timeout,
      memory=memory,
    )

  def passes_tests(
    prompts,
    completions,
    test=None,
    entry_point=None,
    test_list=None,
    test_setup_code=None,
    **kwargs,
  ):
    none = [None] * len(prompts)
    columns = test, entry_point, test_list, test_setup_code
    rows = zip(*(none if c is None else c for c in columns), strict=True)
    jobs = []
    for i, (prompt, completion, row) in enumerate(
      zip(prompts, completions, rows, strict=True)
    ):
      tests, name = _tests(i, prompt, *row), row[1] or ''
      program = programs.find_program(prompt, completion, name, tuple(stop))
      jobs.append((program, name, tests))
    different = list(dict.fromkeys(jobs))
    sandbox.isolation()  # Tried once, not by every thread.
    results = _results(run, different, parallel or _cores())
    return [grade(results[job].passed) for job in jobs]

  return passes_tests


def _results(run, jobs: list, parallel: int) -> dict:
  """What each of the jobs gives; those that wait are dropped on an error."""
  pool = concurrent.futures.ThreadPoolExecutor(parallel)
  try:
    futures = {job: pool.submit(run, job) for job in jobs}
    left = lambda s: concurrent.futures.wait(futures.values(), s).not_done
    interruptible.wait(lambda seconds: not left(seconds))
    return {job: future.result() for job, future in futures.items()}
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _tests(index, prompt, test, entry_point, test_list, setup):
  """The tests of a row.

  Raises:
    UserError: it has none, or they are not what their column should hold.
  """
  given = {'test': (test, str), 'test_list': (test_list, (list, tuple))}
  given |= {'entry_point': (entry_point, str), 'test_setup_code': (setup, str)}
  for name, (value, kind) in given.items():
    if value is not None and not isinstance(value, kind):
      raise UserError(f'{name} of sample {index} is {_shown(value)}.')
  if (test is None) == (test_list is None) or (test and not entry_point):
    raise UserError(
      f'sample {index} needs either the columns test and entry_point (as '
      'HumanEval) or the column test_list (as MBPP).'
    )
  if test is not None:
    return programs.tests_of_check(test, entry_point, prompt)
  if not test_list or not all(isinstance(t, str) for t in test_list):
    raise UserError(
      f'test_list of sample {index} is {_shown(test_list)}: it must hold at '
      'least one test, as text.'
    )
  return programs.Tests(setup or '', tuple(test_list))


def _shown(value: Any) -> str:
  return f'{type(value).__name__} {value!r:.60}'


def _cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
