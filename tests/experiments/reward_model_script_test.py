"""Reward models from files of pairs: learned, exported, judged, resumed."""

import json
import shutil

import mistakes
import numpy as np
import pytest
import scripts

from experiments import build, reward_model, run
from experiments.configs import base
from jaxrl_llm import runs
from jaxrl_llm.evaluation import calibration
from jaxrl_llm.rewards import learned

STEPS = 30


def rows(count, seed):
  """More ones are better; the lengths tell nothing, and some are cut off."""
  random = np.random.default_rng(seed)
  found = []
  for i in range(count):
    length, more = random.integers(3, 6), random.integers(2, 4)
    texts = []
    for ones in (more, more - 2):
      text = np.array(['1'] * ones + ['2'] * (length - ones))
      texts.append(''.join(random.permutation(text)))
    finished = {'rejected_finished': bool(i % 2), 'chosen_finished': i % 3 > 0}
    pair = dict(zip(('chosen', 'rejected'), texts, strict=True))
    found.append({'prompt': f'{seed}{i}=', **pair, **finished})
  return found


def write(path, found):
  path.write_text(''.join(json.dumps(row) + '\n' for row in found))
  return str(path)


def a_config(folder, train=None, held_out=None):
  config = base.get_config()
  config.model.alphabet = '0123456789='
  config.model.architecture = dict(
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    tied=True,
    max_length=32,
  )
  config.task = dict(
    name='jsonl',
    train=write(folder / 'train.jsonl', train or rows(96, 1)),
    held_out=write(folder / 'held_out.jsonl', held_out or rows(40, 2)),
  )
  config.algorithm = dict(name='reward_model')
  config.prompts.max_tokens, config.rollout.max_tokens = 8, 8
  config.rounds.batch = 16
  config.steps = STEPS
  config.optimizer = base.optimizer(1e-2)
  config.evaluation.update(every=10, prompts=0)
  config.checkpoints.update(every=10, keep_latest=5)
  return config


def train(config, folder, resume=False):
  assert run.train(reward_model.SCRIPT, config.lock(), folder, resume) == 0


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(configuration, folder) of a run done in one go."""
  folder = tmp_path_factory.mktemp('reward_model')
  config = a_config(folder)
  train(config, folder / 'run')
  return config, folder / 'run'


def test_it_learns_what_is_preferred(whole):
  records = runs.read_metrics(whole[1] / 'metrics.jsonl')
  evaluated = [r for r in records if 'eval/accuracy' in r]
  assert [r['step'] for r in evaluated] == [0, 10, 20, 30]
  # The head begins at 0: all scores are equal.
  first, last = evaluated[0], evaluated[-1]
  assert first['eval/accuracy'] == 0.5
  assert first['eval/log_loss'] == pytest.approx(np.log(2))
  assert last['eval/accuracy'] > 0.9 and last['eval/log_loss'] < 0.4
  assert last['score/margin'] > 1
  assert last['rounds/epoch'] == STEPS * 16 / 96
  assert all(r['num_tokens'] == 0 for r in records)


def test_what_it_leaves_is_the_calibration_of_its_folder(whole):
  config, folder = whole
  # As `transformers` reads it, says the test of this reward.
  score, found = learned.reward_model(folder / 'hf'), rows(40, 2)
  prompts = [row['prompt'] for row in found]
  sides = [
    score(
      prompts,
      [row[side] for row in found],
      finished=[row[f'{side}_finished'] for row in found],
    )
    for side in ('chosen', 'rejected')
  ]
  expected = np.subtract(*np.asarray(sides, np.float64))
  assert np.ptp(expected) > 1
  written = json.loads((folder / 'calibration.json').read_text())
  oracle = calibration.examine(expected)
  assert written['count'] == 40
  for name in ('accuracy', 'log_loss'):
    values = getattr(oracle, name)._asdict()
    assert written[name] == pytest.approx(values, rel=1e-3)
  assert written['error'] == pytest.approx(oracle.error, rel=1e-3)
  assert written['temperature'] == pytest.approx(oracle.temperature, rel=1e-3)
  for one, other in zip(written['bins'], oracle.bins, strict=True):
    for name, value in other._asdict().items():
      if np.isnan(value):
        assert one[name] is None
      else:
        assert one[name] == pytest.approx(value, rel=1e-3)
  last = runs.read_metrics(folder / 'metrics.jsonl')[-1]
  assert last['eval/accuracy'] == written['accuracy']['mean']
  assert (folder / 'calibration.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
@pytest.mark.parametrize('by_itself', [False, True])
def test_a_resumed_run_ends_with_the_same_bits(by_itself, whole, tmp_path):
  config, folder = whole
  shutil.copytree(folder, tmp_path / 'run')
  kept = tmp_path / 'run' / 'checkpoints'
  later = [p for p in kept.iterdir() if p.name.lstrip('0') == str(STEPS)]
  assert later
  for path in later:
    shutil.rmtree(path)
  shutil.rmtree(tmp_path / 'run' / 'hf')
  if by_itself:  # By its own config.json.
    flags = f'--workdir={tmp_path / "run"}', '--resume'
    ended = scripts.run('reward_model', *flags, cache=scripts.cache())
    assert ended.code == 0, ended.err
  else:
    train(config, tmp_path / 'run', resume=True)
  for name in ('hf/model.safetensors', 'metrics.jsonl', 'calibration.json'):
    one, other = ((f / name).read_bytes() for f in (folder, tmp_path / 'run'))
    assert one == other, name
  timings = (tmp_path / 'run' / 'timings.jsonl').read_text().splitlines()
  assert len(timings) == STEPS + 1


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  config = a_config(tmp_path_factory.mktemp('model'))
  return build.model(config.model, config.seed)


def test_rows_that_are_no_pairs_are_refused(model, tmp_path):
  config = a_config(tmp_path)
  for columns, words in (
    ({'chosen': '1' * 20}, '1 of 12 pairs have a text of more than'),
    ({'rejected': None}, 'row 5 has no text in its column rejected'),
    ({'chosen_finished': 1}, 'row 5 has 1 in its column chosen_finished'),
  ):
    found = rows(12, 1)
    found[5] |= dict(chosen_finished=True, rejected_finished=True) | columns
    with mistakes.refused(words):
      reward_model.encode(config, model, found)
