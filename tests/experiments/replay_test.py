"""Replays of steps: equal to their records, in an untouched folder."""

import json

import mistakes
import numpy as np
import pytest
import scripts

from experiments import replay
from jaxrl_llm.runs import read_samples

# Between the last two checkpoints, so that few steps lead there.
MIDDLE = scripts.TOTAL - 3


def contents(folder):
  """Bytes and times of change of everything below a folder."""
  return {
    path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
    for path in [folder, *folder.rglob('*')]
  }


def tamper(folder, step, name):
  """Changes the last bit of a metric in the records."""
  path = folder / 'metrics.jsonl'
  lines = path.read_text().splitlines()
  record = json.loads(lines[step - 1])
  assert record['step'] == step
  old = record[name]
  record[name] = float(np.nextafter(old, np.inf))
  lines[step - 1] = json.dumps(record)
  path.write_text('\n'.join(lines) + '\n')
  return old, record


def test_a_tampered_metric_is_the_only_one_that_differs(workdir, capsys):
  old, record = tamper(workdir, 2, 'warm_start/loss')
  before = contents(workdir)
  assert replay.replay(workdir, 2, trust_code=True) == 1
  assert contents(workdir) == before
  said = capsys.readouterr().out.splitlines()
  assert said == [
    f'{workdir}: step 2, 2 from the beginning',
    f'1 of {len(record) - 1} metrics differ',
    f'warm_start/loss: {record["warm_start/loss"]!r} recorded, {old!r} now',
  ]


@pytest.mark.slow
def test_what_a_step_of_rl_was_made_of_is_written(workdir, tmp_path, capsys):
  old, record = tamper(workdir, MIDDLE, 'loss')
  before, output = contents(workdir), tmp_path / 'output'
  assert replay.replay(workdir, MIDDLE, output, trust_code=True) == 1
  assert contents(workdir) == before
  said = capsys.readouterr().out
  assert f'loss: {record["loss"]!r} recorded, {old!r} now\n' in said
  numbers = json.loads((output / 'record.json').read_text())
  assert numbers['now']['reward'] == record['reward']
  batch = np.load(output / 'batch.npz')
  assert batch['mask'].sum() / 16 == record['completions/mean_length']
  parts = batch['rewards/symbols'] + 0.5 * batch['rewards/correct']
  np.testing.assert_allclose(batch['rewards'], parts, rtol=1e-12)
  np.testing.assert_allclose(batch['rewards'].mean(), record['reward'], 1e-6)
  samples = read_samples(output / 'samples.jsonl')
  assert [s.reward for s in samples] == batch['rewards'].reshape(-1).tolist()
  changes = scripts.records(output, 'parameters.jsonl')
  assert all(0 < each['change'] < each['norm'] for each in changes)
  layers = [each for each in changes if 'change_by_layer' in each]
  assert 0 < len(layers) < len(changes)
  for each in layers:
    norm = np.linalg.norm(each['change_by_layer'])
    assert norm == pytest.approx(each['change'])


@pytest.mark.slow
def test_every_kind_of_step_is_identical(tmp_path):
  workdir, output = scripts.undisturbed(), tmp_path / 'output'
  identical(workdir, [3, scripts.WARM, scripts.WARM + 1, scripts.TOTAL])
  # A warm start has no batch.
  assert replay.replay(workdir, 2, output, trust_code=True) == 0
  names = sorted(path.name for path in output.iterdir())
  assert names == ['parameters.jsonl', 'record.json']


def refusal(workdir, step, *texts):
  with mistakes.refused(*texts):
    replay.replay(workdir, step, trust_code=True)


def test_no_such_step_or_code(workdir, tmp_path):
  refusal(tmp_path, 1, f'{tmp_path} holds no run')
  step = scripts.TOTAL + 1
  refusal(workdir, step, f'no record of step {step}\n', f'1 to {scripts.TOTAL}')
  path = workdir / 'starts.jsonl'
  env = json.loads(path.read_text().splitlines()[-1])
  (reward,) = env['code_sha256']
  for name, digest, now in (
    (reward, '0' * 64, 'changed'),
    ('gone.py', env['code_sha256'][reward], 'missing'),
  ):
    env['code_sha256'] = {name: digest}
    path.write_text(json.dumps(env))
    refusal(workdir, 3, f'{name} is {now} since the run')


def identical(workdir, steps):
  """Asserts that steps are as recorded, in an unchanged folder."""
  before = contents(workdir)
  for step in steps:
    assert replay.replay(workdir, step, trust_code=True) == 0, step
  assert contents(workdir) == before
