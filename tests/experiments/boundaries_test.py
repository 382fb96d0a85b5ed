"""A run that ends and goes on at the boundaries of its data."""

import hashlib
import json
import os
import signal
import types

import jax
import pytest
import scripts

from experiments import build, run
from experiments.schedule import Result, Script
from jaxrl_llm.tasks import sources
from tests.experiments.run_test import Doubling, configuration

STEPS = 9
# Where a run of three steps per epoch, and of two and two fifths, is stopped:
# where an epoch ends (or is soon to end), within one, at the last step.
BOUNDARIES = {4: (3, 5, STEPS), 5: (2, 5, STEPS)}


class Reading(Doubling):
  """A main phase that learns nothing, but says which rows it reads."""

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
