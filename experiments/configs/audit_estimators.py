"""Estimators for `experiments.studies.audit`, on a task like the quickstart's.

    python -m experiments.studies.audit --run=runs/quickstart \\
      --estimators=experiments/configs/audit_estimators.py \\
      --workdir=runs/quickstart_audit
"""

from jaxrl_llm import estimators as est

_HERE = 'experiments/configs/audit_estimators.py'


def trepo_values_interpolated(count: int = 2, samples: int = 4):
  return est.trepo(count, samples, fill=est.interpolate_values)


def trepo_interpolated(count: int = 4, samples: int = 4):
  """Builds TRePO's most literal reading; each token takes two positions."""
  return est.trepo(count, samples, fill=est.interpolate_advantages)


def get_estimators():
  named = lambda name, **arguments: dict(algorithm=dict(name=name, **arguments))
  return {
    'REINFORCE': named('reinforce'),
    'ReMax': named('remax'),
    'RLOO': named('rloo'),
    'score-weighted leave-one-out': named('obl_reinforce'),
    'GRPO': named('grpo', kl=0.0),
    'Dr. GRPO': named('dr_grpo', max_length=14),
    'RL-ZVP': named('rl_zvp'),
    'TRePO, hold': named('trepo', count=2, samples=4),
    'TRePO, hold, score-weighted': named(
      'trepo', count=2, samples=4, score_weighted=True
    ),
    'TRePO, values interpolated': named(f'{_HERE}:trepo_values_interpolated'),
    'TRePO, advantages interpolated': named(f'{_HERE}:trepo_interpolated'),
    'TRePO, tree': named('trepo_tree', count=2, samples=4),
  }
