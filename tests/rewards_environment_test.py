"""Worker processes have no credentials of the process that starts them."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from experiments import build
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import Workers, environment, isolated

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


CREDENTIALS = ['HF_TOKEN', 'WANDB_API_KEY', 'AWS_SECRET_ACCESS_KEY', 'MY_OWN']


def test_what_is_kept_and_what_is_not():
  kept = dict.fromkeys(
    ['PATH', 'HOME', 'LANG', 'LC_ALL', 'TMPDIR', 'LD_LIBRARY_PATH']
    + ['PYTHONHASHSEED', 'JAX_ENABLE_X64', 'XLA_FLAGS', 'CUDA_HOME', 'HF_HOME'],
    'x',
  )
  dropped = dict.fromkeys(
    ['HF_TOKEN', 'WANDB_API_KEY', 'AWS_ACCESS_KEY_ID', 'PGPASSWORD', 'SESSION']
    + ['HTTPS_PROXY', 'PYTHON_KEYRING_PASSWORD', 'JAX_TOKEN', 'LS_COLORS'],
    'x',
  )
  found = environment.scrubbed({**kept, **dropped}, ())
  assert kept.items() <= found.items() and not dropped.keys() & found.keys()
  assert found['JAX_PLATFORMS'] == 'cpu' and found['OMP_NUM_THREADS'] == '1'
  named = environment.scrubbed(
    {**dropped, 'OMP_NUM_THREADS': '3'}, ('SESSION', 'OMP_NUM_THREADS')
  )
  assert named['SESSION'] == 'x' and named['OMP_NUM_THREADS'] == '3'
  assert 'HF_TOKEN' not in named


def test_a_worker_reads_only_what_is_named(rewards, monkeypatch):
  for name in CREDENTIALS:
    monkeypatch.setenv(name, 'hunter2')
  wanted = {name: None for name in CREDENTIALS} | {'MY_OWN': 'hunter2'}
  wanted |= {'PATH': os.environ['PATH'], 'JAX_PLATFORMS': 'cpu'}
  with isolated(f'{rewards}:score', 1, environment=('MY_OWN',)) as workers:
    assert workers.submit([''], [json.dumps(wanted)], {}).result() == [1.0]


# Repeats what it should not, in the way that the completion says.
SAY = """
import os
from jaxrl_llm.errors import UserError
def score(completions, **columns):
  text = completions[0].replace('KEY', os.environ['MY_OWN'])
  if completions[0] == 'return':
    return [os.environ['MY_OWN']]
  raise (UserError if 'user' in text else ValueError)(text)
"""


@pytest.mark.parametrize(
  'completion, shown',
  [
    ('401 for https://api/v1?api_key=KEY', 'https://api/v1?api_key=***'),
    ('bad key KEY, my key', 'bad key ***, my key'),
    ('.' * 170 + 'KEY', '.***'),  # Where the message is cut off.
    ('a hf_' + 'x1' * 12, 'a ***'),
    ('user of KEY', 'user of ***'),
    ('return', "returned ['***']"),
  ],
)
def test_messages_of_a_worker_hide_credentials(
  completion, shown, tmp_path, monkeypatch
):
  monkeypatch.setenv('MY_OWN', 'hunter2-hunter2-hunter2')
  (tmp_path / 'say.py').write_text(SAY)
  name = f'{tmp_path / "say.py"}:score'
  workers = isolated(name, 1, environment=('MY_OWN',))
  with workers, pytest.raises(UserError) as caught:
    workers([''], [completion])
  said = str(caught.value).partition('(sample')[0]
  assert shown in said and 'hunter2' not in said and 'x1' not in said


def test_a_worker_that_does_not_load_hides_credentials(tmp_path, monkeypatch):
  monkeypatch.setenv('MY_OWN', 'hunter2')
  (tmp_path / 'say.py').write_text('import os\n{}[os.environ["MY_OWN"]]')
  with pytest.raises(UserError) as caught:
    isolated(f'{tmp_path / "say.py"}:f', 1, environment=('MY_OWN',))
  assert "KeyError: '***'" in str(caught.value)


@pytest.mark.parametrize(
  'part',
  ['?', 'sk-', '://a:', '&a1', 'eyJ-', 'eyJ-.', '"a":', '"a":[', "'a':\""],
)
def test_hiding_costs_no_more_than_the_length(part, monkeypatch):
  monkeypatch.setenv('ONE', '1')
  hide, text = environment.hiding(['ONE', 'NONE']), part * 50_000
  began = time.process_time()
  # Neither what is short nor what is not set.
  assert hide('1') == '1' and '***1' not in hide(text)
  assert time.process_time() - began < 1.0


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
from jaxrl_llm.rewards import isolated
with isolated({str(tmp_path / 'look.py:score')!r}, 1) as workers:
  print(workers([''], ['MY_OWN=hunter2']))
"""
  monkeypatch.setenv('MY_OWN', 'hunter2')
  command = [sys.executable, '-c', code]
  root = pathlib.Path(__file__).parents[1]
  found = subprocess.check_output(command, text=True, cwd=root)
  assert found == '[0.0]\n'


def _may_mount_proc():
  user = ['--user', '--map-root-user'] if os.geteuid() else []
  command = ['unshare', *user, '--pid', '--fork', '--mount-proc', 'true']
  return subprocess.run(command, capture_output=True).returncode == 0


def test_settings_are_not_on_the_command_line(rewards, marked):
  settings = {'api_key': 'hunter2'}
  with Workers(f'{rewards}:factory', settings, workers=1) as workers:
    assert workers.submit([''], ['{}'], {}).result() == [1.0]
    shown = [
      pathlib.Path(f'/proc/{pid}/cmdline').read_bytes() for pid in marked()
    ]
  assert any(b'jaxrl_llm.rewards.worker' in line for line in shown)
  assert not any(b'hunter2' in line for line in shown)


def test_large_settings_arrive(rewards):
  """Several times what a pipe holds."""
  settings = {'api_key': 'x' * 1_000_000}
  with Workers(f'{rewards}:factory', settings, workers=1) as workers:
    assert workers.submit([''], ['{}'], {}).result() == [1.0]


@pytest.mark.parametrize(
  'named, text',
  [
    ('OPENAI_API_KEY', 'no list of names'),
    (['sk-hunter2'], 'no list of names'),
    ([1], 'no list of names'),
    (['NOBODY_HAS_SET_THIS'], 'NOBODY_HAS_SET_THIS, which is not set'),
  ],
)
def test_wrong_names_are_refused(named, text, rewards):
  with pytest.raises(UserError, match=text) as caught:
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
