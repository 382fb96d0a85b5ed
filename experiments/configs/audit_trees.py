"""Audit of `compare_trees.py` at half of RLOO's budget, on the spare seed.

    python -m experiments.train --workdir=runs/half_way \\
      --config=experiments/configs/audit_trees.py \\
      --config.model.path=runs/compare_trees_arithmetic/init/hf
    python -m experiments.studies.audit --workdir=runs/audit_trees \\
      --run=runs/half_way --estimators=experiments/configs/audit_trees.py \\
      --tokens=50_000 --reference_tokens=400_000 --branches=64

The rows called exact have 64 branches at every token, whose cost is left out.
"""

from ml_collections import ConfigDict

from experiments.configs import compare_trees
from jaxrl_llm import estimators as est

_FILE = 'experiments/configs/audit_trees.py'
_BRANCHES = 64


def get_config() -> ConfigDict:
  """Configures RLOO for half of the comparison's tokens, from its model."""
  comparison = compare_trees.get_config()
  config = comparison.base
  (rloo,) = (m for m in comparison.methods if m['label'] == 'rloo')
  config.optimizer.update(rloo['optimizer'])
  config.rollout.update(rloo['rollout'])
  config.update(seed=100, tokens=comparison.tokens // 2)
  config.warm_start.steps = 0
  return config


def exact_reward_minus_value(count: int):
  """Builds R − V with branches at every token."""
  values = est.branches(count, _BRANCHES, est.positions.uniform())
  return est.estimator(
    est.chain(est.at_last_token(), est.gae(1.0, 1.0, values, est.hold)),
    est.score_function(),
    est.sequence_sum(),
  )


def get_estimators() -> dict[str, dict]:
  """Returns what the tasks have in common, and exact values."""
  exact = dict(name='trepo', count=1000, samples=_BRANCHES)
  once = dict(rollout=dict(samples=8, allocation='independent'))
  free = dict(rollout=dict(samples=2), free=True)
  best = exact | dict(score_weighted=True)
  value = dict(name=f'{_FILE}:exact_reward_minus_value', count=1000)
  row = lambda **algorithm: dict(algorithm=algorithm)
  weighted = lambda **more: row(name='trepo_weighted', **more)
  return {
    'REINFORCE': row(name='reinforce'),
    'RLOO': row(name='rloo'),
    'REINFORCE, prefixes once': row(name='reinforce') | once,
    'RLOO, prefixes once': row(name='rloo') | once,
    'TRePO, hold': row(name='trepo', count=2, samples=4)
    | dict(rollout=dict(samples=4)),
    'TRePO, tree': row(name='trepo_tree', count=2, samples=4)
    | dict(rollout=dict(samples=4)),
    'weighted tree, τ = 1/4': weighted(tau=1 / 4),
    'weighted tree, τ = 1/8': weighted(tau=1 / 8),
    'weighted tree, τ = 1/8, other tree': weighted(
      tau=1 / 8, baseline=dict(name='other_tree')
    ),
    'exact R − V': dict(algorithm=value) | free,
    'exact Q − V': dict(algorithm=exact) | free,
    'exact Q − b*': dict(algorithm=best) | free,
  }
