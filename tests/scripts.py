"""Scripts in processes of their own, and the tiny run that tests share."""

import contextlib
import fcntl
import functools
import io
import json
import multiprocessing
import os
import pathlib
import runpy
import shutil
import sys
import tempfile
import time
import types
from unittest import mock

from absl import app, flags

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(
  [
    'experiments.stored_runs',
    'experiments.online',
    'matplotlib.pyplot',
    'orbax.checkpoint.v1',
    'scipy.special',
    'transformers.models.auto.tokenization_auto',
    'transformers.models.llama.configuration_llama',
  ]
)

# The variable that names the session's folder; `conftest` sets it.
FOLDER = 'JAXRL_LLM_TESTS_FOLDER'

# Steps of supervised learning, of both phases, and between checkpoints.
WARM, TOTAL, EVERY = 8, 28, 5
PROMPTS, SAMPLES, HELD_OUT = 4, 4, 8

CONFIG = f"""
from experiments.configs import base
from jaxrl_llm.tasks import arithmetic


def get_config():
  config = base.get_config()
  config.model.alphabet = arithmetic.ALPHABET
  sizes = dict(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2)
  config.model.architecture = dict(sizes, tied=True, max_length=64)
  config.task = dict(
    name='arithmetic',
    train=24,
    held_out={HELD_OUT},
    demonstrations=20,
    operations=(1, 1),
    operands=(0, 9),
    operators='+',
    modulus=10,
  )
  config.prompts.max_tokens = 8
  config.rewards = dict(
    symbols=dict(name='REWARD:symbols'),
    correct=dict(name='arithmetic_answer', weight=0.5),
  )
  config.algorithm = dict(name='grpo', kl=0.04)
  config.rollout.update(prompts={PROMPTS}, samples={SAMPLES}, max_tokens=6)
  config.training.minibatches = 2
  config.steps = {TOTAL - WARM}
  config.optimizer = base.optimizer(3e-3, decay='linear')
  config.warm_start.update(steps={WARM}, batch=8)
  config.evaluation.update(every={EVERY}, prompts={HELD_OUT}, batch=8)
  config.checkpoints.every = {EVERY}
  return config
"""

# It takes its time, so that a test can stop a run where it wants to.
REWARD = """
import time

calls = 0


def symbols(completions, completion_ids, **kwargs):
  global calls
  calls += 1
  time.sleep(0.03)
  scores = [len(set(ids)) / len(ids) for ids in completion_ids]
  # BREAK
  return scores
"""


def tiny_config():
  """`quickstart.py` with a model that compiles in a moment."""
  from experiments.configs import quickstart

  config = quickstart.get_config()
  config.model.architecture.update(
    hidden_size=16, intermediate_size=16, num_layers=1
  )
  return config


class Ended(types.SimpleNamespace):
  """Exit code, both outputs and the seconds of a script."""


def write_config(folder, config: str = CONFIG, reward: str = REWARD):
  """Writes config.py and its reward.py; returns the path of config.py."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_reward(folder, reward)
  path = folder / 'config.py'
  path.write_text(config.replace('REWARD:', f'{folder / "reward.py"}:'))
  return path


def write_rows(path, rows) -> str:
  """Writes JSON lines."""
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def write_reward(folder, reward: str = REWARD) -> None:
  """Writes reward.py such that no stale bytecode is loaded in its place."""
  (folder / 'reward.py').write_text(reward)
  shutil.rmtree(folder / '__pycache__', ignore_errors=True)


class Script:
  """`python -m experiments.NAME ARGUMENTS`, running."""

  def __init__(
    self, name: str, *arguments, cache=None, devices: int = 1, before=None
  ):
    self._folder = tempfile.TemporaryDirectory()
    self._start = time.monotonic()
    texts = [str(argument) for argument in arguments]
    self._process = context.Process(
      target=_main,
      args=(name, texts, self._folder.name, cache, devices, before),
      daemon=True,
    )
    self._process.start()
    self.pid = self._process.pid

  @property
  def alive(self) -> bool:
    return self._process.is_alive()

  def signal(self, number: int) -> None:
    os.kill(self.pid, number)

  def wait(self, seconds: float = 600) -> Ended:
    """Waits for the end; kills what takes longer."""
    self._process.join(seconds)
    if self._process.is_alive():
      self._process.kill()
      self._process.join()
    folder = pathlib.Path(self._folder.name)
    ended = Ended(
      code=self._process.exitcode,
      seconds=time.monotonic() - self._start,
      out=(folder / 'out').read_text(),
      err=(folder / 'err').read_text(),
    )
    self._folder.cleanup()
    return ended


def run(name: str, *arguments, cache=None) -> Ended:
  """Runs a script to its end."""
  return Script(name, *arguments, cache=cache).wait()


def call(script, *arguments) -> Ended:
  """Runs a script in this process: a moment, where it ends before it trains."""
  out, err, start = io.StringIO(), io.StringIO(), time.monotonic()
  begin = lambda main, flags_parser: sys.exit(main(flags_parser(sys.argv)))
  known = set(flags.FLAGS)
  path, code = pathlib.Path(__file__).parents[1] / 'experiments', 0
  argv = ['script', *map(str, arguments)]
  with (
    mock.patch.object(app, 'run', begin),
    mock.patch.object(sys, 'argv', argv),
    # It comes before anything touches a device; other tests have.
    mock.patch('jaxrl_llm.processes.initialize'),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
  ):
    flags.FLAGS.unparse_flags()
    try:
      if callable(script):
        script()
      else:
        file = path.joinpath(*script.split('.')).with_suffix('.py')
        runpy.run_path(str(file), run_name='__main__')
    except SystemExit as end:
      code = end.code or 0
    finally:
      for flag in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, flag)
      # Else the next file inherits what it does not define.
      sys.modules.pop('config_config', None)
  seconds, out, err = time.monotonic() - start, out.getvalue(), err.getvalue()
  return Ended(code=code, seconds=seconds, out=out, err=err)


def train(
  workdir, config, *flags, compiled=None, devices: int = 1, before=None
) -> Script:
  """Starts or continues a run of online RL."""
  flags = f'--config={config}', f'--workdir={workdir}', '--resume', *flags
  settings = dict(cache=compiled or cache(), devices=devices, before=before)
  return Script('train', *flags, **settings)


def optimize() -> None:
  """Lets a script compile as users do, passed to it as `before`."""
  import jax

  os.environ.pop('XLA_FLAGS', None)
  jax.config.update('jax_disable_most_optimizations', False)


def records(workdir, name: str = 'metrics.jsonl') -> list[dict]:
  """The records of a run, as JSON gives them."""
  lines = (pathlib.Path(workdir) / name).read_text().splitlines()
  return [json.loads(line) for line in lines]


def assert_same_run(workdir, whole=None) -> None:
  """Asserts that a run left bit for bit what an undisturbed one left."""
  workdir, whole = pathlib.Path(workdir), whole or undisturbed()
  for name in ('metrics.jsonl', 'samples.jsonl', 'hf/model.safetensors'):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
  for name in ('metrics.jsonl', 'timings.jsonl'):
    steps = [record['step'] for record in records(workdir, name)]
    assert steps == list(range(1, steps_written(whole) + 1)), name


def steps_written(workdir) -> int:
  """Complete records in metrics.jsonl."""
  with contextlib.suppress(FileNotFoundError):
    return (pathlib.Path(workdir) / 'metrics.jsonl').read_bytes().count(b'\n')
  return 0


def wait_until(condition, script: Script, seconds: float = 600) -> None:
  """Polls until `condition()` holds while a script runs."""
  end = time.monotonic() + seconds
  while not condition():
    if not script.alive or time.monotonic() > end:
      raise AssertionError(f'it never came to that: {script.wait(1)}')
    time.sleep(0.001)


def shared_folder() -> pathlib.Path:
  """A folder that lives as long as the test session, for all its workers."""
  return pathlib.Path(os.environ[FOLDER])


@functools.cache
def undisturbed() -> pathlib.Path:
  """The folder of the tiny run, done in one go, everything compiled for it."""
  workdir, done = shared_folder() / 'undisturbed', shared_folder() / 'done'
  with open(shared_folder() / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      config = write_config(shared_folder() / 'config')
      ended = run('train', f'--config={config}', f'--workdir={workdir}')
      assert ended.code == 0, ended.err
      done.touch()
  return workdir


def cache() -> pathlib.Path:
  """Where the other runs of this worker's tests keep what they compile."""
  return shared_folder() / os.environ.get('PYTEST_XDIST_WORKER', 'cache')


def _main(name, arguments, folder, cache, devices, before):
  for number, output in ((1, 'out'), (2, 'err')):
    file = os.open(f'{folder}/{output}', os.O_CREAT | os.O_WRONLY)
    os.dup2(file, number)
  import jax

  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  # Compiling takes most of the time of models as small as these.
  jax.config.update('jax_disable_most_optimizations', True)
  if cache is not None:
    jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  sys.argv = [f'experiments.{name}', *arguments]
  if before is not None:
    before()
  try:
    runpy.run_module(f'experiments.{name}', run_name='__main__')
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
