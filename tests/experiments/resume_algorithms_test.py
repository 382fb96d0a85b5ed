"""Kills of runs of every kind of algorithm: the records are equal."""

import os
import signal

import pytest
import scripts

from tests.experiments import replay_test

# A round: two steps that sample, four that learn.
ROUNDS = 'config.rounds.update(sampling=2, learning=4, batch=4, per_prompt=3)'
BATCH = 'config.rounds.batch = 4'
PAIRS = "config.task = dict(name='REWARD:pairs')"
REFILL = 'config.rollout.update(refill=2, hints=(0.5,), hint_threshold=1.1)'
CURRICULUM = (
  "config.prompts.update(curriculum='operations', curriculum_steps=9)"
)
BRANCHES = dict(count=2, samples=2)
STEPS, FEWER = 12, 6

# Name → script, algorithm, what else it sets.
RUNS = {
  'critic and branches': ('train', dict(name='trepo_critic', **BRANCHES), []),
  'ppo': ('train', dict(name='ppo', kl=0.05), []),
  'tree': ('train', dict(name='trepo_tree', **BRANCHES), []),
  'weighted tree': (
    'train',
    dict(
      name='trepo_weighted',
      tau=0.25,
      clip=0.2,
      kl=0.04,
      baseline=dict(name='other_tree', scale=dict(name='tree_scale')),
    ),
    [],
  ),
  'refill and hints': ('train', dict(name='rloo'), [REFILL, CURRICULUM]),
  'rest_em': ('rest_em', dict(name='rest_em', threshold=0.3), [ROUNDS]),
  'sampled pairs': ('preference', dict(name='dpop'), [ROUNDS]),
  'given pairs': (
    'preference',
    dict(name='dpo'),
    [PAIRS, BATCH, 'config.warm_start.steps = 0'],
  ),
  'sft': ('sft', dict(name='sft'), [BATCH]),
}

ROWS = """

def pairs():
  from experiments.data import Data

  rows = [
    dict(prompt=f'{i}+{j}=', chosen=f'{(i + j) % 10}', rejected='1+1')
    for i in range(4)
    for j in range(8)
  ]
  rows = [row | dict(answer=row['chosen']) for row in rows]
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
    'return config',
  ]
  text = scripts.CONFIG.replace("dict(name='grpo', kl=0.04)", repr(algorithm))
  text = text.replace('return config', '\n  '.join(changes))
  return scripts.write_config(folder, text, scripts.REWARD + ROWS)


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
  # In a step that samples, where learning begins, and in the second round.
  return (records(warm + 1), records(warm + 2)), records(warm + FEWER + 1)


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_kills_leave_the_same_records(name, tmp_path):
  script, algorithm, lines = RUNS[name]
  config = write_config(tmp_path / 'config', algorithm, lines)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'

  def start(folder, *flags, config=(f'--config={config}',)):
    flags = f'--workdir={folder}', '--resume', *config, *flags
    return scripts.Script(script, *flags, cache=scripts.cache())

  def end(process):
    ended = process.wait()
    assert ended.code == 0, ended.err

  def kill(process, reached):
    scripts.wait_until(reached, process)
    process.signal(signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL

  end(start(whole))
  few, more = moments(name, killed)
  fewer = f'--config.steps={FEWER}'
  for reached in few:
    kill(start(killed, fewer), reached)
  end(start(killed, fewer))
  # What has ended may be made longer.
  kill(start(killed), more)
  # By its own config.json, which names functions of reward.py.
  end(start(killed, '--trust_code', config=()))
  ended = start(killed, '--config.seed=7').wait()
  assert ended.code == 2 and 'seed was 0, is 7' in ended.err
  assert_same(whole, killed)
  if name == 'refill and hints':
    records = scripts.records(whole)
    for tool in ('refill/rounds', 'hints/saved'):
      assert sum(record.get(tool, 0) for record in records) > 0, tool
  # Both kinds of step of a round, whose files are the run's or made anew.
  warm = 0 if name == 'given pairs' else scripts.WARM
  replay_test.identical(whole, [warm + 1, warm + 8, warm + 11])
  for reader, *flags in (('evaluate', '--trust_code'), ('export',)):
    flags += '--step=best', f'--output={tmp_path / reader}'
    end(scripts.Script(reader, f'--workdir={killed}', *flags))


def assert_same(whole, killed):
  """Asserts that two runs left the same, bit for bit, and learned."""
  files = ['metrics.jsonl', 'samples.jsonl', 'hf/model.safetensors']
  if (whole / 'rounds').exists():
    files += [f'rounds/{name}' for name in os.listdir(whole / 'rounds')]
  for file in files:
    assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
  losses = [r['loss'] for r in scripts.records(whole) if 'loss' in r]
  assert len(set(losses)) == len(losses) >= 8
