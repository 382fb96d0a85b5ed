r"""Is it sharing or credit?  Trees against the methods that they compete with.

    python -m experiments.studies.compare --jobs=2 \
      --config=experiments/configs/compare_trees.py:arithmetic

The task is that of `compare_arithmetic.py`; a run ends while RLOO is still
learning.  Every update has about as many tokens that the sampler decoded, which
for trees and for `prefixes once` are distinct prefixes.  Each method has its
best learning rate of three, tried with a seed of its own by
--config=experiments/configs/compare_trees.py:arithmetic_rates.  The results are
in `docs/comparison.md`; `audit_trees.py` predicts them.
"""

from ml_collections import ConfigDict

from experiments.configs import compare_arithmetic
from experiments.configs.compare_arithmetic import groups, method
from jaxrl_llm.errors import UserError

# Prompts per update, such that methods decode about equally many tokens.
_PROMPTS = dict(
  reinforce=16,
  rloo=16,
  grpo=16,
  ppo=16,
  trepo=8,
  trepo_tree=8,
  trepo_uncertain=17,
  reinforce_once=70,
  rloo_once=72,
  weighted_4=84,
  weighted_8=68,
  weighted_16=52,
  other_4=36,
  other_8=30,
  rest_em=64,
  dpop=64,
)
RATES = (1e-4, 2e-4, 4e-4)
# The best one for each method.
_BEST = dict.fromkeys(_PROMPTS, 2e-4)
_BEST |= dict.fromkeys(('grpo', 'dpop'), 1e-4)
_BEST |= dict.fromkeys(('reinforce_once', 'rloo_once', 'rest_em'), 4e-4)
_BEST |= dict.fromkeys(('weighted_4', 'weighted_8', 'weighted_16'), 4e-4)
_BEST |= dict.fromkeys(('other_4', 'other_8'), 4e-4)


def get_config(kind: str = 'arithmetic') -> ConfigDict:
  """Returns the comparison, or that of learning rates: 'arithmetic_rates'."""
  if kind not in ('arithmetic', 'arithmetic_rates'):
    raise UserError(
      f'compare_trees.py:{kind}: no such comparison\n'
      'there are arithmetic and arithmetic_rates'
    )
  config = compare_arithmetic.get_config()
  config.base = base_config()
  config.tokens, config.evaluations = 60_000, 12
  config.methods = tuple(_at(each, _BEST[each['label']]) for each in methods())
  if kind == 'arithmetic_rates':
    config.seeds = (100,)
    config.methods = tuple(
      _at(each, rate, f'_{i}', f', {rate:.0e}')
      for each in methods()
      for i, rate in enumerate(RATES)
    )
  return config


def _at(entry: dict, rate: float, label: str = '', title: str = '') -> dict:
  """Returns the entry of a method at a learning rate."""
  names = dict(label=entry['label'] + label, title=entry['title'] + title)
  return {**entry, **names, 'optimizer': dict(learning_rate=rate)}


def base_config() -> ConfigDict:
  """Returns the configuration that all methods share."""
  config = compare_arithmetic.base_config()
  config.optimizer.warmup_updates = 2
  return config


def methods() -> tuple[dict, ...]:
  """Returns one entry per method, in the order of table and figure."""
  branched = dict(count=2, samples=4)
  critic = dict(critic=dict(optimizer=dict(learning_rate=1e-3), warmup=2))
  weighted = dict(name='trepo_weighted')
  other = dict(baseline=dict(name='other_tree'), **weighted)
  uncertain = dict(name='entropy_sum', nats=0.5)
  rounds = dict(sampling=3, per_prompt=4)
  entries = (
    method('reinforce', 'REINFORCE'),
    method('rloo', 'RLOO'),
    method('grpo', 'GRPO', kl=0.0),
    method('ppo', 'PPO') | critic,
    method('trepo', 'TRePO, hold', **branched),
    method('trepo_tree', 'TRePO, tree', **branched),
    method(
      'trepo_uncertain',
      'TRePO, where uncertain',
      name='trepo',
      positions=uncertain,
      **branched,
    ),
    method('reinforce_once', 'REINFORCE, prefixes once', name='reinforce'),
    method('rloo_once', 'RLOO, prefixes once', name='rloo'),
    method('weighted_4', 'weighted tree, τ = 1/4', tau=1 / 4, **weighted),
    method('weighted_8', 'weighted tree, τ = 1/8', tau=1 / 8, **weighted),
    method('weighted_16', 'weighted tree, τ = 1/16', tau=1 / 16, **weighted),
    method('other_4', 'weighted tree, τ = 1/4, other tree', tau=1 / 4, **other),
    method('other_8', 'weighted tree, τ = 1/8, other tree', tau=1 / 8, **other),
    method('rest_em', 'RestEM') | dict(rounds=dict(learning=15, **rounds)),
    method('dpop', 'DPO-Positive') | dict(rounds=dict(learning=6, **rounds)),
  )
  return tuple(_sized(each, _PROMPTS[each['label']]) for each in entries)


def _sized(entry: dict, prompts: int) -> dict:
  """Returns the entry of a method with its prompts per update."""
  label = entry['label']
  if 'rounds' in entry:
    return entry | dict(rounds=dict(entry['rounds'], batch=prompts))
  if label.endswith('once'):
    sizes = dict(prompts=prompts, samples=8, allocation='independent')
    return entry | dict(rollout=sizes)
  if entry['algorithm']['name'] == 'trepo_weighted':
    return entry | groups(prompts, 1)
  branches = label.startswith('trepo')
  return entry | groups(prompts, 4 if branches else 8)
