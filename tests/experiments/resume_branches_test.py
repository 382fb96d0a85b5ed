"""Kills of runs with branches or a critic: the records are equal."""

import signal

import pytest
import scripts

BRANCHES = dict(count=2, samples=2)
# Both kinds of state at once, then each alone.
ALGORITHMS = {
  'critic and branches': dict(name='trepo_critic', **BRANCHES),
  'ppo': dict(name='ppo', kl=0.05),
  'trepo': dict(name='trepo', score_weighted=True, **BRANCHES),
  'tree': dict(name='trepo_tree', **BRANCHES),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', ALGORITHMS)
def test_kills_leave_the_same_records(name, tmp_path):
  text = scripts.CONFIG.replace(
    "dict(name='grpo', kl=0.04)", repr(ALGORITHMS[name])
  )
  assert repr(ALGORITHMS[name]) in text
  config = scripts.write_config(tmp_path / 'config', text)
  flags = f'--config={config}', '--resume'
  cache = scripts.cache()

  def start(folder):
    workdir = f'--workdir={tmp_path / folder}'
    return scripts.Script('train', workdir, *flags, cache=cache)

  whole = start('whole').wait()
  assert whole.code == 0, whole.err
  killed = tmp_path / 'killed'
  # In the first rollouts of RL, and between checkpoints.
  for step in (scripts.WARM + 1, scripts.WARM + 8):
    script = start('killed')
    scripts.wait_until(
      lambda step=step: scripts.steps_written(killed) >= step, script
    )
    script.signal(signal.SIGKILL)
    assert script.wait().code == -signal.SIGKILL
  ended = start('killed').wait()
  assert ended.code == 0, ended.err
  for file in ('metrics.jsonl', 'samples.jsonl', 'hf/model.safetensors'):
    left, right = (
      (tmp_path / x / file).read_bytes() for x in ('whole', 'killed')
    )
    assert left == right, file
  records = (tmp_path / 'whole' / 'metrics.jsonl').read_text()
  for metric in {'ppo': ['critic/value_loss']}.get(name, ['branches/forks']):
    assert metric in records
