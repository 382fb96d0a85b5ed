"""The doctor on a sound installation, on a broken one, and on a run."""

import functools

import pytest
import scripts

from experiments import doctor
from jaxrl_llm.rollouts import responses

# What nobody should find in a bug report.
SECRETS = 'HF_TOKEN', 'AWS_SECRET_ACCESS_KEY', 'JAX_API_KEY', 'TPU_ACCESS_TOKEN'


def attempts(text):
  """Word and name of each attempt."""
  lines = [line.split(': ') for line in text.splitlines()]
  return [tuple(part[:2]) for part in lines if part[0] in ('ok', 'FAILED')]


def after(word):
  """All attempts, of which two can fail here."""
  fallible = (word, 'sampler = scorer'), (word, 'update')
  return [
    ('ok', 'devices'),
    ('ok', 'compiler'),
    *fallible,
    ('ok', 'checkpoint'),
  ]


def test_what_fails_is_told_and_the_rest_is_tried(monkeypatch, capsys):
  def broken(draw, *args, **kwargs):
    raise RuntimeError('no kernel\nfor this device')

  draw = responses._draw
  monkeypatch.setattr(responses, '_draw', functools.partial(broken, draw))
  for name in SECRETS:
    monkeypatch.setenv(name, f'{name}_1234')
  monkeypatch.setenv('NCCL_P2P_LEVEL', 'NVL')
  assert doctor.report() == 1
  said = capsys.readouterr().out
  assert attempts(said) == after('FAILED')
  assert 'RuntimeError: no kernel; for this device (' in said
  assert 'NCCL_P2P_LEVEL=NVL' in said and 'JAX_' in said
  assert '1234' not in said
  for part in ('python 3', 'jax ', 'orbax-checkpoint ', 'cpu device(s)'):
    assert part in said, part


def write_run(folder, **changes):
  """Records of a run of two warm-start steps and twelve of RL."""
  records = [{'step': i, 'warm_start/loss': 2.0} for i in (1, 2)]
  records += [
    {'step': i, 'reward': i / 20, 'loss': 0.1, 'approx_kl': 0.01, **changes}
    for i in range(3, 15)
  ]
  folder.mkdir(exist_ok=True)
  scripts.write_rows(folder / 'metrics.jsonl', records)
  return folder


def test_health_of_a_run(tmp_path):
  folder = write_run(tmp_path / 'run', approx_kl=0.4)
  line, warning = doctor.of_run(folder)
  assert line == f'{folder}: step 14 look: kl | kl 0.4'
  assert 'KL run-away' in warning and 'learning_rate' in warning
  lines = (folder / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (folder / 'metrics.jsonl').write_text(''.join(lines[:2]))
  (line,) = doctor.of_run(folder)
  assert line == f'{folder}: no step of the main phase yet'


@pytest.mark.slow
def test_the_script(tmp_path):
  ended = scripts.run(
    'doctor', f'--workdir={write_run(tmp_path / "run")}', cache=scripts.cache()
  )
  assert ended.code == 0, ended.err
  assert attempts(ended.out) == after('ok')
  assert ended.out.endswith('run: step 14 well | kl 0.01\n')
