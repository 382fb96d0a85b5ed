r"""Is it sharing or credit?  Trees against the methods that they compete with.

    python -m experiments.studies.compare --jobs=2 \
      --config=experiments/configs/compare_trees.py:arithmetic

Ends while RLOO is still learning.  Every update has about 2,500 tokens that the
sampler decoded, which for trees and for `prefixes once` are distinct prefixes.
Each method has its best learning rate of three, tried with a seed of its own by
`--config=experiments/configs/compare_trees.py:arithmetic_rates`.  The results
are in `docs/comparison.md`.
"""

from ml_collections import ConfigDict

from experiments.configs import compare_arithmetic
from experiments.configs.compare_arithmetic import groups, method

RATES = (2e-4, 4e-4, 8e-4)
_BEST = {'arithmetic': {}}  # label → learning rate


def get_config(task: str = 'arithmetic') -> ConfigDict:
  """Returns a comparison; with `_rates` at its end, of learning rates."""
  task, _, rates = task.partition('_')
  config = compare_arithmetic.get_config()
  config.base.optimizer.warmup_updates = 2
  config.tokens, config.evaluations, config.methods = 60_000, 12, methods()
  if rates:
    config.seeds = (100,)
    config.methods = tuple(
      _at(entry, rate, f'_{i}', f', {rate:.0e}')
      for entry in config.methods
      for i, rate in enumerate(RATES)
    )
  else:
    best = _BEST[task]
    config.methods = tuple(
      _at(entry, best.get(entry['label'], RATES[1])) for entry in config.methods
    )
  return config


def _at(entry: dict, rate: float, label: str = '', title: str = '') -> dict:
  """Returns the entry of a method at a learning rate."""
  names = dict(label=entry['label'] + label, title=entry['title'] + title)
  return {**entry, **names, 'optimizer': dict(learning_rate=rate)}


def once(prompts: int, samples: int = 8) -> dict:
  """Builds the section for groups whose common prefixes are decoded once."""
  return dict(
    rollout=dict(prompts=prompts, samples=samples, allocation='independent')
  )


def methods() -> tuple[dict, ...]:
  """Returns one entry per method, in the order of table and figure."""
  branched = dict(count=2, samples=4)
  critic = dict(critic=dict(optimizer=dict(learning_rate=1e-3), warmup=2))
  weighted = dict(name='trepo_weighted')
  other = dict(baseline=dict(name='other_tree'), **weighted)
  return (
    method('reinforce', 'REINFORCE') | groups(16, 8),
    method('rloo', 'RLOO') | groups(16, 8),
    method('grpo', 'GRPO', kl=0.0) | groups(16, 8),
    method('ppo', 'PPO') | critic | groups(16, 8),
    method('trepo', 'TRePO, hold', **branched) | groups(8, 4),
    method('trepo_tree', 'TRePO, tree', **branched) | groups(8, 4),
    method(
      'trepo_uncertain',
      'TRePO, where uncertain',
      name='trepo',
      positions=dict(name='entropy_sum', nats=0.5),
      **branched,
    )
    | groups(17, 4),
    method('reinforce_once', 'REINFORCE, prefixes once', name='reinforce')
    | once(70),
    method('rloo_once', 'RLOO, prefixes once', name='rloo') | once(48),
    method('weighted_4', 'weighted tree, τ = 1/4', tau=1 / 4, **weighted)
    | groups(84, 1),
    method('weighted_8', 'weighted tree, τ = 1/8', tau=1 / 8, **weighted)
    | groups(68, 1),
    method('weighted_16', 'weighted tree, τ = 1/16', tau=1 / 16, **weighted)
    | groups(52, 1),
    method('other_4', 'weighted tree, τ = 1/4, other tree', tau=1 / 4, **other)
    | groups(36, 1),
    method('other_8', 'weighted tree, τ = 1/8, other tree', tau=1 / 8, **other)
    | groups(30, 1),
    method('rest_em', 'RestEM')
    | dict(rounds=dict(sampling=3, batch=64, per_prompt=4, learning=15)),
    method('dpop', 'DPO-Positive')
    | dict(rounds=dict(sampling=3, batch=64, per_prompt=4, learning=5)),
  )
