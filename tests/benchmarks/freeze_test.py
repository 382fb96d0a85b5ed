"""Comparison of run folders by `benchmarks.freeze`, which is for developers."""

import math
import pathlib
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scripts
from safetensors.numpy import save_file

from benchmarks import differences, freeze_config

ROOT = pathlib.Path(__file__).parents[2]
METRICS = [dict(step=i, loss=0.1 * i, skipped=0) for i in (1, 2, 3)]
SAMPLES = [
  dict(step=2, response=text, rewards=dict(right=0.1), reward=0.1, advantage=a)
  for text, a in (('7', 0.3), ('12', None))
]
WEIGHTS = {name: np.arange(1, 5, dtype=np.float32) for name in 'vw'}


def write(folder, metrics=METRICS, samples=SAMPLES, weights=WEIGHTS):
  """Writes what a run leaves, of which the comparison is."""
  (folder / 'hf').mkdir(parents=True)
  for name, records in (('metrics', metrics), ('samples', samples)):
    scripts.write_rows(folder / f'{name}.jsonl', records)
  save_file(weights, folder / 'hf' / 'model.safetensors')
  return folder


def replaced(records, index, **changes):
  records = list(records)
  records[index] = records[index] | changes
  return records


def next_float(x):
  return float(np.nextafter(x, 1))


LAST_BIT = next_float(METRICS[1]['loss'])
MOVED = {**WEIGHTS, 'w': np.nextafter(WEIGHTS['w'], np.float32(9))}
CASES = {
  'last bit': (
    dict(metrics=replaced(METRICS, 1, loss=LAST_BIT)),
    ['metrics.jsonl: loss differs from step 2, relatively by up to 1.4e-16'],
  ),
  'NaN': (
    dict(metrics=replaced(METRICS, 2, loss=math.nan)),
    ['metrics.jsonl: loss differs from step 3'],
  ),
  'missing step': (
    dict(metrics=METRICS[:2]),
    ['metrics.jsonl: record only in old from step 3'],
  ),
  'fields of one side': (
    dict(metrics=[dict(step=i, skipped=0, kl=0.0) for i in (1, 2, 3)]),
    [
      'metrics.jsonl: kl only in new from step 1',
      'metrics.jsonl: loss only in old from step 1',
    ],
  ),
  'response': (
    dict(samples=replaced(SAMPLES, 1, response='21')),
    ['samples.jsonl: response differs from step 2'],
  ),
  'weight': (
    dict(weights=MOVED),
    ['hf/model.safetensors: w differs, relatively by up to 1.2e-07'],
  ),
  'sign of zero': (
    dict(weights={**WEIGHTS, 'v': -0.0 * WEIGHTS['v']}),
    ['hf/model.safetensors: v differs, relatively by up to 1'],
  ),
}


def test_equal_folders(tmp_path):
  folders = [write(tmp_path / side) for side in 'ab']
  assert differences.compare(*folders) == []


@pytest.mark.parametrize('name', CASES)
def test_differences_are_listed(name, tmp_path):
  changes, lines = CASES[name]
  old, new = write(tmp_path / 'old'), write(tmp_path / 'new', **changes)
  assert sorted(differences.compare(old, new)) == lines


def test_missing_files(tmp_path):
  old, new = write(tmp_path / 'old'), tmp_path / 'new'
  assert differences.compare(old, new) == [
    'metrics.jsonl: record only in old from step 1',
    'samples.jsonl: record only in old from step 2',
    'hf/model.safetensors: record only in old',
  ]
  assert differences.compare(new, new) == [
    f'{name}: missing' for name in differences.FILES
  ]


def test_tolerance_is_for_floats_but_not_for_rewards(tmp_path):
  old = write(tmp_path / 'old')
  near = write(
    tmp_path / 'near',
    replaced(METRICS, 1, loss=LAST_BIT),
    replaced(SAMPLES, 0, advantage=next_float(0.3)),
    MOVED,
  )
  assert len(differences.compare(old, near)) == 3
  assert differences.compare(old, near, 1e-6) == []
  assert len(differences.compare(old, near, 1e-17)) == 3
  changes = dict(rewards=dict(right=next_float(0.1)), reward=next_float(0.1))
  samples = replaced(SAMPLES, 0, **changes)
  scored = write(tmp_path / 'scored', replaced(METRICS, 0, skipped=1), samples)
  assert [
    line.split()[1] for line in differences.compare(old, scored, 1.0)
  ] == ['skipped', 'reward', 'rewards/right']


def test_allowed_fields_may_come_and_go_but_not_change(tmp_path):
  old = write(tmp_path / 'old')
  new = write(tmp_path / 'new', [dict(step=i, skipped=1) for i in (1, 2, 3)])
  lines = differences.compare(old, new, allowed=('metrics:loss',))
  assert lines == ['metrics.jsonl: skipped differs from step 1']
  lines = differences.compare(old, new, allowed=('samples:loss',))
  assert len(lines) == 2


@pytest.mark.parametrize('name', freeze_config.CONFIGURATIONS)
def test_configurations_set_fields_that_there_are(name, tmp_path, capsys):
  path = tmp_path / f'{name}.py'
  shutil.copy(freeze_config.__file__, path)
  config = runpy.run_path(path)['get_config']()
  assert capsys.readouterr().err == ''
  assert config.algorithm.name == name and config.rollout.samples == 4


@pytest.mark.slow
def test_the_working_tree_is_as_its_commit_if_unchanged():
  state = ['git', 'status', '--porcelain', 'experiments', 'jaxrl_llm']
  changed = subprocess.run(state, cwd=ROOT, capture_output=True, text=True)
  if changed.returncode or changed.stdout:
    pytest.skip('the working tree differs from its commit, or has none')
  ended = subprocess.run(
    [sys.executable, '-m', 'benchmarks.freeze', 'HEAD', '--only=grpo'],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stdout + ended.stderr
  assert ended.stdout.startswith('grpo: identical\ngrpo_killed: identical\n')
