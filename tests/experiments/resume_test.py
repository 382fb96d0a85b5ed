"""Stops and resumes: the records are those of an undisturbed run."""

import os
import shutil
import signal

import pytest
import scripts
from mistakes import assert_refused as refused


@pytest.fixture
def config():
  scripts.undisturbed()
  return scripts.shared_folder() / 'config' / 'config.py'


@pytest.mark.slow
def test_stops_and_bad_rewards_leave_the_same_records(tmp_path):
  config, workdir = scripts.write_config(tmp_path / 'config'), tmp_path / 'run'
  # In RL, and meanwhile a second run tries the same folder.
  script = scripts.train(workdir, config)
  begun = lambda: scripts.steps_written(workdir) > scripts.WARM
  scripts.wait_until(begun, script)
  second = scripts.train(workdir, config).wait()
  script.signal(signal.SIGTERM)
  ended = script.wait()
  assert ended.code == 128 + signal.SIGTERM, ended
  written = scripts.steps_written(workdir)
  assert f'stopped by SIGTERM after step {written}' in ended.err
  assert max(os.listdir(workdir / 'checkpoints')) == f'{written:08d}'
  assert second.seconds < 5
  refused(second, f'{workdir} is in use', f'pid {script.pid}', '--workdir')

  # A reward that is NaN in a training step, then one in an evaluation.
  rows = scripts.PROMPTS * scripts.SAMPLES
  for where in (f'calls > 4 and len(scores) == {rows}', 'len(scores) == 8'):
    broken = f'if {where}:\n    scores[3] = float("nan")'
    reward = scripts.REWARD.replace('# BREAK', broken)
    scripts.write_reward(tmp_path / 'config', reward)
    before = scripts.steps_written(workdir)
    ended = scripts.train(workdir, config).wait()
    refused(ended, "reward 'symbols' returned nan for sample 3", 'finite')
    assert f'{tmp_path / "config" / "reward.py"} has changed' in ended.err
    assert before <= scripts.steps_written(workdir) < scripts.TOTAL
  scripts.write_reward(tmp_path / 'config')
  ended = scripts.train(workdir, config).wait()
  assert ended.code == 0, ended.err
  scripts.assert_same_run(workdir)


def test_a_finished_run_stays_as_it_is(config, workdir):
  kept = sorted(os.listdir(workdir / 'checkpoints'))
  ended = scripts.train(workdir, config).wait()
  assert ended.code == 0, ended.err
  for flags, *texts in (
    ([], 'already holds a run', '--resume', '--workdir'),
    (['--resume', '--config.steps=3'], 'steps was 20, is 3'),
    (
      ['--resume', '--config.algorithm.kl=0.05'],
      'algorithm.kl was 0.04, is 0.05',
      '--workdir',
    ),
  ):
    given = f'--config={config}', f'--workdir={workdir}', *flags
    refused(scripts.call('train', *given), *texts)
  scripts.assert_same_run(workdir)
  assert sorted(os.listdir(workdir / 'checkpoints')) == kept
  # The fingerprint, not the configuration: here the stored file is edited as
  # a change of the data behind it would.
  stored = workdir / 'config.json'
  stored.write_text(stored.read_text().replace('"train": 24', '"train": 25'))
  given = f'--config={config}', f'--workdir={workdir}', '--resume'
  ended = scripts.call('train', *given, '--config.task.train=25')
  refused(ended, 'prompts are not those of step 28', 'rows', '--workdir')


def test_without_a_configuration_file(workdir, tmp_path):
  """The records are those of a run that was always given its file."""
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
