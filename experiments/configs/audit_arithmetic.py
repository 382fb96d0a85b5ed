"""Audit of the methods of `compare_arithmetic.py` halfway through PPO.

    python -m experiments.train --workdir=runs/half_way \\
      --config=experiments/configs/audit_arithmetic.py
    python -m experiments.studies.audit --workdir=runs/audit_arithmetic \\
      --run=runs/half_way --tokens=100_000 --reference_tokens=800_000 \\
      --branches=64 --estimators=experiments/configs/audit_arithmetic.py

The run provides the policy and the critic.  The audit adds variants that are
not in the comparison.  `docs/audit.md` has the results.
"""

from ml_collections import ConfigDict

from experiments.configs import compare_arithmetic


def get_config() -> ConfigDict:
  """Configures PPO for a third of the comparison's tokens."""
  config = compare_arithmetic.base_config()
  (ppo,) = (m for m in compare_arithmetic.methods() if m['label'] == 'ppo')
  config.algorithm = ppo['algorithm']
  config.critic.update(ppo['critic'])
  config.tokens = 100_000
  config.evaluation.every_tokens = 25_000
  return config


def get_estimators() -> dict[str, dict]:
  """Returns the comparison's methods with its responses per prompt."""
  usual = compare_arithmetic.base_config().rollout
  estimators = {
    method['title']: dict(
      algorithm=method['algorithm'],
      rollout=dict(samples=method.get('rollout', usual)['samples']),
    )
    for method in compare_arithmetic.methods()
  }
  # The run's critic is that of PPO, fitted to PPO's targets.
  estimators["TRePO, PPO's critic"] = estimators.pop(
    'TRePO, critic of branches'
  )
  estimators['TRePO, hold, score-weighted'] = dict(
    algorithm=dict(name='trepo', count=2, samples=4, score_weighted=True),
    rollout=estimators['TRePO, hold']['rollout'],
  )
  return estimators
