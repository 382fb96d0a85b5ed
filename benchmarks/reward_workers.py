"""Speed of reward workers in scoring, and in replacing a killed one.

    python -m benchmarks.reward_workers --workers=2

Prints one JSON line:

  workers, containment: those of the pool.
  start: seconds until the first worker has loaded `gsm8k_answer`.
  gsm8k_answer: seconds for 512 solutions of about 300 characters; median.
  gsm8k_answer_here: the same without workers.
  length_in_tokens: samples per second of a function that does almost nothing.
  replacement: seconds from the kill of a worker after its time-out, of 1 s,
    until the next one has scored a sample; median.
"""

import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import cli
from jaxrl_llm.rewards import Workers, functions

_SLEEPS = """
import time
def sleeps(completions):
  time.sleep(float(completions[0]))
  return [1.0]
"""


def seconds(function: Callable[[], Any], rounds: int = 5) -> float:
  """Returns the median time of a call, after one that does not count."""
  function()
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    function()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def _rounded(number: float) -> float:
  return float(f'{number:.3g}')


def measure(workers: int) -> dict[str, Any]:
  """Measures everything."""
  text = 'A step of the solution, which takes one line of text or so.\n' * 5
  arguments = {
    'prompts': ['A question.'] * 512,
    'completions': [f'{text}#### {i}' for i in range(512)],
    'answer': [f'{text}#### {i}' for i in range(512)],
  }
  fields = {'benchmark': 'reward_workers', 'workers': workers}
  start = time.perf_counter()
  with Workers('gsm8k_answer', workers=workers) as pool:
    fields['start'] = _rounded(time.perf_counter() - start)
    fields['containment'] = pool.containment
    fields['gsm8k_answer'] = _rounded(seconds(lambda: pool(**arguments)))
  here = {key: arguments[key] for key in ('completions', 'answer')}
  took = seconds(lambda: functions.gsm8k_answer(**here))
  fields['gsm8k_answer_here'] = _rounded(took)
  with Workers('length_in_tokens', workers=workers) as pool:
    ids = [[1, 2, 3]] * 4096
    empty = [''] * len(ids)
    took = seconds(
      lambda: pool(prompts=empty, completions=empty, completion_ids=ids)
    )
    fields['length_in_tokens'] = round(len(ids) / took)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'sleeps.py')
    path.write_text(_SLEEPS, encoding='utf-8')
    with Workers(f'{path}:sleeps', workers=1, timeout=1.0) as pool:
      took = seconds(lambda: pool(prompts=[''] * 2, completions=['99', '0']))
      fields['replacement'] = _rounded(took - 1.0)
  return fields


if __name__ == '__main__':
  flags.DEFINE_integer('workers', 2, 'Number of worker processes.', 1)
  cli.run(lambda: print(json.dumps(measure(flags.FLAGS.workers))))
