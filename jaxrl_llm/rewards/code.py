"""Rewards for programs, computed by running them in a `sandbox`."""

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import interruptible, programs, sandbox, step_scores

__all__ = ['code_tests']


def code_tests(
  score: step_scores.Grade | None = None,
  stop: Sequence[str] = programs.STOP,
  timeout: float = 10.0,
  memory: int = 2**29,
  parallel: int | None = None,
) -> Callable[..., list[float]]:
  """Factory: runs the program in the completion against the row's tests.

  Columns, as in HumanEval or as in MBPP:

    test, entry_point            a function check(candidate), and its candidate
    test_list, test_setup_code   assertions, and code to run before them

  With `entry_point`, which MBPP's rows may have too, a program cannot replace
  built-in functions in the tests.  `programs.find_program` extracts the
  program.  One that fails, crashes, or exceeds time or memory scores 0; failure
  to run programs at all is an error.

  It needs no worker processes (`workers`): their time-out would leave a program
  that never ends without a score.  Programs run in parallel, equal ones once.
  A batch of N takes up to N · timeout / parallel seconds; if it is abandoned
  (`interruptible.checked`), running programs end by their own limits.  Scores
  of programs that depend on chance, the clock or nearly all of their time may
  not repeat.

  Args:
    score: converts passed tests to a reward, as in `step_scores`; None for
      `all_passed()`.
    stop: texts that end a completion which continues the prompt's function.
    timeout: seconds for each program with its tests.
    memory: bytes of address space per process.
    parallel: programs to run at a time; None for the number of cores.

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
  grade = score or step_scores.all_passed()

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
  """Returns the result of each job; drops waiting jobs on an error."""
  pool = concurrent.futures.ThreadPoolExecutor(parallel)
  try:
    futures = {job: pool.submit(run, job) for job in jobs}
    unfinished = lambda s: concurrent.futures.wait(futures.values(), s).not_done
    interruptible.wait(lambda seconds: not unfinished(seconds))
    return {job: future.result() for job, future in futures.items()}
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _tests(index, prompt, test, entry_point, test_list, setup):
  """Returns the tests of a row.

  Raises:
    UserError: the row has none, or a column has the wrong type.
  """
  columns = {'test': (test, str), 'test_list': (test_list, (list, tuple))}
  columns |= {
    'entry_point': (entry_point, str),
    'test_setup_code': (setup, str),
  }
  for name, (value, kind) in columns.items():
    if value is not None and not isinstance(value, kind):
      raise UserError(f'{name} of sample {index} is {_shown(value)}.')
  if (test is None) == (test_list is None) or (test and not entry_point):
    raise UserError(
      f'sample {index} needs either the columns test and entry_point (as in '
      'HumanEval) or the column test_list (as in MBPP).'
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
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
