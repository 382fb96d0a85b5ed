"""Kills, stops and resumes: the records are those of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import scripts

RECORDS = ('metrics.jsonl', 'samples.jsonl')


def same_records(workdir) -> None:
  """Asserts that a run left bit for bit what the undisturbed one left."""
  whole = scripts.undisturbed()
  for name in (*RECORDS, 'hf/model.safetensors'):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
  steps = [
    json.loads(line)['step']
    for line in (workdir / 'timings.jsonl').read_text().splitlines()
  ]
  assert steps == list(range(1, scripts.TOTAL + 1))


def saving(workdir) -> bool:
  """Whether a checkpoint of RL is being written."""
  folder = workdir / 'checkpoints'
  return folder.is_dir() and any(
    'tmp' in name and int(name[:8]) > scripts.WARM
    for name in os.listdir(folder)
  )


def test_undisturbed_run_is_informative():
  # Equal bits mean nothing if the numbers do not move.
  lines = (scripts.undisturbed() / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [r['step'] for r in records] == list(range(1, scripts.TOTAL + 1))
  rewards = [r['reward'] for r in records if 'reward' in r]
  assert len(set(rewards)) > 15
  kls = [r['kl'] for r in records if 'kl' in r]
  assert kls[-1] > 1e-3
  assert sum('eval/reward' in r for r in records) == 5


@pytest.mark.parametrize(
  'killed',
  [
    ('save',),
    pytest.param(
      ('compile', 'warm start', 'first rollout', 'save', 'rollout'),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_kills_leave_the_same_records(killed, tmp_path):
  # The undisturbed run has compiled for itself; the killed one has a cache of
  # compiled programs of its own, empty at first.
  config = scripts.write_config(tmp_path / 'config')
  workdir = tmp_path / 'run'
  moments = random.Random(0)
  in_warm_start = moments.randrange(2, scripts.WARM)
  in_rl = scripts.WARM + moments.randrange(7, 12)
  phases = [
    ('compile', lambda: (workdir / 'config.json').exists(), 1.5),
    (
      'warm start',
      lambda: scripts.steps_written(workdir) >= in_warm_start,
      0.004,
    ),
    ('first rollout', lambda: any(workdir.glob('reference/0*')), 0.5),
    ('save', lambda: saving(workdir), 0.01),
    ('rollout', lambda: scripts.steps_written(workdir) >= in_rl, 0.05),
  ]
  for name, reached, longest in phases:
    if name not in killed:
      continue
    script = start(workdir, config)
    scripts.wait_until(reached, script)
    time.sleep(moments.uniform(0, longest))
    script.signal(signal.SIGKILL)
    ended = script.wait()
    assert ended.code == -signal.SIGKILL, (name, ended)
  ended = start(workdir, config).wait()
  assert ended.code == 0, ended.err
  assert 'resumed at step' in ended.err
  same_records(workdir)


@pytest.mark.slow
def test_stops_and_bad_rewards_leave_the_same_records(tmp_path):
  config = scripts.write_config(tmp_path / 'config')
  workdir = tmp_path / 'run'

  # In the warm start, which has no rollout that would poll for it.
  script = start(workdir, config)
  scripts.wait_until((workdir / 'metrics.jsonl').exists, script)
  time.sleep(0.3)  # The first update is being compiled.
  script.signal(signal.SIGTERM)
  stopped(script.wait(), workdir)
  assert scripts.steps_written(workdir) < scripts.WARM

  # In RL, and meanwhile a second run tries the same folder.
  script = start(workdir, config)
  scripts.wait_until(
    lambda: scripts.steps_written(workdir) >= scripts.WARM + 1, script
  )
  second = start(workdir, config).wait()
  script.signal(signal.SIGTERM)
  stopped(script.wait(), workdir)
  assert second.code == 2 and second.seconds < 5
  refused(second, f'{workdir} is in use', f'pid {script.pid}', '--workdir')

  # A reward that is NaN in a training step, then one in an evaluation.
  rows = scripts.PROMPTS * scripts.SAMPLES
  for where in (f'calls > 4 and len(scores) == {rows}', 'len(scores) == 8'):
    broken = f'if {where}:\n    scores[3] = float("nan")'
    scripts.write_reward(
      tmp_path / 'config', scripts.REWARD.replace('# BREAK', broken)
    )
    before = scripts.steps_written(workdir)
    ended = start(workdir, config).wait()
    refused(ended, "reward 'symbols' returned nan for sample 3", 'finite')
    reward = tmp_path / 'config' / 'reward.py'
    assert f'changed since this run last began: {reward}\n' in ended.err
    assert before <= scripts.steps_written(workdir) < scripts.TOTAL
  scripts.write_reward(tmp_path / 'config')
  ended = start(workdir, config).wait()
  assert ended.code == 0, ended.err
  same_records(workdir)


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
  whole = scripts.undisturbed()
  workdir = tmp_path / 'run'
  shutil.copytree(whole, workdir)
  config = scripts.shared_folder() / 'config' / 'config.py'
  ended = start(workdir, config).wait()
  assert ended.code == 0, ended.err
  same_records(workdir)
  steps = [sorted(os.listdir(f / 'checkpoints')) for f in (whole, workdir)]
  assert steps[0] == steps[1]

  ended = start(workdir, config, '--config.steps=3').wait()
  refused(ended, 'steps was 20, is 3')
  same_records(workdir)


@pytest.mark.parametrize(
  'flags, texts',
  [
    ([], ['already holds a run', '--resume', '--workdir']),
    (
      ['--resume', '--config.rollout.temperature=0.9'],
      ['rollout.temperature was 1.0, is 0.9', '--workdir'],
    ),
    (
      ['--resume', '--config.algorithm.kl=0.05'],
      ['algorithm.kl was 0.04, is 0.05', '--workdir'],
    ),
  ],
)
def test_refuses_the_folder_of_another_run(flags, texts, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(scripts.undisturbed(), workdir)
  config = scripts.shared_folder() / 'config' / 'config.py'
  ended = scripts.run(
    'train', f'--config={config}', f'--workdir={workdir}', *flags
  )
  refused(ended, *texts)
  same_records(workdir)


def test_data_that_changed_is_refused(tmp_path):
  # The fingerprint, not the configuration: here the stored file is edited as
  # a change of the data behind it would.
  workdir = tmp_path / 'run'
  shutil.copytree(scripts.undisturbed(), workdir)
  config = scripts.shared_folder() / 'config' / 'config.py'
  stored = workdir / 'config.json'
  stored.write_text(stored.read_text().replace('"train": 24', '"train": 25'))
  ended = start(workdir, config, '--config.task.train=25').wait()
  refused(ended, 'prompts are not those of step 28', 'rows', '--workdir')


def start(workdir, config, *flags) -> scripts.Script:
  """Starts or continues the run."""
  return scripts.Script(
    'train',
    f'--config={config}',
    f'--workdir={workdir}',
    '--resume',
    *flags,
    cache=scripts.cache(),
  )


def stopped(ended, workdir) -> None:
  """Asserts an orderly stop by SIGTERM with a checkpoint of the last step."""
  assert ended.code == 128 + signal.SIGTERM, ended
  written = scripts.steps_written(workdir)
  assert f'stopped by SIGTERM after step {written}' in ended.err
  newest = max(os.listdir(workdir / 'checkpoints'))
  assert newest == f'{written:08d}'


def refused(ended, *texts) -> None:
  """Asserts exit code 2 and a message of at most three lines with `texts`."""
  assert ended.code == 2, ended
  assert 'Traceback' not in ended.err
  lines = ended.err[ended.err.index('error: ') :].splitlines()
  assert len(lines) <= 3, lines
  for text in texts:
    assert text in ended.err, (text, ended.err)
