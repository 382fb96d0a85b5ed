"""Replays of steps: equal to their records, in an untouched folder."""

import json
import shutil

import numpy as np
import pytest
import scripts

from experiments import replay
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import read_samples
from tests.experiments import (
  resume_branches_test,
  resume_offline_test,
  reward_model_script_test,
)

# Between the last two checkpoints, so that few steps lead there.
MIDDLE = scripts.TOTAL - 3


@pytest.fixture
def workdir(tmp_path):
  """A copy of the tiny run, whose records and checkpoints may be changed."""
  folder = tmp_path / 'run'
  shutil.copytree(scripts.undisturbed(), folder)
  return folder


def contents(folder):
  """Bytes and times of change of everything below a folder."""
  return {
    path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
    for path in [folder, *folder.rglob('*')]
  }


def steps_kept(folder, below=scripts.TOTAL):
  found = sorted(int(path.name) for path in (folder / 'checkpoints').iterdir())
  return [step for step in found if step < below]


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


def test_an_output_that_cannot_be_is_refused_before_anything_is_done(workdir):
  before = contents(workdir)
  (workdir.parent / 'file').touch()
  for output, text in (
    (workdir, 'in the folder of a run'),
    (workdir / 'replays' / '2', 'in the folder of a run'),
    (workdir.parent / 'file', 'cannot be written'),
  ):
    with pytest.raises(UserError, match=text) as error:
      replay.replay(workdir, 2, output, trust_code=True)
    assert len(str(error.value).splitlines()) == 2
  assert contents(workdir) == before


@pytest.mark.slow
def test_what_a_step_of_rl_was_made_of_is_written(workdir, tmp_path, capsys):
  old, record = tamper(workdir, MIDDLE, 'loss')
  before, output = contents(workdir), tmp_path / 'output'
  assert replay.replay(workdir, MIDDLE, output, trust_code=True) == 1
  assert contents(workdir) == before
  start = steps_kept(workdir, MIDDLE)[-1]
  names = [n for n in record if n != 'step' and not n.startswith('eval/')]
  said = capsys.readouterr().out.splitlines()
  assert said == [
    f'{workdir}: step {MIDDLE}, {MIDDLE - start} from checkpoint {start}',
    f'1 of {len(names)} metrics differ',
    f'loss: {record["loss"]!r} recorded, {old!r} now',
    f'{output}: record.json, parameters.jsonl, batch.npz, samples.jsonl, '
    'samples.html',
  ]
  check_output(output, record)


def check_output(output, record):
  """Asserts that what was written belongs together and to the record."""
  numbers = json.loads((output / 'record.json').read_text())
  assert numbers['now']['reward'] == record['reward']
  batch = np.load(output / 'batch.npz')
  shape = scripts.PROMPTS, scripts.SAMPLES
  assert batch['mask'].shape[:2] == batch['rewards'].shape == shape
  assert batch['mask'].sum() / 16 == record['completions/mean_length']
  assert batch['valid'].all() and (batch['lengths'] > 0).all()
  parts = batch['rewards/symbols'] + 0.5 * batch['rewards/correct']
  np.testing.assert_allclose(batch['rewards'], parts, rtol=1e-12)
  np.testing.assert_allclose(batch['rewards'].mean(), record['reward'], 1e-6)
  samples = read_samples(output / 'samples.jsonl')
  assert [s.reward for s in samples] == batch['rewards'].reshape(-1).tolist()
  changes = list(
    map(json.loads, (output / 'parameters.jsonl').read_text().splitlines())
  )
  assert all(0 < each['change'] < each['norm'] for each in changes)
  layers = [each for each in changes if 'change_by_layer' in each]
  for each in layers:
    assert np.linalg.norm(each['change_by_layer']) == pytest.approx(
      each['change']
    )
  assert 0 < len(layers) < len(changes)


@pytest.mark.slow
@pytest.mark.parametrize(
  'step', [3, scripts.WARM, scripts.WARM + 1, MIDDLE, scripts.TOTAL]
)
def test_every_kind_of_step_is_identical(step, capsys):
  workdir = scripts.undisturbed()
  before = contents(workdir)
  assert replay.replay(workdir, step, trust_code=True) == 0
  assert contents(workdir) == before
  first, last = capsys.readouterr().out.splitlines()
  start = max([0, *steps_kept(workdir, step)])
  origin = f'checkpoint {start}' if start else 'the beginning'
  assert first == f'{workdir}: step {step}, {step - start} from {origin}'
  assert last.startswith('identical: ')


@pytest.mark.slow
def test_a_warm_start_leaves_its_parameters(tmp_path):
  workdir, output = scripts.undisturbed(), tmp_path / 'output'
  assert replay.replay(workdir, 2, output, trust_code=True) == 0
  names = sorted(path.name for path in output.iterdir())
  assert names == ['parameters.jsonl', 'record.json']


def refusal(workdir, step):
  with pytest.raises(UserError) as error:
    replay.replay(workdir, step, trust_code=True)
  assert len(str(error.value).splitlines()) <= 3
  return str(error.value)


@pytest.mark.parametrize('step', [0, -1, scripts.TOTAL + 1])
def test_no_such_step(step):
  workdir = scripts.undisturbed()
  text = refusal(workdir, step)
  assert f'no record of step {step}\n' in text
  assert f'1 to {scripts.TOTAL}' in text


def test_no_run(tmp_path):
  assert f'{tmp_path} holds no run' in refusal(tmp_path, 1)


@pytest.mark.parametrize('now', ['changed', 'missing'])
def test_other_code(now, workdir):
  path = workdir / 'starts.jsonl'
  env = json.loads(path.read_text().splitlines()[-1])
  (reward,) = env['code_sha256']
  if now == 'missing':
    env['code_sha256'] = {'gone.py': env['code_sha256'][reward]}
  else:
    env['code_sha256'][reward] = '0' * 64
  path.write_text(json.dumps(env))
  name = 'gone.py' if now == 'missing' else reward
  assert f'{name} is {now} since the run' in refusal(workdir, 3)


def test_no_checkpoint_verifies(workdir):
  """The message has the run's folder, not the one that the replay works in."""
  for manifest in workdir.glob('checkpoints/*/manifest/data.json'):
    manifest.write_text('{}')
  text = refusal(workdir, MIDDLE)
  assert f'No checkpoint in {workdir}/checkpoints verifies.' in text


def train(script, config, folder, *flags):
  ended = scripts.run(
    script,
    f'--config={config}',
    f'--workdir={folder}',
    *flags,
    cache=scripts.cache(),
  )
  assert ended.code == 0, ended.err


def identical(workdir, steps):
  """Asserts that steps are as recorded, in an unchanged folder."""
  before = contents(workdir)
  for step in steps:
    assert replay.replay(workdir, step, trust_code=True) == 0, step
  assert contents(workdir) == before


@pytest.mark.slow
@pytest.mark.parametrize('name', ['ppo', 'tree'])
def test_steps_with_branches_and_a_critic(name, tmp_path):
  algorithm = resume_branches_test.ALGORITHMS[name]
  text = scripts.CONFIG.replace("dict(name='grpo', kl=0.04)", repr(algorithm))
  config = scripts.write_config(tmp_path / 'config', text)
  train('train', config, tmp_path / 'run')
  identical(tmp_path / 'run', [scripts.WARM + 1, MIDDLE, scripts.TOTAL])


@pytest.mark.slow
@pytest.mark.parametrize('name', resume_offline_test.RUNS)
def test_steps_of_other_scripts(name, tmp_path):
  """Both kinds of step of a round, whose files are the run's or made anew."""
  script, algorithm, lines = resume_offline_test.RUNS[name]
  config = resume_offline_test.write_config(
    tmp_path / 'config', algorithm, lines
  )
  train(script, config, tmp_path / 'run')
  warm = 0 if name == 'given pairs' else scripts.WARM
  identical(tmp_path / 'run', [warm + 1, warm + 8, warm + 11])


@pytest.mark.slow
def test_steps_with_data_tools(tmp_path):
  """Hints, refilling and a curriculum, as in `collection_steps_test`."""
  text = scripts.CONFIG.replace(
    "REWARD:symbols'", "REWARD:symbols', weight=0.0"
  )
  flags = [
    '--config.warm_start.steps=0',
    '--config.rollout.refill=2',
    '--config.rollout.hints=(0.5,)',
    '--config.prompts.curriculum=operations',
    '--config.prompts.curriculum_steps=6',
    '--config.prompts.curriculum_stages=3',
    '--config.steps=9',
  ]
  config = scripts.write_config(tmp_path / 'config', text)
  train('train', config, tmp_path / 'run', *flags)
  identical(tmp_path / 'run', [1, 7, 9])


@pytest.mark.slow
def test_a_changed_checkpoint_is_passed_over(tmp_path, capsys, caplog):
  """The run is a reward model's, with checkpoints of steps 10 and 20."""
  config = reward_model_script_test.a_config(tmp_path)
  workdir = tmp_path / 'run'
  reward_model_script_test.train(config, workdir)
  identical(workdir, [1, 25])
  assert 'step 25, 5 from checkpoint 20\n' in capsys.readouterr().out
  files = (workdir / 'checkpoints' / '00000020').rglob('d/*')
  path = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  identical(workdir, [25])
  assert 'step 25, 15 from checkpoint 10\n' in capsys.readouterr().out
  assert 'Checkpoint step 20 does not verify' in caplog.text
