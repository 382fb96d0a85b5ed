"""Credentials are told from what only looks like one, and nothing is stored."""

import json
import sys

import pytest

from jaxrl_llm import credentials, run_folder
from jaxrl_llm.errors import UserError

SECRET = 'hunter2'
TOKEN = 'hf_' + 'a1B2' * 8


@pytest.mark.parametrize(
  'name',
  [
    *('token', 'hub_token', 'HF_TOKEN', 'HFToken', 'GITHUB_TOKEN_2'),
    *('api_key', 'apikey', 'apiKey', 'OPENAI_API_KEY', 'AWS_ACCESS_KEY_ID'),
    *('private_key', 'password', 'db_passwd', 'client_secret', 'auth'),
    *('WANDB_KEY', 'openai_key', 'OPENAI_KEY_2', 'SOME_KEY', 'DB_PASS'),
    *('db_pass', 'PGPASS', 'PGPASSWORD', 'GH_PAT', 'github_pat'),
    *('SLACK_WEBHOOK', 'slack_webhook_url'),
    *('Authorization', 'GOOGLE_CREDENTIALS', 'config.rewards.j.auth'),
  ],
)
def test_names_of_credentials(name):
  assert credentials.is_name(name)


@pytest.mark.parametrize(
  'name',
  [
    *('max_tokens', 'config.tokens', 'every_tokens', 'pad_token'),
    *('eos_token_id', 'token_mean', 'key', 'keys', 'author', 'monkey'),
    *('api_key_file', 'password_env', 'secret_word.weight', 'tokenizer', ''),
    *('sort_key', 'num_keys', 'key_heads', 'num_key_value_heads', 'KEY'),
    *('pass_rates', 'max_pass_rate', 'forward_pass', 'pattern', 'PAT'),
    *('webhook_file', 'hooks', 'wandb', 'wandb_project', 'openai_url'),
    *('turkey_token_id', 'keep_latest', 'LC_ALL'),
  ],
)
def test_names_of_other_things(name):
  assert not credentials.is_name(name)


# Arguments → what is shown of them; None for the same.
COMMANDS = [
  ([f'--hub_token={SECRET}'], ['--hub_token=***']),
  (['--hub_token', SECRET, '--n=4'], ['--hub_token', '***', '--n=4']),
  (['--hub_token', '--n=4', 'x'], None),
  (['-password', f'-{SECRET}'], ['-password', '***']),
  ([f'--config.rewards.j.auth={SECRET}'], ['--config.rewards.j.auth=***']),
  (
    [f'--config.model.path=https://me:{SECRET}@host/m'],
    ['--config.model.path=https://***@host/m'],
  ),
  ([f'https://{SECRET}@host'], ['https://***@host']),
  ([f'redis://me:{SECRET}@host'], ['redis://***@host']),
  (['ssh://git@host/repository'], None),
  (
    [f'--judge=http://h/?model=a&api_key={SECRET}&n=1'],
    ['--judge=http://h/?model=a&api_key=***&n=1'],
  ),
  ([f'--x={TOKEN}'], ['--x=***']),
  (['--say=Bearer ' + 'x9' * 10], ['--say=***']),
  (['--x', 'AIza' + 'x_-9z' * 7], ['--x', '***']),
  (['--x=ASIA' + 'Z9' * 8], ['--x=***']),
  (['eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefgh'], ['***']),
  (
    [f'--config.rewards.j.settings={{"api_key":"{SECRET}","n":1}}'],
    ['--config.rewards.j.settings={"api_key":"***","n":1}'],
  ),
  (
    [f"--settings={{'a': {{'db_pass' : 'x\\'{SECRET}', 'n': 'x'}}}}"],
    ["--settings={'a': {'db_pass' : \"***\", 'n': 'x'}}"],
  ),
  (
    [f'--settings={{"api_keys": ["{SECRET}", "{SECRET}"], "pwd": 12}}'],
    ['--settings={"api_keys": "***", "pwd": "***"}'],
  ),
  (['--settings={"max_tokens": 5, "key": "a", "n": {"a": [1]}}'], None),
  (['--config.rollout.max_tokens=12', '--config.tokens=5'], None),
  (['--config.evaluation.every_tokens', '12'], None),
  (['--config.tokenizer=gpt2', 'hub_token'], None),
]


@pytest.mark.parametrize('given, shown', COMMANDS)
def test_command_lines_keep_credentials_to_themselves(
  given, shown, monkeypatch
):
  monkeypatch.setattr(sys, 'argv', ['train', *given])
  found = run_folder.environment()['command']
  assert SECRET not in str(found) and TOKEN not in str(found)
  assert found == ['train', *(given if shown is None else shown)]


@pytest.mark.parametrize(
  'settings, name',
  [
    (dict(rewards=dict(j=dict(api_key=SECRET))), 'rewards.j.api_key'),
    (
      dict(j=[dict(headers=dict(Authorization=SECRET))]),
      'j.headers.Authorization',
    ),
    (dict(url=f'https://me:{SECRET}@host'), 'url'),
    (dict(a=dict(b=['x', TOKEN])), 'a.b'),
    (dict(password=1234), 'password'),
  ],
)
def test_a_credential_in_the_configuration_is_refused(settings, name, tmp_path):
  with pytest.raises(UserError, match=f'config.{name} looks') as caught:
    run_folder.open_run(tmp_path / 'run', False, settings)
  message = str(caught.value)
  assert len(message.splitlines()) <= 3 and 'environment=' in message
  assert SECRET not in message and TOKEN not in message
  stored = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert not any(SECRET in path.read_text() for path in stored)


def test_what_is_no_credential_is_stored(tmp_path):
  settings = dict(
    tokens=5,
    token=7,  # of a vocabulary
    auth=False,
    api_key='',
    environment=['OPENAI_API_KEY'],
    pass_rates='rates.jsonl',
    api_key_env='OPENAI_API_KEY',
    rollout=dict(max_tokens=12),
    url='https://host/path?model=a',
    template='Answer in JSON: {"password": "…"}',
    text='ask the bearer of the ring; what about task-oriented sk- words?',
  )
  run_folder.open_run(tmp_path, False, settings).close()
  assert json.loads((tmp_path / 'config.json').read_text()) == settings
