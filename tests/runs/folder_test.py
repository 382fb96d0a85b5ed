"""Run folders: locks, configurations, and the environment."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import folder as run_folder

# Takes the lock, forks a child that outlives it, and waits.
OWNER = """
import os, sys, time
from jaxrl_llm.runs import folder as run_folder
run = run_folder.open_run(sys.argv[1], False, {'steps': 1})
if os.fork() == 0:  # It reports itself, so that it has let go of the lock.
  print(os.getpid(), flush=True)
time.sleep(60)
"""


def begin(workdir, config):
  """Leaves the folder of a run that has completed a step."""
  with run_folder.open_run(workdir, False, config) as run:
    run.describe(0)
  (workdir / 'metrics.jsonl').write_text('{"step": 1}\n')


def stored(workdir):
  return json.loads((workdir / 'config.json').read_text())


def lines(error):
  return str(error.value).splitlines()


def test_new_folder_holds_config_and_environment(tmp_path):
  given = {'seed': 3, 'model': {'sizes': (1, 2)}}
  # To resume an empty folder is to begin.
  with run_folder.open_run(tmp_path / 'a' / 'b', True, given) as run:
    assert not run.resuming
    assert stored(run.path) == {'seed': 3, 'model': {'sizes': [1, 2]}}
    run.describe(0)
    with pytest.raises(UserError, match='in use'):
      run_folder.open_run(run.path, True, given)
  (env,) = run_folder.read_starts(run.path)
  assert env['step'] == 0 and env['config'] == stored(run.path)
  assert env['versions']['jax'] == __import__('jax').__version__
  assert env['device_count'] >= 1
  assert not list(run.path.glob('*.tmp'))


def test_environment_keeps_secrets_out(tmp_path, monkeypatch):
  monkeypatch.setenv('SOME_TOKEN', 'hunter2')
  for secret in (['--hub_token=hunter2'], ['--config.rewards.j.apiKey', 'x']):
    monkeypatch.setattr(sys, 'argv', ['train', *secret])
    found = run_folder.environment()
    assert 'hunter2' not in json.dumps(found) and found['command'] is None
  command = ['train', '--config.rollout.max_tokens=4']
  monkeypatch.setattr(sys, 'argv', command)
  assert run_folder.environment()['command'] == command


def test_a_living_owner_is_named_and_a_killed_one_replaced(tmp_path):
  command = [sys.executable, '-W', 'ignore', '-c', OWNER, tmp_path / 'run']
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env=environment
  ) as process:
    child, start = int(process.stdout.readline()), time.monotonic()
    with pytest.raises(UserError) as error:
      run_folder.open_run(tmp_path / 'run', True, {'steps': 1})
    assert time.monotonic() - start < 5
    message = lines(error)
    assert len(message) <= 3
    assert f'pid {process.pid} on ' in message[0] and ' since 20' in message[0]
    assert '--workdir' in message[-1]
    process.kill()
  try:
    with run_folder.open_run(tmp_path / 'run', True, {'steps': 1}) as run:
      assert run.resuming
      assert str(os.getpid()) in (run.path / 'lock').read_text()
  finally:
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize('records', ['{"step": 1}\n', '{"st\n{"step": 2}\n'])
def test_a_run_is_not_started_over(tmp_path, records):
  """Damaged records are a run's too; a refusal gives the lock back."""
  begin(tmp_path, {'steps': 1})
  (tmp_path / 'metrics.jsonl').write_text(records)
  for _ in range(2):
    with pytest.raises(UserError, match='already holds a run') as error:
      run_folder.open_run(tmp_path, False, {'steps': 1})
    assert '--resume' in lines(error)[1]
  run_folder.open_run(tmp_path, True, {'steps': 1}).close()


def test_a_run_without_a_step_starts_afresh(tmp_path):
  """Its first reward failed, say: the corrected configuration may use it."""
  run_folder.open_run(tmp_path, False, {'steps': 1}).close()
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "eval/reward": 0.5}\n')
  with run_folder.open_run(tmp_path, False, {'steps': 2}) as run:
    assert run.resuming
    run.describe(0)
  assert stored(tmp_path) == {'steps': 2}


def test_resume_compares_the_configuration(tmp_path):
  old = {'steps': 5, 'log': {'every': 1, 'rows': 2}, 'lr': 0.1, 'a': {'b': 1}}
  new = {'steps': 9, 'log': {'every': 7, 'rows': 3}, 'lr': 0.2, 'a': {'c': 1}}
  allowed = {'steps', 'log'}
  begin(tmp_path, old)
  with pytest.raises(UserError) as error:
    run_folder.open_run(tmp_path, True, new, allowed)
  message = lines(error)
  assert len(message) == 3
  shown = 'a.b was 1, is absent; a.c was absent, is 1; lr was 0.1, is 0.2.'
  assert message[1] == shown
  assert stored(tmp_path) == old
  new.update(lr=0.1, a={'b': 1})
  with run_folder.open_run(tmp_path, True, new, allowed) as run:
    # It may be refused later on, for what else the folder holds.
    assert stored(tmp_path) == old
    run.describe(1)
  assert stored(tmp_path) == new
  changed = run_folder.read_starts(tmp_path)[-1]['changed']
  assert changed['steps'] == [5, 9] and changed['log.every'] == [1, 7]
  with pytest.raises(UserError, match='and 6 more'):
    run_folder.open_run(tmp_path, True, new | dict.fromkeys('ghijklmno', 0))


def test_changed_code_is_told_once(tmp_path):
  file = tmp_path / 'a.py'
  file.write_text('x = 1')

  def notes(config):
    with run_folder.open_run(
      tmp_path / 'run', True, config, code=[file]
    ) as run:
      run.describe(1)
      return run.notes

  assert notes({}) == []
  (tmp_path / 'run' / 'metrics.jsonl').write_text('{"step": 1}\n')
  assert notes({}) == []
  file.write_text('x = 2')
  # A resume that is refused has not told.
  with pytest.raises(UserError):
    notes({'steps': 1})
  assert [str(file) in note for note in notes({})] == [True]
  assert notes({}) == []
  # Records that prove nothing: of an older version, and damaged.
  for text in ('{}', '{', '[]'):
    file.write_text(text)
    (tmp_path / 'run' / 'starts.jsonl').write_text(f'{text}\n')
    assert notes({}) == []


def test_another_jax_or_device_is_said(tmp_path, monkeypatch):
  begin(tmp_path, {})
  environment = run_folder.environment()
  environment['versions'] |= {'jax': '9.9', 'numpy': '9.9'}
  environment |= {'device_kind': 'H200', 'device_count': 8}
  monkeypatch.setattr(run_folder, 'environment', lambda: environment)
  with run_folder.open_run(tmp_path, True, {}) as run:
    said = ' '.join(run.notes)
  assert 'jax was ' in said and 'is 9.9' in said and 'numpy' not in said
  assert 'is H200' in said and 'device_count was' in said


def test_what_cannot_be_used_is_named(tmp_path):
  with pytest.raises(UserError, match='JSON'):
    run_folder.open_run(tmp_path / 'run', False, {'x': float('nan')})
  assert not (tmp_path / 'run').exists()
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file cannot be used'):
    run_folder.open_run(tmp_path / 'file', False, {})
  for text in ('{"steps": ', '[1]'):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(UserError, match='config.json is not a JSON config'):
      run_folder.open_run(tmp_path, True, {})
  (tmp_path / 'config.json').unlink()
  with run_folder.open_run(tmp_path, False, {}) as run:
    (tmp_path / 'config.json').unlink()
    (tmp_path / 'config.json').mkdir()
    with pytest.raises(UserError, match='cannot be used: Is a directory'):
      run.describe(0)
