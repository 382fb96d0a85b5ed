"""Reward models from files of pairs: learned, exported, judged, resumed."""

import functools
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
from tests.experiments import replay_test

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


def a_config(folder):
  config = base.get_config()
  config.model.alphabet = '0123456789='
  sizes = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2)
  config.model.architecture = dict(sizes, tied=True, max_length=32)
  config.task = dict(
    name='jsonl',
    train=scripts.write_rows(folder / 'train.jsonl', rows(96, 1)),
    held_out=scripts.write_rows(folder / 'held_out.jsonl', rows(40, 2)),
  )
  config.algorithm = dict(name='reward_model')
  config.prompts.max_tokens, config.rollout.max_tokens = 8, 8
  config.rounds.batch = 16
  config.steps = STEPS
  config.optimizer = base.optimizer(1e-2)
  config.evaluation.update(every=10, prompts=0)
  config.checkpoints.update(every=10, keep_latest=5)
  return config


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(configuration, folder) of a run done in one go."""
  folder = tmp_path_factory.mktemp('reward_model')
  config = a_config(folder)
  assert run.train(reward_model.SCRIPT, config.lock(), folder / 'run') == 0
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
  accuracy = oracle.accuracy._asdict()
  assert written['accuracy'] == pytest.approx(accuracy, rel=1e-3)
  assert written['error'] == pytest.approx(oracle.error, rel=1e-3)
  assert written['temperature'] == pytest.approx(oracle.temperature, rel=1e-3)
  last = runs.read_metrics(folder / 'metrics.jsonl')[-1]
  assert last['eval/accuracy'] == written['accuracy']['mean']
  assert (folder / 'calibration.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(whole, tmp_path):
  """By its own config.json; its steps are replayed bit for bit."""
  workdir = tmp_path / 'run'
  shutil.copytree(whole[1], workdir)
  shutil.rmtree(workdir / 'checkpoints' / f'{STEPS:08d}')
  shutil.rmtree(workdir / 'hf')
  flags = f'--workdir={workdir}', '--resume'
  ended = scripts.run('reward_model', *flags, cache=scripts.cache())
  assert ended.code == 0, ended.err
  for name in ('hf/model.safetensors', 'metrics.jsonl', 'calibration.json'):
    assert (workdir / name).read_bytes() == (whole[1] / name).read_bytes(), name
  replay_test.identical(workdir, [1, 25])


def test_rows_that_are_no_pairs_are_refused(tmp_path):
  config = a_config(tmp_path)
  model = build.model(config.model, config.seed)
  encode = functools.partial(reward_model.encode, config, model)
  for columns, words in (
    ({'rejected': None}, 'row 5 has no text in its column rejected'),
    ({'chosen_finished': 1}, 'row 5 has 1 in its column chosen_finished'),
    ({'chosen': '1' * 20}, '1 of 12 pairs have a text of more than'),
  ):
    found = rows(12, 1)
    found[5] |= dict(chosen_finished=True, rejected_finished=True) | columns
    with mistakes.refused(words):
      encode(found)
  # Pairs over budget may be left out.
  config.prompts.overlong = 'drop'
  encoded, pool = encode(found)
  assert encoded.dropped == 1 and len(pool.prompts) == 11
  assert encoded.rows == found[:5] + found[6:]
