"""Rewards for programs, computed by running them in a `sandbox`."""

import concurrent.futures
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import interruptible, programs, sandbox, step_scores

__all__ = ['code_tests']
_log = logging.getLogger(__name__)


def code_tests(
  score: step_scores.Grade | None = None,
  stop: Sequence[str] = programs.STOP,
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
    stop: texts that end a completion which continues the prompt's function.
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
  for name, texts in {'stop': stop, 'packages': packages}.items():
    if isinstance(texts, str) or '' in texts:
      raise UserError(f'code_tests: {name}={texts!r} must be a list of texts.')
  if parallel is not None and parallel < 1:
    raise UserError(f'code_tests: parallel={parallel} must be at least 1.')
  if batch_timeout is not None and batch_timeout <= 0:
    raise UserError(f'code_tests: batch_timeout={batch_timeout} must be > 0.')
  grade = score or step_scores.all_passed()
  settings = dict(memory=memory, packages=tuple(packages))

  def run(job, deadline):
    program, entry_point, tests = job
    left = deadline - time.monotonic()
    if left <= 0:
      return None
    result = sandbox.run(
      program,
      tests.tests,
      setup=tests.setup,
      examples=tests.examples,
      entry_point=entry_point,
      timeout=min(timeout, left),
      **settings,
    )
    late = result.outcome is sandbox.Outcome.TIMED_OUT and left < timeout
    return None if late else result

  def passes_tests(prompts, completions, entry_point=None, **columns):
    deadline = time.monotonic() + (batch_timeout or float('inf'))
    jobs = []
    for i, (prompt, completion) in enumerate(
      zip(prompts, completions, strict=True)
    ):
      row = {name: columns[name][i] for name in _KINDS if name in columns}
      row['entry_point'] = entry_point and entry_point[i]
      name, tests = _tests(i, prompt, row)
      program = programs.find_program(prompt, completion, name, tuple(stop))
      jobs.append((program, name, tests))
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


def _tests(index: int, prompt: str, row: dict) -> tuple[str, programs.Tests]:
  """Returns a row's entry point and tests.

  Raises:
    UserError: it has no tests, or they test nothing, or a column has the wrong
      type.
  """
  where = f'sample {index}'
  for name, value in row.items():
    kinds = _KINDS.get(name, str)
    if value is not None and not isinstance(value, kinds):
      raise UserError(f'{name} of {where} is {_shown(value)}.')
  present = [name for name in _READERS if row.get(name) is not None]
  if len(present) != 1 or (present == ['test'] and not row['entry_point']):
    raise UserError(
      f'{where} needs either the columns test and entry_point (as in '
      'HumanEval)\nor one of the columns test_list (MBPP), input_output (APPS) '
      'and test_cases (LiveCodeBench).'
    )
  (name,) = present
  return _READERS[name](f'{name} of {where}', prompt, row)


def _read_check(where, prompt, row):
  name = row['entry_point']
  return name, programs.tests_of_check(row['test'], name, prompt, where)


def _read_list(where, prompt, row):
  setup = row.get('test_setup_code') or ''
  tests = programs.tests_of_list(tuple(row['test_list']), setup, where)
  return row['entry_point'] or '', tests


def _read_pairs(where, prompt, row):
  cases = programs.parse(row['input_output'], where)
  if not isinstance(cases, dict) or not cases.get('inputs'):
    raise UserError(f'{where} must hold inputs and outputs.')
  inputs, outputs = cases['inputs'], cases.get('outputs', ())
  if len(inputs) != len(outputs):
    raise UserError(
      f'{where} has {len(inputs)} inputs, {len(outputs)} outputs.'
    )
  name = cases.get('fn_name') or ''
  pairs = list(zip(inputs, outputs, strict=True))
  return name, programs.tests_of_pairs(pairs, name, where)


def _read_cases(where, prompt, row):
  cases = programs.parse(row['test_cases'], where)
  name = row['entry_point'] or ''
  try:
    kinds = {case.get('testtype', 'stdin') for case in cases}
    pairs = [(case['input'], case['output']) for case in cases]
  except (AttributeError, KeyError, TypeError):
    pairs = kinds = ()
  if kinds == {'functional'} and name:
    pairs = [programs.arguments(*pair, where) for pair in pairs]
  elif kinds != {'stdin'}:
    raise UserError(
      f'{where}: each needs an input, an output and the testtype stdin, or all '
      'functional and the column entry_point.'
    )
  else:
    name = ''
  return name, programs.tests_of_pairs(pairs, name, where)


# The columns that hold tests, and how to read them.
_READERS = {
  'test': _read_check,
  'test_list': _read_list,
  'input_output': _read_pairs,
  'test_cases': _read_cases,
}
# The types of columns.
_KINDS = {
  'test': str,
  'test_list': (list, tuple),
  'test_setup_code': str,
  'input_output': (str, dict),
  'test_cases': (str, list, tuple),
}


def _shown(value: Any) -> str:
  return f'{type(value).__name__} {value!r:.60}'


def _cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
