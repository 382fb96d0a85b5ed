"""Kills of runs with branches, trees or a critic: the records are equal."""

import pytest
import scripts

from tests.experiments import replay_test, resume_offline_test

BRANCHES = dict(count=2, samples=2)
# Both kinds of state at once, then each alone.
ALGORITHMS = {
  'critic and branches': dict(name='trepo_critic', **BRANCHES),
  'ppo': dict(name='ppo', kl=0.05),
  'trepo': dict(name='trepo', score_weighted=True, **BRANCHES),
  'tree': dict(name='trepo_tree', **BRANCHES),
  'weighted tree': dict(
    name='trepo_weighted',
    tau=0.25,
    clip=0.2,
    kl=0.04,
    baseline=dict(name='other_tree', scale=dict(name='tree_scale')),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', ALGORITHMS)
def test_kills_leave_the_same_records(name, tmp_path):
  text = scripts.CONFIG.replace(
    "dict(name='grpo', kl=0.04)", repr(ALGORITHMS[name])
  )
  assert repr(ALGORITHMS[name]) in text
  config = scripts.write_config(tmp_path / 'config', text)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  ended = scripts.train(whole, config).wait()
  assert ended.code == 0, ended.err
  # In the first rollouts of RL, and between checkpoints.
  for step in (scripts.WARM + 1, scripts.WARM + 8):
    reached = lambda step=step: scripts.steps_written(killed) >= step
    resume_offline_test.kill(scripts.train(killed, config), reached)
  ended = scripts.train(killed, config).wait()
  assert ended.code == 0, ended.err
  scripts.assert_same_run(killed, whole)
  records = (whole / 'metrics.jsonl').read_text()
  shown = {'ppo': 'critic/value_loss', 'weighted tree': 'tree/responses'}
  assert shown.get(name, 'branches/forks') in records
  if name in ('ppo', 'tree', 'weighted tree'):
    steps = [scripts.WARM + 1, replay_test.MIDDLE, scripts.TOTAL]
    replay_test.identical(whole, steps)
