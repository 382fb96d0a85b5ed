"""Lists the files and functions of the project that one warm step enters.

    python -m benchmarks.trace_step [--step=3]

Runs the quickstart's RL on a small model without its warm start and profiles
one step of the main thread (`sys.setprofile`).  Prints a line per file with its
functions, in the order in which they are first entered, and the totals.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def trace(function) -> dict[str, list[str]]:
  """Calls a function; returns file → functions of the project it enters."""
  entered: dict[str, list[str]] = {}

  def profile(frame, event, argument):
    del argument
    code = frame.f_code
    if event != 'call' or not code.co_filename.startswith(str(ROOT)):
      return
    name = str(pathlib.Path(code.co_filename).relative_to(ROOT))
    if name.startswith('benchmarks/'):
      return
    functions = entered.setdefault(name, [])
    # Python 3.11 enters a comprehension like a function.
    if code.co_name.endswith(('comp>', 'genexpr>')):
      return
    if code.co_qualname not in functions:
      functions.append(code.co_qualname)

  sys.setprofile(profile)
  try:
    function()
  finally:
    sys.setprofile(None)
  return entered


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--step', type=int, default=3, help='from 1')
  step = parser.parse_args().step

  from experiments.configs import quickstart
  from experiments.loop import Run
  from experiments.train import SCRIPT
  from jaxrl_llm.runs.folder import open_run
  from jaxrl_llm.signals import StopSignal

  config = quickstart.get_config()
  config.warm_start.steps = 0
  config.task.update(train=2_000, held_out=64)
  config.evaluation.update(prompts=64, batch=64)
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
    opened = files.enter_context(
      open_run(folder, False, config.to_dict(), frozenset(), [])
    )
    stop = files.enter_context(StopSignal())
    run = Run(config, opened, stop, files, SCRIPT.phase)
    for _ in range(step - 1):
      run._one_step()
    entered = trace(run._one_step)
  for name, functions in entered.items():
    print(f'{name}: {", ".join(functions)}')
  total = sum(map(len, entered.values()))
  print(f'{len(entered)} files, {total} functions')


if __name__ == '__main__':
  main()
