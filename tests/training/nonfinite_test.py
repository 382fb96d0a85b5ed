"""NaN gradients in a run of RL: nothing changes, it is told, the third ends."""

import functools
import hashlib
import json
import re

import faults
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from experiments import run
from experiments.schedule import Result, Script
from jaxrl_llm import training
from jaxrl_llm.errors import UserError
from jaxrl_llm.models.huggingface import folders
from tests.experiments import boundaries_test, run_test

STEPS = 8
FLAGS = [
  '--config.warm_start.steps=0',
  '--config.optimizer.decay=constant',
  '--config.checkpoints.every=1',
  '--config.checkpoints.keep_latest=50',
]
# (RL step, minibatch of two): the count goes over minibatches and steps, and
# what is finite in between sets it back.
BAD = [(4, 0), (4, 1), (6, 1), (8, 1), (9, 0), (9, 1)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """How a run of eight steps and its continuation ended, and their folder."""
  folder = tmp_path_factory.mktemp('nan')
  workdir = folder / 'run'
  config = scripts.write_config(folder / 'config')
  # The record of step 0 is written before step 1.
  fault = functools.partial(faults.nan_gradients, str(workdir), BAD)
  ends = [
    scripts.train(
      workdir, config, *FLAGS, f'--config.steps={steps}', before=fault
    ).wait()
    for steps in (STEPS, STEPS + 4)
  ]
  return workdir, *ends


def leaves(workdir, step: int) -> dict:
  """Digests of what a checkpoint holds, by name."""
  path = workdir / 'checkpoints' / f'{step:08d}' / 'manifest' / 'data.json'
  return json.loads(path.read_text())['leaves']


def test_no_mean_hides_a_step_that_is_not_finite():
  sound = {'loss': 1.0, 'grad_norm': 1.0, 'skipped': 0}
  records = [sound, {'loss': np.nan, 'grad_norm': np.inf, 'skipped': 1}, sound]
  found = training.mean_metrics(records)
  assert np.isnan(found['loss']) and found['grad_norm'] == np.inf
  assert found['skipped'] == 1


@pytest.mark.slow
def test_a_step_of_nan_gradients_changes_no_bit(runs):
  workdir, _, _ = runs
  changed = {
    step: {
      name
      for name, leaf in leaves(workdir, step).items()
      if leaf != leaves(workdir, step - 1)[name]
    }
    for step in (3, 4, 5)
  }
  assert changed[4] == {'state/skipped'}
  # What is finite changes parameters and optimiser.
  for step in (3, 5):
    parts = {name.split('/')[1] for name in changed[step]}
    assert {'trainable', 'opt_state', 'updates'} <= parts


@pytest.mark.slow
def test_it_is_told(runs):
  workdir, first, _ = runs
  assert first.code == 0, first.err
  records = {r['step']: r for r in scripts.records(workdir)}
  skipped = [records[step]['skipped'] for step in range(1, STEPS + 2)]
  assert skipped == [0, 0, 0, 2, 0, 1, 0, 1, 3]
  for step, record in records.items():
    if step:
      assert np.isfinite(record['loss'])
      assert (record['grad_norm'] == 'nan') == (step in (4, 6, 8, 9))
  lines = (workdir / 'health.log').read_text().splitlines()
  marked = [int(line.split()[0]) for line in lines if 'not finite' in line]
  assert marked == [4, 6, 8, 9]
  assert re.search(r'step 4: the update is not finite .*\n.*rate', first.err)


@pytest.mark.slow
def test_the_third_in_a_row_ends_the_run(runs):
  workdir, _, second = runs
  assert second.code == 2, second
  assert f'resumed at step {STEPS}' in second.err
  message = second.err[second.err.index('error: ') :].splitlines()
  assert len(message) == 2
  assert message[0].endswith(
    '3 updates in a row were not finite, up to step 9; parameters unchanged'
  )
  assert '--allow_change=optimizer.learning_rate' in message[1]
  assert str(workdir / 'nonfinite_batch.npz') in message[1]
  assert 'Traceback' not in second.err
  # The first of the three was before the resumption.
  for name, leaf in leaves(workdir, 9).items():
    if name.startswith(('state/trainable', 'state/opt_state')):
      assert leaf == leaves(workdir, 8)[name]


@pytest.mark.slow
def test_the_batch_that_was_kept_is_that_of_the_step(runs):
  workdir, _, _ = runs
  with np.load(workdir / 'nonfinite_batch.npz') as stored:
    batch = dict(stored)
  record = scripts.records(workdir)[-1]
  assert record['step'] == 9
  content = np.where(batch['mask'], batch['tokens'], -1).astype('<i4')
  digest = hashlib.sha256(content.tobytes()).digest()[:6]
  assert int.from_bytes(digest, 'big') == record['completions/hash']
  rewards = batch['rewards']
  assert rewards.shape == (scripts.PROMPTS, scripts.SAMPLES)
  np.testing.assert_allclose(rewards.mean(), record['reward'], rtol=1e-6)
  # GRPO's, by its formula.
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  deviation = rewards.std(axis=1, keepdims=True, ddof=1)
  expected = np.where(deviation > 0, centred / (deviation + 1e-30), 0.0)
  np.testing.assert_allclose(batch['advantages'], expected, atol=1e-3)
  assert np.abs(expected).max() > 0.5
  assert (batch['log_probs'][batch['mask']] <= 0).all()
  # Its texts are those of the step's samples, of which every fourth is shown.
  tokenizer = folders.load_tokenizer(workdir / 'hf')
  tokens, mask = (np.concatenate(batch[name]) for name in ('tokens', 'mask'))
  texts = [
    tokenizer.decode(row[kept], skip_special_tokens=True)
    for row, kept in zip(tokens, mask, strict=True)
  ]
  samples = scripts.records(workdir, 'samples.jsonl')
  shown = [sample['response'] for sample in samples if sample['step'] == 9]
  count = scripts.PROMPTS * scripts.SAMPLES
  assert shown == [texts[i * count // 4] for i in range(4)]


class Skipping(run_test.Doubling):
  """A main phase that skips its updates from the second step on."""

  def step(self, state, number, stop):
    skipped = state.skipped + 1 if number else jnp.int32(0)
    record = {'skipped': int(skipped), 'loss': float('nan')}
    return Result(state.replace(skipped=skipped), record, {})


def test_the_count_survives_a_resume(tmp_path):
  """The loop's part, with a main phase that computes nothing."""
  config = boundaries_test.configuration(prompts=4)
  script = Script(lambda config: None, Skipping)
  config.steps = 3
  assert run.train(script, config.lock(), tmp_path / 'run', resume=True) == 0
  with config.unlocked():
    config.steps = 9
  with pytest.raises(UserError, match='3 updates in a row .* step 4; param'):
    run.train(script, config, tmp_path / 'run', resume=True)
  skipped = [r.get('skipped') for r in scripts.records(tmp_path / 'run')]
  assert skipped == [None, 0, 1, 2, 3]
