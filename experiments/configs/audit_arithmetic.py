"""The methods of `compare_arithmetic.py`, audited where PPO has got half way.

    python -m experiments.train --workdir=runs/half_way \\
      --config=experiments/configs/audit_arithmetic.py
    python -m experiments.studies.audit --workdir=runs/audit_arithmetic \\
      --run=runs/half_way --tokens=100_000 --reference_tokens=800_000 \\
      --branches=64 --estimators=experiments/configs/audit_arithmetic.py

The run gives the policy and the critic.  Beside the table's methods stand forms
that it leaves out: `docs/audit.md` holds what came out.
"""

from ml_collections import ConfigDict

from experiments.configs import compare_arithmetic


def get_config() -> ConfigDict:
  """PPO for a third of the comparison's tokens."""
  config = compare_arithmetic.base_config()
  (ppo,) = (m for m in compare_arithmetic.methods() if m['label'] == 'ppo')
  config.algorithm = ppo['algorithm']
  config.critic.update(ppo['critic'])
  config.tokens = 100_000
  config.evaluation.every_tokens = 25_000
  return config


def get_estimators() -> dict[str, dict]:
  """The comparison's methods with as many responses per prompt as there."""
  usual = compare_arithmetic.base_config().rollout
  found = {
    method['title']: dict(
      algorithm=method['algorithm'],
      rollout=dict(samples=method.get('rollout', usual)['samples']),
    )
    for method in compare_arithmetic.methods()
  }
  # The run's critic is PPO's, fitted to its own targets.
  found["TRePO, PPO's critic"] = found.pop('TRePO, critic of branches')
  found['TRePO, hold, score-weighted'] = dict(
    algorithm=dict(name='trepo', count=2, samples=4, score_weighted=True),
    rollout=found['TRePO, hold']['rollout'],
  )
  return found
