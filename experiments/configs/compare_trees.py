r"""Is it sharing or credit?  Trees against the methods that they compete with.

    python -m experiments.studies.compare --jobs=2 \
      --config=experiments/configs/compare_trees.py:TASK

TASK is one of

  arithmetic  four operations; `compare_arithmetic.py` describes the task
  steps       eight operations, 70 tokens, with mistakes in single steps
  paths       a path in a random graph, 9 tokens; many are right
  stories     stories with sentiment, which share nothing: `compare_stories.py`

A run ends while RLOO is still learning.  Every update has about as many tokens
that the sampler decoded, which for trees and for `prefixes once` are distinct
prefixes.  Each method has its best learning rate of three, tried with a seed of
its own by --config=experiments/configs/compare_trees.py:TASK_rates.  The
results are in `docs/comparison.md`; `audit_trees.py` predicts them.
"""

from ml_collections import ConfigDict

from experiments.configs import compare_arithmetic, compare_stories
from experiments.configs.compare_arithmetic import groups, method
from jaxrl_llm.tasks import paths

_KL = 0.02  # of stories, units of the reward per nat

# Prompts per update, such that methods decode about equally many tokens.
_PROMPTS = {
  'arithmetic': dict(
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
  ),
}
RATES = {'arithmetic': (1e-4, 2e-4, 4e-4)}
# Labels whose best learning rate is not the middle one.
_BEST = {
  'arithmetic': {
    1e-4: ('grpo', 'dpop'),
    4e-4: (
      'reinforce_once',
      'rloo_once',
      'weighted_4',
      'weighted_8',
      'weighted_16',
      'other_4',
      'other_8',
      'rest_em',
    ),
  },
}
_TOKENS = {'arithmetic': 60_000}


def get_config(task: str = 'arithmetic') -> ConfigDict:
  """Returns a comparison; with `_rates` at its end, of learning rates."""
  task, _, rates = task.partition('_')
  stories = task == 'stories'
  source = compare_stories if stories else compare_arithmetic
  config = source.get_config()
  config.base = base_config(task)
  config.seeds = (100,) if rates else (0, 1, 2, 3, 4)
  config.tokens, config.evaluations = _TOKENS[task], 12
  if rates:
    config.methods = tuple(
      _at(entry, rate, f'_{i}', f', {rate:.0e}')
      for entry in methods(task)
      for i, rate in enumerate(RATES[task])
    )
  else:
    best = {
      label: rate for rate, found in _BEST[task].items() for label in found
    }
    config.methods = tuple(
      _at(entry, best.get(entry['label'], RATES[task][1]))
      for entry in methods(task)
    )
  return config


def _at(entry: dict, rate: float, label: str = '', title: str = '') -> dict:
  """Returns the entry of a method at a learning rate."""
  names = dict(label=entry['label'] + label, title=entry['title'] + title)
  return {**entry, **names, 'optimizer': dict(learning_rate=rate)}


def base_config(task: str) -> ConfigDict:
  """Returns the configuration that all methods of a task share."""
  source = compare_stories if task == 'stories' else compare_arithmetic
  config = source.base_config()
  config.optimizer.warmup_updates = 2
  if task == 'steps':
    config.model.architecture.max_length = 96
    config.task.update(operations=(8, 8), careless=0.5, careless_per='step')
    config.prompts.max_tokens = 18
    config.rollout.max_tokens = 74
    config.warm_start.steps = 1500
  if task == 'paths':
    config.model.alphabet = paths.ALPHABET
    config.model.architecture.max_length = 64
    config.task = dict(name='paths')
    config.rewards = dict(
      correct=dict(name='jaxrl_llm.tasks.paths:reaches_goal')
    )
    config.prompts.max_tokens = 45
    config.rollout.max_tokens = 9
    config.warm_start.steps = 1000
  return config


def methods(task: str) -> tuple[dict, ...]:
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
  counts = _PROMPTS[task]
  return tuple(
    _sized(entry, counts[entry['label']])
    for entry in entries
    if entry['label'] in counts
  )


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
