"""Worker processes get the environment variables they need, no others."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from experiments import build, checks
from experiments.configs import base
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import Workers

# Scores 1 if the completion, a JSON object of variables, is its environment's.
SCORE = """
import json, os
def score(completions, **columns):
  wanted = json.loads(completions[0])
  return [float(wanted == {name: os.environ.get(name) for name in wanted})]
def factory(api_key):
  return score
"""


@pytest.fixture
def rewards(tmp_path):
  (tmp_path / 'own.py').write_text(SCORE)
  return f'{tmp_path / "own.py"}'


DROPPED = ['HF_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY', 'PGPASSWORD']
DROPPED += ['HTTPS_PROXY', 'PYTHON_KEYRING_PASSWORD', 'LS_COLORS', 'SESSION']
KEPT = ['LC_ALL', 'PYTHONHASHSEED', 'JAX_ENABLE_X64', 'XLA_FLAGS', 'CUDA_HOME']
KEPT += ['HF_HOME', 'HF_HUB_CACHE', 'LD_LIBRARY_PATH', 'XDG_CACHE_HOME']


def test_a_worker_reads_only_what_is_named(rewards, monkeypatch):
  named = ('MY_OWN', 'HF_TOKEN', 'MKL_NUM_THREADS')
  for name in (*DROPPED, *KEPT, *named):
    monkeypatch.setenv(name, '3')
  wanted = dict.fromkeys(DROPPED) | dict.fromkeys([*KEPT, *named], '3')
  wanted |= {'PATH': os.environ['PATH'], 'JAX_PLATFORMS': 'cpu'}
  wanted |= {'OMP_NUM_THREADS': '1'}
  with Workers(f'{rewards}:score', workers=1, environment=named) as workers:
    assert workers.submit([''], [json.dumps(wanted)], {}).result() == [1.0]


# Scores the processes that it finds in whose environment the completion stands.
LOOK = """
import os, pathlib
def score(completions, **columns):
  assert os.getpid() < 10 and pathlib.Path('/proc/self/stat').exists()
  found = 0
  for place in pathlib.Path('/proc').glob('[0-9]*/environ'):
    try:
      found += completions[0].encode() in place.read_bytes()
    except OSError:
      pass
  return [found]
"""


def test_a_worker_does_not_see_its_parents_environment(
  tmp_path, monkeypatch, allowed_kinds
):
  """Which /proc/PID/environ holds as it was when that process began.

  So the parent is a process of its own.
  """
  if 'namespace' not in allowed_kinds or not _may_mount_proc():
    pytest.skip('the kernel does not allow it')
  (tmp_path / 'look.py').write_text(LOOK)
  code = f"""
from jaxrl_llm.rewards import Workers
with Workers({str(tmp_path / 'look.py:score')!r}, workers=1) as workers:
  print(workers([''], ['MY_OWN=hunter2']))
"""
  monkeypatch.setenv('MY_OWN', 'hunter2')
  command = [sys.executable, '-c', code]
  root = pathlib.Path(__file__).parents[2]
  found = subprocess.check_output(command, text=True, cwd=root)
  assert found == '[0.0]\n'


def _may_mount_proc():
  user = ['--user', '--map-root-user'] if os.geteuid() else []
  command = ['unshare', *user, '--pid', '--fork', '--mount-proc', 'true']
  return subprocess.run(command, capture_output=True).returncode == 0


def test_settings_are_not_on_the_command_line(rewards, marked):
  settings = {'api_key': 'hunter2' * 150_000}  # Several times a pipe's size.
  with Workers(f'{rewards}:factory', settings, workers=1) as workers:
    assert workers.submit([''], ['{}'], {}).result() == [1.0]
    shown = [
      pathlib.Path(f'/proc/{pid}/cmdline').read_bytes() for pid in marked()
    ]
  assert any(b'jaxrl_llm.rewards.worker' in line for line in shown)
  assert not any(b'hunter2' in line for line in shown)


@pytest.mark.parametrize(
  'named',
  ['PATH', ['sk-hunter2'], [1], ['PATH', 'NOBODY_HAS_SET_THIS']],
)
def test_wrong_names_are_refused(named, rewards):
  with pytest.raises(UserError, match='must list names') as caught:
    Workers(f'{rewards}:score', field='config.rewards.j', environment=named)
  message = str(caught.value)
  assert message.startswith('config.rewards.j: environment')
  assert len(message.splitlines()) <= 3 and 'hunter2' not in message


def test_the_configuration_names_variables(rewards, monkeypatch):
  monkeypatch.setenv('MY_OWN', 'hunter2')
  spec = dict(name=f'{rewards}:score', workers=1, environment=('MY_OWN',))
  config = ConfigDict(dict(rewards=ConfigDict(dict(j=ConfigDict(spec)))))
  (part,) = build.reward_parts(config)
  with part.function as workers:
    assert workers([''], [json.dumps({'MY_OWN': 'hunter2'})]) == [1.0]


@pytest.mark.parametrize(
  'section, name',
  [
    ('rewards', 'j.api_key'),
    ('rewards', 'j.headers.Authorization'),
    ('rewards', 'j.HF_TOKEN'),
    ('task', 'password'),
    ('algorithm', 'clientSecret'),
  ],
)
def test_a_secret_in_the_configuration_is_refused(section, name):
  def made(value):
    for part in reversed(name.split('.')):
      value = {part: value}
    config = base.get_config()
    config[section] = ConfigDict({'name': 'x', **value})
    return config

  with pytest.raises(UserError, match=f'{section}.{name} looks') as caught:
    checks.check_fields(made('hunter2'))
  message = str(caught.value)
  assert len(message.splitlines()) <= 3 and 'hunter2' not in message
  for harmless in ('', 7):
    checks.check_fields(made(harmless))


def test_what_only_resembles_a_secret_is_accepted():
  config = base.get_config()
  names = ['pad_token', 'api_key_file', 'tokenizer', 'key', 'author', 'tokens']
  config.task = ConfigDict(dict.fromkeys(names, 'x'))
  checks.check_fields(config)
