"""A user's mistake: at most three lines with the remedy, status 2, no harm."""

import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys

import jax
import mistakes
import pytest
import scripts

from experiments import cli

ROOT = pathlib.Path(__file__).parents[2]

# Flags after a sound configuration, and what the message must hold.  Values
# that do not fit are in `refusals_test`: here is one for each moment.
FLAGS = r"""
--confg=x | --confg | did you mean --config?
--config.rollout.sample=3 | --config.rollout.sample: | did you mean 'samples'?
--config.rolout.samples=3 | --config.rolout: | did you mean 'rollout'?
--config.rollout.samples=many | --config.rollout.samples=many | int
--workdir= | --workdir is empty | not set
resume | unexpected argument 'resume' | --
--config.task.operations[2]=3 | operations[2]: tuple index | set the whole tuple
--config.training.minibatches=3 | minibatches is 3 | 4 prompts | [1, 2, 4]
--config.prompts.max_tokens=3 | exceed 3 tokens | budget | overlong='drop'
--config.model.alphabet=0123456789= | tokenizer lacks: '+'
--config.task.name=arithmatic | config.task | did you mean 'arithmetic'?
--config.rewards.symbols.name=exact_mach | symbols | mean 'exact_match'?
--config.model.path=absent | HERE/absent
--config.rewards.symbols.name=absent.py:f | config.rewards.symbols | HERE/absent
--config.prompts.pass_rates=absent.jsonl | HERE/absent.jsonl
"""

# Changes to the text of a sound configuration.
FILES = r"""
config.checkpoints.every -> config.checkpoint_every | config.checkpoints.every?
config.rollout.update -> config.rolout.update | config.py, line | rollout
return config -> return (config | config.py, line | Syntax
return config -> return None | config.py | NoneType | base.get_config()
return config -> config.rewards = {}; return config | config.rewards is empty
def get_config -> def got_config | config.py has no function get_config()
"""


def train(config, workdir, *flags):
  return scripts.call(
    'train', f'--config={config}', f'--workdir={workdir}', *flags
  )


@pytest.mark.parametrize('flag, texts', mistakes.table(FLAGS, HERE=os.getcwd()))
def test_wrong_flag(flag, texts, config_file, tmp_path):
  mistakes.assert_refused(train(config_file, tmp_path / 'run', flag), *texts)
  # The corrected command finds the folder free.
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize('change, texts', mistakes.table(FILES))
def test_wrong_configuration(change, texts, tmp_path):
  old, new = change.split(' -> ')
  assert old in scripts.CONFIG
  config = scripts.write_config(tmp_path, scripts.CONFIG.replace(old, new))
  mistakes.assert_refused(train(config, tmp_path / 'run'), *texts)


def test_configuration_missing(tmp_path):
  for path, text in (
    (tmp_path / 'missing.py', f'no such file: {tmp_path}/missing.py'),
    (tmp_path, f'no such file: {tmp_path}'),
    ('quickstrat', 'did you mean experiments/configs/quickstart.py?'),
    ('absent.py', str(pathlib.Path.cwd() / 'absent.py')),
  ):
    mistakes.assert_refused(train(path, tmp_path / 'run'), text)
  mistakes.assert_refused(scripts.call('train'), '--config is missing')


def test_a_run_that_could_not_begin_leaves_the_folder_free(tmp_path):
  config = scripts.write_config(tmp_path / 'config', reward='import nothing\n')
  workdir = tmp_path / 'run'
  texts = 'reward.py does not load', "No module named 'nothing'"
  mistakes.assert_refused(train(config, workdir), *texts)
  scripts.write_reward(tmp_path / 'config')
  ended = train(config, workdir, '--config.prompts.max_tokens=3')
  mistakes.assert_refused(ended, 'exceed 3 tokens')


def test_the_command_itself_without_torch_or_devices():
  """A fresh interpreter; transformers would complain of a missing torch."""
  program = (
    "import runpy, sys; sys.modules['torch'] = None\n"
    "sys.argv = ['train', '--config=experiments/configs/quickstart.py']\n"
    "runpy.run_module('experiments.train', run_name='__main__')\n"
  )
  ended = subprocess.run(
    [sys.executable, '-c', program],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'absent'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert ended.returncode == 2 and ended.stdout == ''
  assert ended.stderr.startswith(
    'error: JAX starts no device for JAX_PLATFORMS=absent: Unable to initialize'
  )
  assert len(ended.stderr.splitlines()) == 2


@pytest.mark.slow
def test_nobody_reads_what_is_printed():
  """As behind `| head -1` once that has ended."""
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, '-m', 'experiments.train', '--help']
  pipes = dict(stdout=write, stderr=subprocess.PIPE)
  ended = subprocess.run(command, cwd=ROOT, timeout=120, **pipes)
  os.close(write)
  assert not ended.stderr and ended.returncode == 128 + signal.SIGPIPE


def test_plugins_without_a_device_are_left_out(monkeypatch, tmp_path):
  """Of CUDA's, as the extra `plan` installs them, alone."""
  try:
    for plugin, files, platforms in (
      ('xla_cuda13', tmp_path / 'absent', 'cpu'),
      ('xla_cuda13', tmp_path, None),
      ('other', tmp_path / 'absent', None),
    ):
      points = [importlib.metadata.EntryPoint(plugin, 'a', 'jax_plugins')]
      found = lambda group, points=points: points
      monkeypatch.setattr(importlib.metadata, 'entry_points', found)
      monkeypatch.setattr(cli, '_ACCELERATORS', (str(files),))
      jax.config.update('jax_platforms', None)
      cli._leave_out_plugins()
      assert jax.config.jax_platforms == platforms
  finally:
    jax.config.update('jax_platforms', 'cpu')
