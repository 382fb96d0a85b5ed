"""The text of --help, and --dry_run."""

import inspect
import re

import pytest
import scripts

from experiments import checks, usage
from experiments.configs import base

TRAINING = ('train', 'sft', 'preference', 'rest_em', 'reward_model')


def test_every_field_is_listed_with_its_default():
  lines = usage.text(base.get_config(), 'title').splitlines()
  for name, value in checks.leaves(base.get_config()):
    if name not in ('model.architecture', 'task', 'rewards', 'algorithm'):
      assert f'  {name} = {value!r}' in lines
  fields = [name for name, _ in usage.fields(base.get_config())]
  # As they stand in the file, and not by the alphabet.
  assert fields.index('seed') < fields.index('model') < fields.index('mesh')
  assert fields.index('rollout.hints') < fields.index('rollout.hint_threshold')


def test_no_comment_of_the_file_is_left_out():
  source = inspect.getsource(base.get_config) + inspect.getsource(
    base.optimizer
  )
  said = ' '.join(usage.comments().values())
  comments = re.findall(r'(?<= )# (.*)', source)
  assert len(comments) > 50
  for comment in comments:
    assert comment in said
  notes = usage.comments()
  assert notes['rollout.prompts'] == 'P, per step'
  assert notes['mesh'].startswith('Devices along') and notes['mesh.data'] == ''
  assert notes['optimizer.decay'] == notes['critic.optimizer.decay'] != ''


@pytest.mark.parametrize('name', TRAINING)
def test_help_lists_flags_and_fields(name):
  ended = scripts.run(name, '--help')
  assert ended.code == 0 and ended.err == ''
  for line in ('  --workdir: Folder of the run.', '  rollout.samples = 8'):
    assert line in ended.out.splitlines()


def test_help_shows_what_a_file_and_flags_set(tmp_path):
  config = scripts.write_config(tmp_path)
  flags = f'--config={config}', '--config.rollout.samples=3', '--help'
  ended = scripts.run('train', *flags)
  assert ended.code == 0 and f'fields of {config}' in ended.out
  for line in ('  rollout.samples = 3', '  task.modulus = 10', '  steps = 20'):
    assert line in ended.out.splitlines()
  ended = scripts.run('train', '--config=absent.py', '--help')
  assert ended.code == 2 and 'no such file' in ended.err


def test_help_of_a_script_without_configurations():
  ended = scripts.run('doctor', '--help')
  assert ended.code == 0 and '--workdir: Folder of a run' in ended.out
  assert 'rollout' not in ended.out
