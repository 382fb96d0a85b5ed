"""Configurations of `benchmarks.freeze`; each runs for seconds.

Both sides load copies of this file, each named after the configuration that
`get_config` returns.
"""

import pathlib
import sys

MARK = 'freeze: '  # begins this file's own lines in a log

# Sections that are set as a whole.
_WHOLE = 'algorithm', 'task', 'rewards', 'architecture'
_SHAPE = dict(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2)
# Every prompt occurs three times.
_SIZES = dict(train=8, held_out=8, demonstrations=8)
_RANGES = dict(operations=(1, 2), operands=(0, 9), operators='+', modulus=10)
_COMMON = dict(
  model=dict(
    alphabet='0123456789+-*=',
    architecture=dict(tied=True, max_length=64, **_SHAPE),
  ),
  task=dict(name='arithmetic', **_SIZES, **_RANGES),
  prompts=dict(max_tokens=12),
  # Partial credit: rewards differ within groups from the first step.
  rewards=dict(
    correct=dict(name='arithmetic_answer'),
    prefix=dict(name='prefix_match', weight=0.5),
    digits=dict(name='format_match', pattern='[0-9]+.?', weight=0.25),
  ),
  rollout=dict(prompts=4, samples=4, max_tokens=6, log_prob_tolerance=1e-4),
  warm_start=dict(steps=8, batch=8, optimizer=dict(learning_rate=1e-2)),
  optimizer=dict(learning_rate=3e-3),
  steps=6,
  evaluation=dict(every=3, prompts=8, batch=8),
  checkpoints=dict(every=2),
  log=dict(samples=16),  # all of a step: their rewards are compared exactly
)
_ROUNDS = dict(sampling=1, learning=2, batch=4, per_prompt=2)
_CURRICULUM = dict(curriculum_steps=2, curriculum_stages=2)
# Name → script, what differs from `_COMMON`.
CONFIGURATIONS = {
  'grpo': (
    'train',
    dict(
      algorithm=dict(name='grpo', kl=0.04),
      training=dict(epochs=2, minibatches=2, micro_prompts=1),
      optimizer=dict(decay='linear'),
    ),
  ),
  'rloo': (
    'train',
    dict(
      algorithm=dict(name='rloo', kl=0.02),
      prompts=dict(curriculum='operations', **_CURRICULUM),
      rollout=dict(refill=2, hints=(0.5,), hint_threshold=0.25),
      evaluation=dict(samples=4, temperature=1.0),
    ),
  ),
  'trepo': (
    'train',
    dict(
      algorithm=dict(name='trepo', count=2, samples=2, kl=0.05),
      training=dict(micro_prompts=2),
    ),
  ),
  'trepo_tree': (
    'train',
    dict(
      algorithm=dict(name='trepo_tree', count=2, samples=2, kl=0.05),
      training=dict(minibatches=2),
    ),
  ),
  'ppo': (
    'train',
    dict(
      algorithm=dict(name='ppo', kl=0.05),
      critic=dict(warmup=1, optimizer=dict(learning_rate=1e-2)),
      rollout=dict(temperature=0.8),
      training=dict(minibatches=2),
    ),
  ),
  'remax': (
    'train',
    dict(
      algorithm=dict(name='remax'),
      # Without tolerance the trainer recomputes log-probabilities.
      rollout=dict(top_k=8, top_p=0.9, log_prob_tolerance=0.0),
    ),
  ),
  'dpop': ('preference', dict(algorithm=dict(name='dpop'), rounds=_ROUNDS)),
  'rest_em': (
    'rest_em',
    dict(algorithm=dict(name='rest_em', threshold=0.1), rounds=_ROUNDS),
  ),
}


def get_config():
  import experiments
  import jaxrl_llm
  from experiments.configs import base

  for package in (experiments, jaxrl_llm):
    path = pathlib.Path(package.__file__).resolve()
    if not path.is_relative_to(pathlib.Path.cwd().resolve()):
      raise ImportError(f'{path} is not the code of this side')
  config = base.get_config()
  _, changes = CONFIGURATIONS[pathlib.Path(__file__).stem]
  for settings in (_COMMON, changes):
    _put(config, settings)
  return config


def _put(section, settings: dict, prefix: str = '') -> None:
  """Sets the fields that a section has; reports those that it lacks."""
  for name, value in settings.items():
    if name not in section:
      print(f'{MARK}no field {prefix}{name}', file=sys.stderr)
    elif isinstance(value, dict) and name not in _WHOLE:
      _put(section[name], value, f'{prefix}{name}.')
    else:
      section[name] = value
