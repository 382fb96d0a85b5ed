"""Kills of runs that learn in rounds or from pairs: the records are equal."""

import json
import os
import signal

import pytest
import scripts

from tests.experiments import replay_test

# A round: two steps that sample, four that learn.
ROUNDS = 'config.rounds.update(sampling=2, learning=4, batch=4, per_prompt=3)'
GIVEN = "config.task = dict(name='REWARD:pairs')"
STEPS, FEWER = 12, 6

# Name → script, algorithm, what else it sets.
RUNS = {
  'rest_em': ('rest_em', dict(name='rest_em', threshold=0.3), [ROUNDS]),
  'sampled pairs': ('preference', dict(name='dpop'), [ROUNDS]),
  'given pairs': (
    'preference',
    dict(name='dpo'),
    [GIVEN, 'config.warm_start.steps = 0', 'config.rounds.batch = 4'],
  ),
  'sft': ('sft', dict(name='sft'), ['config.rounds.batch = 4']),
}

PAIRS = """

def pairs():
  from experiments.data import Data

  rows = [
    dict(
      prompt=f'{i}+{j}=',
      chosen=f'{(i + j) % 10}',
      rejected='1+1',
      answer=f'{(i + j) % 10}',
    )
    for i in range(4)
    for j in range(8)
  ]
  return Data(rows[:24], rows[24:], [])
"""


def write_config(folder, algorithm, lines):
  changes = [
    'config.training.minibatches = 1',
    f'config.steps = {STEPS}',
    'config.optimizer = base.optimizer(3e-3, warmup_updates=2)',
    'config.evaluation.every = 2',
    'config.checkpoints.every = 3',
    *lines,
  ]
  text = scripts.CONFIG.replace("dict(name='grpo', kl=0.04)", repr(algorithm))
  text = text.replace(
    '  return config\n', '  ' + '\n  '.join([*changes, 'return config']) + '\n'
  )
  return scripts.write_config(folder, text, scripts.REWARD + PAIRS)


def moments(name, workdir):
  """When a run of few steps is killed, and then when one of all steps is."""

  def records(count):
    return lambda: scripts.steps_written(workdir) >= count

  if name == 'given pairs':
    given = workdir / 'rounds' / 'given.npz'
    # While the reference scores them, between the two files, in learning.
    begun = (workdir / 'config.json').exists
    return (begun, given.exists, records(4)), records(FEWER + 3)
  warm = scripts.WARM
  # In a sampling step, where learning begins, and in the second round.
  return (records(warm + 1), records(warm + 2)), records(warm + FEWER + 1)


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_kills_leave_the_same_records(name, tmp_path):
  script, algorithm, lines = RUNS[name]
  config = write_config(tmp_path / 'config', algorithm, lines)

  def start(folder, steps=STEPS, *flags):
    return scripts.Script(
      script,
      f'--workdir={tmp_path / folder}',
      f'--config={config}',
      f'--config.steps={steps}',
      '--resume',
      *flags,
      cache=scripts.cache(),
    )

  whole = start('whole').wait()
  assert whole.code == 0, whole.err
  killed = tmp_path / 'killed'
  few, more = moments(name, killed)
  for reached in few:
    kill(start('killed', FEWER), reached)
  ended = start('killed', FEWER).wait()
  assert ended.code == 0, ended.err
  # What has ended may be made longer.
  kill(start('killed'), more)
  # By its own config.json, which names functions of reward.py.
  by_itself = f'--workdir={killed}', '--resume', '--trust_code'
  ended = scripts.run(script, *by_itself, cache=scripts.cache())
  assert ended.code == 0, ended.err
  ended = start('killed', STEPS, '--config.rounds.batch=2').wait()
  assert ended.code == 2 and 'rounds.batch was 4, is 2' in ended.err
  same(tmp_path / 'whole', killed)
  # Both kinds of step of a round, whose files are the run's or made anew.
  warm = 0 if name == 'given pairs' else scripts.WARM
  replay_test.identical(tmp_path / 'whole', [warm + 1, warm + 8, warm + 11])
  for reader, *flags in (('evaluate', '--trust_code'), ('export',)):
    ended = scripts.run(
      reader,
      f'--workdir={killed}',
      *flags,
      '--step=best',
      f'--output={tmp_path / reader}',
      cache=scripts.cache(),
    )
    assert ended.code == 0, ended.err


def kill(process, reached):
  scripts.wait_until(reached, process)
  process.signal(signal.SIGKILL)
  assert process.wait().code == -signal.SIGKILL


def same(whole, killed):
  """Asserts that two runs left the same, bit for bit, and learned."""
  files = ['metrics.jsonl', 'samples.jsonl', 'hf/model.safetensors']
  if (whole / 'rounds').exists():
    files += [f'rounds/{name}' for name in os.listdir(whole / 'rounds')]
  for file in files:
    assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
  lines = (whole / 'metrics.jsonl').read_text().splitlines()
  losses = [r['loss'] for r in map(json.loads, lines) if 'loss' in r]
  assert len(set(losses)) == len(losses) >= 8
