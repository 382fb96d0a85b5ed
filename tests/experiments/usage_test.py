"""The text of --help, and --dry_run."""

import re

import scripts

from experiments import checks
from experiments.configs import base


def test_help_shows_what_a_file_and_flags_set(tmp_path):
  ended = scripts.call('train', '--help')
  assert ended.code == 0 and ended.err == ''
  lines = ended.out.splitlines()
  assert '  --workdir: Folder of the run.' in lines
  for name, value in checks.leaves(base.get_config()):
    if name not in ('model.architecture', 'task', 'rewards', 'algorithm'):
      assert f'  {name} = {value!r}' in lines
  config = scripts.write_config(tmp_path)
  flags = f'--config={config}', '--config.rollout.samples=3', '--help'
  ended = scripts.call('train', *flags)
  assert ended.code == 0 and f'fields of {config}' in ended.out
  for line in ('  rollout.samples = 3', '  task.modulus = 10', '  steps = 20'):
    assert line in ended.out.splitlines()


def test_a_dry_run_prints_what_would_be_and_writes_nothing(tmp_path):
  config, workdir = scripts.write_config(tmp_path), tmp_path / 'runs' / 'run'
  flags = f'--config={config}', f'--workdir={workdir}', '--dry_run'
  ended = scripts.call('train', *flags, '--config.steps=21')
  assert ended.code == 0 and ended.err == ''
  lines = ended.out.splitlines()
  assert 'steps = 21' in lines and "task.name = 'arithmetic'" in lines
  assert lines[lines.index('') + 1 :] == [
    'llama model, 2,880 parameters, 17 tokens; 1 cpu device(s)',
    '24 training and 8 held-out prompts; dropped as over budget: 0 and 0',
    'warm start: 8 steps, each an update on 8',
    'training: 21 steps, each of 4 prompts x 4 responses and 2 update(s)',
    'at most 8 tokens per prompt and 6 per response',
  ]
  assert not workdir.parent.exists()
  drop = 'prompts.overlong=drop', 'prompts.max_tokens=5', 'rollout.prompts=16'
  two = [f'--config.{flag}' for flag in (*drop, 'task.operations=(1, 2)')]
  ended = scripts.call('train', *flags, *two)
  assert ended.code == 0 and 'each step repeats some' in ended.out, ended
  (line,) = [x for x in ended.out.splitlines() if 'dropped as over' in x]
  kept, held, dropped, held_dropped = map(int, re.findall(r'\d+', line))
  assert kept + dropped == 24 and held + held_dropped == 8
  assert 0 < dropped < 24 and 0 < held_dropped < 8
  assert not workdir.parent.exists()


def test_dry_runs_of_all_that_trains():
  small = '--config.task.train=300', '--config.task.demonstrations=300'
  for script, name, text in (
    ('train', 'arithmetic_ppo', '80 steps, each of 32 prompts x 8 responses'),
    ('sft', 'arithmetic_sft', '80 steps, each an update on 256'),
    ('preference', 'arithmetic_dpop', '240 steps'),
    ('rest_em', 'arithmetic_rest_em', '320 steps'),
  ):
    path = f'--config=experiments/configs/{name}.py'
    ended = scripts.call(script, path, *small, '--dry_run')
    assert ended.code == 0, ended.err
    assert f'training: {text}' in ended.out
