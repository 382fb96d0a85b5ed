"""Checks a configuration before anything is loaded or written."""

import difflib
import math
from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import build, critics
from experiments.configs import base
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import Needs
from jaxrl_llm.minibatches import check_divides
from jaxrl_llm.models.config import ATTENTION, DTYPES
from jaxrl_llm.runs.folder import SECRET
from jaxrl_llm.tasks import hints

# The scripts of the algorithms that `train` does not support.
_SCRIPTS = {
  'sft': 'sft',
  'dpo': 'preference',
  'dpop': 'preference',
  'ipo': 'preference',
  'rest_em': 'rest_em',
  'reward_model': 'reward_model',
}

# Sections whose fields are arguments of the function named in them.
_FREE = frozenset({'model.architecture', 'task', 'rewards', 'algorithm'})

# Type of a field in words, and accepted types, by the type of its default.
_KINDS = {
  ConfigDict: ('a section with fields', (ConfigDict,)),
  bool: ('true or false', (bool,)),
  int: ('an integer, such as {!r}', (int,)),
  float: ('a number, such as {!r}', (float, int)),
  str: ('a string, such as {!r}', (str,)),
  # JSON has only lists.
  tuple: ('a tuple of numbers, such as (0.25, 0.5)', (tuple, list)),
}

# Integers are at least 0 and fit 32 bits, except the following.
_LEAST = {
  'mesh.data': -1,
  'mesh.fsdp': -1,
  'mesh.tensor': -1,
  'prompts.max_tokens': 1,
  'prompts.curriculum_stages': 2,
  'rollout.prompts': 1,
  'rollout.samples': 1,
  'rollout.max_tokens': 1,
  'training.epochs': 1,
  'training.minibatches': 1,
  'training.chunk': 1,
  'rounds.batch': 1,
  'rounds.per_prompt': 1,
  'warm_start.batch': 1,
  'evaluation.every': 1,
  'evaluation.batch': 1,
  'evaluation.samples': 1,
  'checkpoints.every': 1,
  'checkpoints.keep_latest': 1,
}
_BELOW = {'seed': 2**32, 'tokens': 2**63, 'evaluation.every_tokens': 2**63}

_SHARE = (lambda x: 0 <= x < 1, 'at least 0 and below 1')
_POSITIVE = (lambda x: x > 0, 'above 0')

# Condition on a value, and the same in words, by the last part of its name.
_RULES = {
  'param_dtype': (
    lambda x: x == 'float32',
    "'float32', as rounding would lose small updates (config.model.dtype may "
    "be 'bfloat16')",
  ),
  'dtype': (DTYPES.__contains__, f'one of {", ".join(DTYPES)}'),
  'attention': (ATTENTION.__contains__, f'one of {", ".join(ATTENTION)}'),
  'allocation': (
    ['', *build.ALLOCATIONS].__contains__,
    f"'' or one of {', '.join(build.ALLOCATIONS)}",
  ),
  'trunk': (critics.TRUNKS.__contains__, f'one of {", ".join(critics.TRUNKS)}'),
  'temperature': (lambda x: x >= 0, 'at least 0'),
  'top_p': (
    lambda x: 0 < x <= 1,
    'above 0 and at most 1, which draws from all tokens',
  ),
  'learning_rate': _POSITIVE,
  'max_grad_norm': _POSITIVE,
  'eps': _POSITIVE,
  'b1': _SHARE,
  'b2': _SHARE,
  'weight_decay': (lambda x: 0 <= x < math.inf, 'at least 0 and below inf'),
}

# Fields without effect, by the field that enables them.
_TOOLS = {
  'prompts.pass_rates': ('prompts.min_pass_rate', 'prompts.max_pass_rate'),
  'prompts.curriculum': (
    'prompts.curriculum_steps',
    'prompts.curriculum_stages',
  ),
  'rollout.hints': ('rollout.hint_threshold', 'rollout.hint_template'),
}


def check(config: ConfigDict) -> None:
  """Raises UserError for settings that `train` does not support.

  An algorithm that is named as file.py:function is loaded.
  """
  check_fields(config)
  name = config.algorithm.get('name')
  if name in _SCRIPTS:
    raise UserError(
      f'config.algorithm.name is {name!r}, which is not online RL\n'
      f'train with experiments.{script(name)}'
    )
  reason = f'but {name} learns from its own samples in every step'
  check_unused(config, ['rounds'], reason)
  needs = build.estimator(config).needs
  _check_critic(config, needs.critic)
  _check_updates(config, needs)
  _check_regrouping(config, needs)
  prompts, settings = config.rollout.prompts, config.training
  name = 'config.training.minibatches'
  check_divides(settings.minibatches, prompts, name, 'config.rollout.prompts')
  check_divides(
    build.micro_prompts(config),
    prompts // settings.minibatches,
    'config.training.micro_prompts',
    f'of a minibatch: config.rollout.prompts, {prompts}, divided by {name}, '
    f'{settings.minibatches}',
  )


def check_name(config: ConfigDict, names: Collection[str]) -> None:
  """Raises UserError for an algorithm that a script does not support.

  Args:
    config: the whole configuration.
    names: names of the supported algorithms.
  """
  name = config.algorithm.get('name')
  if name not in names:
    known = ' or '.join(names)
    hint = f', or train with experiments.{script(name)}' if name else ''
    raise UserError(
      f'config.algorithm.name is {name!r}: this script supports {known}\n'
      f'set {known}{hint}'
    )


def script(name: Any) -> str:
  """Returns the script of `experiments` that supports an algorithm."""
  return _SCRIPTS.get(name, 'train')


def check_fields(config: ConfigDict) -> None:
  """Raises UserError for a field that is invalid by itself; runs no code.

  A field that `configs.base` lacks would have no effect, and a missing field
  would fail in the middle of a run.  Types must match those of the defaults;
  lists are accepted for tuples, since a resumed run reads JSON.
  """
  _check_secrets(config)
  fields, known = dict(leaves(config)), dict(leaves(base.get_config()))
  for name in fields:
    if name not in known:
      near = difflib.get_close_matches(name, known, 1)
      hint = f'did you mean config.{near[0]}?' if near else 'remove it'
      raise UserError(f'nothing reads config.{name}\n{hint}')
  for name, default in known.items():
    kind, types = _KINDS[type(default)]
    if name not in fields:
      raise UserError(
        f'config.{name} is missing: {kind.format(default)}\nstart from config '
        '= base.get_config() of experiments.configs, which has every field'
      )
    value, required = fields[name], kind.format(default)
    if type(value) in types:
      required = _violated(name, value, default)
    if required:
      raise UserError(f'config.{name} is {value!r}\nit must be {required}')
  for section in ('task', 'algorithm'):
    name = fields[section].get('name')
    if not isinstance(name, str | None):
      raise UserError(f'config.{section}.name is {name!r}\nit must be a string')
  for tool, names in _TOOLS.items():
    if not fields[tool]:
      reason = f'which has no effect unless config.{tool} is set'
      check_unused(config, names, reason, f'remove it, or set config.{tool}')
  _check_combinations(config)
  _check_hints(config.rollout)


def _check_secrets(config: ConfigDict) -> None:
  for name, value in leaves(config, free=()):
    if value and isinstance(value, str) and SECRET.search(name):
      raise UserError(
        f"config.{name} looks like a secret, which the run's folder would keep"
        '\nhave the function read a variable: with workers, '
        "environment=('OPENAI_API_KEY',)\nif it is not a secret, rename it"
      )


def _violated(name: str, value: Any, default: Any) -> str:
  """Returns the condition that a value violates, in words; '' for none."""
  low, below = _LEAST.get(name, 0), _BELOW.get(name, 2**31)
  satisfies, words = _RULES.get(name.rpartition('.')[2], (lambda x: True, ''))
  if isinstance(value, float) and math.isnan(value):
    return 'a number'
  if type(default) is int and value < low:
    return f'at least {low}'
  if isinstance(value, int) and abs(value) >= below:
    return f'below {below}'
  return '' if satisfies(value) else words


def check_unused(
  config: ConfigDict, names: Collection[str], why: str, do: str = ''
) -> None:
  """Raises UserError if a field without effect differs from its default.

  Args:
    config: the whole configuration.
    names: dotted names of fields or sections without effect.
    why: the reason, which continues the sentence 'config.NAME is VALUE, '.
    do: advice to the user; '' to set the default.
  """
  defaults = dict(leaves(base.get_config()))
  for name, value in leaves(config):
    default = defaults[name]
    named = any(f'{name}.'.startswith(f'{each}.') for each in names)
    # An empty list stands for an empty tuple.
    if named and value != default and (value or default):
      do = do or f'set it to {default!r}'
      raise UserError(f'config.{name} is {value!r}, {why}\n{do}')


def check_schedules(config: ConfigDict, updates: Mapping[str, int]) -> None:
  """Raises UserError if a schedule does not fit the number of updates.

  Args:
    config: the whole configuration.
    updates: number of updates by the name of the optimizer's section.
  """
  for name, count in updates.items():
    *section, field = name.split('.')
    settings = config[section[0]] if section else config
    try:
      build.optimizer(settings[field], count)
    except UserError as error:
      raise UserError(f'config.{name}: {error}') from error


def _check_critic(config: ConfigDict, wanted: bool) -> None:
  """Refuses invalid settings of a critic, or any if there is no critic."""
  section = config.critic
  if not wanted:
    advice = 'remove it, or use an algorithm with one, such as ppo'
    reason = f'but {config.algorithm.name} has no critic'
    check_unused(config, ['critic'], reason, advice)
  elif section.path and section.trunk == 'shared':
    raise UserError(
      f'config.critic.path is {section.path!r}, but a shared trunk is the '
      "policy's\nset config.critic.trunk to 'separate', or path to ''"
    )
  elif section.warmup >= config.steps > 0:
    raise UserError(
      f'config.critic.warmup is {section.warmup}, but there are only '
      f'{config.steps} steps: the policy would never learn\n'
      f'set it to {config.steps - 1} or less'
    )


def _check_updates(config: ConfigDict, needs: Needs) -> None:
  """Refuses schedules or numbers of updates that do not fit the estimator."""
  per_step = config.training.epochs * config.training.minibatches
  if needs.on_policy and per_step > 1:
    raise UserError(
      f'{config.algorithm.name} has no importance ratio, but a step takes '
      f'{per_step} updates\n'
      'set config.training.epochs and minibatches to 1, or use a clipped loss'
    )
  decays = {
    'optimizer': config.optimizer.decay,
    'critic.optimizer': config.critic.optimizer.decay,
  }
  for section, decay in decays.items():
    if config.tokens and decay != 'constant':
      raise UserError(
        f'config.{section}.decay is {decay!r}, but its end is unknown if '
        "config.tokens ends the run\nset decay to 'constant', or tokens to 0 "
        'and config.steps'
      )
  # Without a critic, its warm-up is 0.
  updates = {
    'optimizer': (config.steps - config.critic.warmup) * per_step,
    'critic.optimizer': config.steps * per_step,
    'warm_start.optimizer': config.warm_start.steps,
  }
  check_schedules(config, updates)


def _check_regrouping(config: ConfigDict, needs: Needs) -> None:
  """Refuses data tools that do not fit the estimator's rollouts."""
  rollout = config.rollout
  name = 'refill' if rollout.refill else 'hints'
  related = needs.branches or needs.tree
  if rollout[name] and related:
    raise UserError(
      f'config.rollout.{name} replaces groups of responses, but those of '
      f'{config.algorithm.name} are trees or have branches\n'
      f'remove {name}, or use an algorithm without them'
    )
  if rollout.allocation and related:
    raise UserError(
      f'config.rollout.allocation is {rollout.allocation!r}, but '
      f'{config.algorithm.name} grows trees or branches of its own\n'
      'remove allocation, or use an algorithm without them'
    )
  if rollout.refill and rollout.samples < 2:
    raise UserError(
      'config.rollout.refill needs groups whose rewards differ, but '
      'config.rollout.samples is 1\nset samples to 2 or more, or refill to 0'
    )


def _check_combinations(config: ConfigDict) -> None:
  """Refuses valid fields that do not fit together, whatever the algorithm."""
  settings, evaluation = config.prompts, config.evaluation
  if evaluation.samples > 1 and evaluation.temperature == 0:
    raise UserError(
      f'config.evaluation.samples is {evaluation.samples} at temperature 0: '
      'all would be equal\nset samples to 1, or a temperature'
    )
  low, high = settings.min_pass_rate, settings.max_pass_rate
  if not 0 <= low <= high <= 1:
    raise UserError(
      f'config.prompts.min_pass_rate is {low}, max_pass_rate {high}\n'
      'set both from 0 to 1, the minimum first'
    )
  steps, stages = settings.curriculum_steps, settings.curriculum_stages
  if settings.curriculum and stages > steps + 1:
    raise UserError(
      f'config.prompts.curriculum_steps is {steps}, too few for '
      f'{stages} stages\nset it to {stages - 1} or more'
    )


def _check_hints(rollout: ConfigDict) -> None:
  shares = list(rollout.hints)
  numbers = all(type(share) in (int, float) for share in shares)
  if not numbers or shares != sorted({s for s in shares if 0 < s <= 1}):
    raise UserError(
      f'config.rollout.hints is {rollout.hints!r}\ngive shares above 0 and at '
      'most 1, in increasing order, such as (0.25, 0.5, 0.75)'
    )
  try:
    hints.check_template(rollout.hint_template)
  except UserError as error:
    raise UserError(f'config.rollout.hint_template: {error}') from error


def leaves(
  config: ConfigDict, prefix: str = '', free: Container[str] = _FREE
) -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, value) per field; a free section is one field."""
  for key, value in config.items():
    name = prefix + key
    if isinstance(value, ConfigDict) and name not in free:
      yield from leaves(value, f'{name}.', free)
    else:
      yield name, value
