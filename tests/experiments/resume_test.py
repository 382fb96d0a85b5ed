"""Stops and resumes: the records are those of an undisturbed run."""

import os
import shutil
import signal
import time

import pytest
import scripts
from mistakes import assert_refused as refused


@pytest.mark.slow
def test_stops_and_bad_rewards_leave_the_same_records(tmp_path):
  config = scripts.write_config(tmp_path / 'config')
  workdir = tmp_path / 'run'

  # In the warm start, which has no rollout that would poll for it.
  script = scripts.train(workdir, config)
  scripts.wait_until((workdir / 'metrics.jsonl').exists, script)
  time.sleep(0.3)  # The first update is being compiled.
  script.signal(signal.SIGTERM)
  stopped(script.wait(), workdir)
  assert scripts.steps_written(workdir) < scripts.WARM

  # In RL, and meanwhile a second run tries the same folder.
  script = scripts.train(workdir, config)
  scripts.wait_until(
    lambda: scripts.steps_written(workdir) >= scripts.WARM + 1, script
  )
  second = scripts.train(workdir, config).wait()
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
    ended = scripts.train(workdir, config).wait()
    refused(ended, "reward 'symbols' returned nan for sample 3", 'finite')
    reward = tmp_path / 'config' / 'reward.py'
    assert f'{reward} has changed' in ended.err
    assert before <= scripts.steps_written(workdir) < scripts.TOTAL
  scripts.write_reward(tmp_path / 'config')
  ended = scripts.train(workdir, config).wait()
  assert ended.code == 0, ended.err
  scripts.assert_same_run(workdir)


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
  whole = scripts.undisturbed()
  workdir = tmp_path / 'run'
  shutil.copytree(whole, workdir)
  config = scripts.shared_folder() / 'config' / 'config.py'
  ended = scripts.train(workdir, config).wait()
  assert ended.code == 0, ended.err
  scripts.assert_same_run(workdir)
  steps = [sorted(os.listdir(f / 'checkpoints')) for f in (whole, workdir)]
  assert steps[0] == steps[1]

  ended = scripts.train(workdir, config, '--config.steps=3').wait()
  refused(ended, 'steps was 20, is 3')
  scripts.assert_same_run(workdir)


def test_without_a_configuration_file(tmp_path):
  """The records are those of a run that was always given its file."""
  workdir = tmp_path / 'run'
  shutil.copytree(scripts.undisturbed(), workdir)
  stored = (workdir / 'config.json').read_bytes()
  newest = max((workdir / 'checkpoints').iterdir())
  shutil.rmtree(newest)
  shutil.rmtree(workdir / 'hf')
  alone = f'--workdir={workdir}', '--resume'
  for script, flags, texts in (
    ('train', [], ['config.rewards.symbols.name is', 'add --trust_code']),
    ('train', ['--config.steps=3'], ['--config.steps', '--config=FILE.py']),
    ('sft', ['--trust_code'], ['train with experiments.train']),
  ):
    refused(scripts.call(script, *alone, *flags), *texts)
  empty = scripts.call('train', f'--workdir={tmp_path}', '--resume')
  refused(empty, f'{tmp_path} holds no run')
  assert not newest.exists()
  ended = scripts.run('train', *alone, '--trust_code', cache=scripts.cache())
  assert ended.code == 0, ended.err
  assert 'resumed at step' in ended.err and newest.exists()
  scripts.assert_same_run(workdir)
  assert (workdir / 'config.json').read_bytes() == stored


@pytest.mark.parametrize(
  'flags, texts',
  [
    ([], ['already holds a run', '--resume', '--workdir']),
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
  ended = scripts.call(
    'train', f'--config={config}', f'--workdir={workdir}', *flags
  )
  refused(ended, *texts)
  scripts.assert_same_run(workdir)


def test_data_that_changed_is_refused(tmp_path):
  # The fingerprint, not the configuration: here the stored file is edited as
  # a change of the data behind it would.
  workdir = tmp_path / 'run'
  shutil.copytree(scripts.undisturbed(), workdir)
  config = scripts.shared_folder() / 'config' / 'config.py'
  stored = workdir / 'config.json'
  stored.write_text(stored.read_text().replace('"train": 24', '"train": 25'))
  flags = f'--config={config}', f'--workdir={workdir}', '--resume'
  ended = scripts.call('train', *flags, '--config.task.train=25')
  refused(ended, 'prompts are not those of step 28', 'rows', '--workdir')


def stopped(ended, workdir) -> None:
  """Asserts an orderly stop by SIGTERM with a checkpoint of the last step."""
  assert ended.code == 128 + signal.SIGTERM, ended
  written = scripts.steps_written(workdir)
  assert f'stopped by SIGTERM after step {written}' in ended.err
  newest = max(os.listdir(workdir / 'checkpoints'))
  assert newest == f'{written:08d}'
