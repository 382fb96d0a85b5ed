"""A run that ends and goes on at the boundaries of its data."""

import hashlib
import json
import os
import signal
import types

import faults
import jax
import pytest
import scripts

from experiments import build, run
from experiments.configs import quickstart
from experiments.schedule import Result, Script
from jaxrl_llm.tasks import sources
from tests.experiments import run_test

ROWS, STEPS = 12, 9
# Where a run of three steps per epoch, and of two and two fifths, is stopped:
# where an epoch ends (or is soon to end), within one, at the last step.
BOUNDARIES = {4: (3, 5, STEPS), 5: (2, 5, STEPS)}


class Reading(run_test.Doubling):
  """A main phase that learns nothing, but says which rows it reads.

  Attributes:
    interrupts: step → what happens in it.
  """

  interrupts = types.MappingProxyType({})

  def __init__(self, config, model, data, key, folder):
    super().__init__(config, model, data, key, folder)
    self._source = sources.PromptSource(
      build.encode(config, data.train, model.tokenizer),
      config.rollout.prompts,
      config.seed,
    )

  def fingerprint(self):
    return {'own': self._source.fingerprint()}

  def step(self, state, number, stop):
    rows = self._source.indices(number)
    digest = hashlib.sha256(json.dumps(rows).encode()).digest()[:4]
    draw = jax.random.uniform(jax.random.fold_in(self.key, number))
    number_now = state.trainable['number'] * 0.5 + draw
    self.interrupts.pop(number + 1, lambda: None)()
    state = state.replace(trainable=state.trainable | {'number': number_now})
    record = {'rows': int.from_bytes(digest, 'big'), 'loss': float(draw)}
    return Result(state, record, {})


def stop():
  os.kill(os.getpid(), signal.SIGTERM)


def end_at_once():
  raise KeyboardInterrupt


def configuration(prompts: int):
  """Of a run that is over in a moment."""
  config = quickstart.get_config()
  config.model.architecture.update(
    hidden_size=16, intermediate_size=16, num_layers=1
  )
  config.task.update(train=ROWS, held_out=8, demonstrations=20)
  config.warm_start.steps = 0
  config.rollout.prompts = prompts
  config.steps = STEPS
  config.checkpoints.every = 2
  config.evaluation.every = 4
  return config


def train(workdir, prompts: int, interrupts=None) -> int:
  """Trains to the end, or to the first of the interrupts; gives the status."""
  config = configuration(prompts)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Reading, 'interrupts', interrupts or {})
    script = Script(lambda config: None, Reading)
    return run.train(script, config.lock(), workdir, resume=True)


def left(workdir) -> dict:
  """What a run has computed: records, arrays of its last checkpoint, result."""
  manifest = workdir / f'checkpoints/{STEPS:08d}/manifest/data.json'
  return {
    'records': (workdir / 'metrics.jsonl').read_text(),
    'arrays': json.loads(manifest.read_text())['leaves'],
    'result': (workdir / 'number').read_text(),
  }


@pytest.mark.parametrize(
  'prompts', [5, pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_at_the_boundaries(prompts, tmp_path):
  whole, workdir = tmp_path / 'whole', tmp_path / 'run'
  assert train(whole, prompts) == 0
  for step in BOUNDARIES[prompts]:
    # Ended at once it goes on from its last checkpoint.
    assert train(workdir, prompts, {step: end_at_once}) == 130
    assert train(workdir, prompts, {step: stop}) == 143
    newest = max(path.name for path in (workdir / 'checkpoints').iterdir())
    assert newest == f'{step:08d}'
  assert not (workdir / 'number').exists()
  for _ in range(2):  # Ended, it does nothing more.
    assert train(workdir, prompts) == 0
    assert left(workdir) == left(whole)
  rows = [record.get('rows') for record in scripts.records(workdir)]
  assert len(set(rows)) == STEPS + 1


@pytest.mark.slow
@pytest.mark.parametrize('prompts', [4, 5])
def test_online_rl_goes_on_at_the_boundaries(prompts, tmp_path):
  """24 rows: six steps are an epoch, or four and four fifths."""
  last = scripts.WARM + 12
  changes = [
    f'config.rollout.prompts = {prompts}',
    'config.training.minibatches = 1',
    'config.steps = 12',
    'return config',
  ]
  text = scripts.CONFIG.replace('return config', '\n  '.join(changes))
  config = scripts.write_config(tmp_path / 'config', text)
  whole, workdir = tmp_path / 'whole', tmp_path / 'run'
  ended = scripts.train(whole, config).wait()
  assert ended.code == 0, ended.err
  # In the warm start, behind an epoch, within one, in the last step.
  plan = [
    (signal.SIGTERM, 'update', before)
    for before in (4, scripts.WARM + 5, scripts.WARM + 7, last - 1)
  ]
  ends = faults.interrupt(plan, workdir, config)
  for ended, (number, _, before) in zip(ends, plan, strict=True):
    assert ended.code == 128 + number
    assert f'stopped by SIGTERM after step {before + 1};' in ended.err
  ended = scripts.train(workdir, config).wait()
  assert ended.code == 0, ended.err
  scripts.assert_same_run(workdir, whole)
