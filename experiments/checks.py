"""Checks a configuration before anything is loaded or written."""

import difflib
import math
from collections.abc import Container, Iterator, Sequence
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

_LEAST = {
  'seed': 0,
  'steps': 0,
  'tokens': 0,
  'prompts.max_tokens': 1,
  'prompts.curriculum_steps': 0,
  'prompts.curriculum_stages': 2,
  'rollout.prompts': 1,
  'rollout.samples': 1,
  'rollout.max_tokens': 1,
  'rollout.temperature': 0,
  'rollout.top_k': 0,
  'rollout.refill': 0,
  'training.epochs': 1,
  'training.minibatches': 1,
  'training.micro_prompts': 0,
  'training.chunk': 1,
  'rounds.sampling': 0,
  'rounds.learning': 0,
  'rounds.batch': 1,
  'rounds.per_prompt': 1,
  'critic.warmup': 0,
  'warm_start.steps': 0,
  'warm_start.batch': 1,
  'evaluation.every': 1,
  'evaluation.every_tokens': 0,
  'evaluation.prompts': 0,
  'evaluation.batch': 1,
  'evaluation.samples': 1,
  'evaluation.temperature': 0,
  'checkpoints.every': 1,
  'checkpoints.keep_latest': 1,
  'checkpoints.keep_best': 0,
  'log.samples': 0,
  'log.table': 0,
}

# Upper bounds of integers; the default is the largest size of an axis.
_BELOW = {
  'seed': 2**32,
  'tokens': 2**63,
  'evaluation.every_tokens': 2**63,
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
      f'{_script(name)}'
    )
  check_default(config, 'rounds', 'learns from its own samples in every step')
  needs = build.estimator(config).needs
  _check_critic(config, needs.critic)
  _check_schedules(config, needs.critic)
  _check_on_policy(config, needs)
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


def check_name(config: ConfigDict, names: Sequence[str]) -> None:
  """Raises UserError for an algorithm that a script does not support.

  Args:
    config: the whole configuration.
    names: names of the supported algorithms.
  """
  name = config.algorithm.get('name')
  if name not in names:
    *most, last = names
    known = f'{", ".join(most)} or {last}' if most else last
    hint = f', or {_script(name)}' if name else ''
    raise UserError(
      f'config.algorithm.name is {name!r}: this script supports {known}\n'
      f'set {known}{hint}'
    )


def script(name: Any) -> str:
  """Returns the script of `experiments` that supports an algorithm."""
  return _SCRIPTS.get(name, 'train')


def _script(name: Any) -> str:
  return f'train with experiments.{script(name)}'


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
    kind, types = _kind(default)
    if name not in fields:
      raise UserError(
        f'config.{name} is missing: {kind}\nstart from config = '
        'base.get_config() of experiments.configs, which has every field'
      )
    if type(fields[name]) not in types:
      raise UserError(f'config.{name} is {fields[name]!r}\nit must be {kind}')
  for name, least in _LEAST.items():
    if fields[name] < least:
      raise UserError(
        f'config.{name} is {fields[name]}\nit must be at least {least}'
      )
  _check_sizes(fields)
  for section in ('task', 'algorithm'):
    name = fields[section].get('name')
    if not isinstance(name, str | None):
      raise UserError(f'config.{section}.name is {name!r}\nit must be a string')
  _check_numbers(config)
  _check_prompts(config.prompts)
  _check_hints(config.rollout)


def _check_secrets(config: ConfigDict) -> None:
  for name, value in leaves(config, free=()):
    if value and isinstance(value, str) and SECRET.search(name):
      raise UserError(
        f"config.{name} looks like a secret, which the run's folder would keep"
        '\nhave the function read a variable: with workers, '
        "environment=('OPENAI_API_KEY',)\nif it is not a secret, rename it"
      )


def _kind(default: Any) -> tuple[str, tuple[type, ...]]:
  """Returns the type of a field with this default, in words and as types."""
  if isinstance(default, ConfigDict):
    return 'a section with fields', (ConfigDict,)
  kinds = {
    bool: ('true or false', (bool,)),
    int: (f'an integer, such as {default!r}', (int,)),
    float: (f'a number, such as {default!r}', (float, int)),
    str: (f'a string, such as {default!r}', (str,)),
    # JSON has only lists.
    tuple: ('a tuple of numbers, such as (0.25, 0.5)', (tuple, list)),
  }
  return kinds[type(default)]


def _check_sizes(fields: dict[str, Any]) -> None:
  """Refuses NaN and numbers that are too large."""
  for name, value in fields.items():
    if isinstance(value, float) and math.isnan(value):
      raise UserError(f'config.{name} is nan\nit must be a number')
    below = _BELOW.get(name, 2**31)
    if isinstance(value, int) and abs(value) >= below:
      raise UserError(f'config.{name} is {value}\nit must be below {below}')


def _check_numbers(config: ConfigDict) -> None:
  if config.model.param_dtype != 'float32':
    raise UserError(
      f'config.model.param_dtype is {config.model.param_dtype!r}: '
      "rounding would lose small updates\nset it to 'float32' "
      "(config.model.dtype may be 'bfloat16')"
    )
  for name, choices in (('dtype', DTYPES), ('attention', ATTENTION)):
    if config.model[name] not in choices:
      raise UserError(
        f'config.model.{name} is {config.model[name]!r}\nit must be one of '
        f'{", ".join(choices)}'
      )
  if not 0 < config.rollout.top_p <= 1:
    raise UserError(
      f'config.rollout.top_p is {config.rollout.top_p}\nit must be above 0 '
      'and at most 1, which draws from all tokens'
    )
  if config.evaluation.samples > 1 and config.evaluation.temperature == 0:
    raise UserError(
      f'config.evaluation.samples is {config.evaluation.samples} at '
      'temperature 0: all would be equal\nset samples to 1, or a temperature'
    )
  sections = {
    'optimizer': config.optimizer,
    'critic.optimizer': config.critic.optimizer,
    'warm_start.optimizer': config.warm_start.optimizer,
  }
  for section, settings in sections.items():
    for name in ('learning_rate', 'max_grad_norm', 'eps'):
      value = settings[name]
      if value is not None and not value > 0:
        raise UserError(
          f'config.{section}.{name} is {value}\nit must be above 0'
        )
    for name, high in (('b1', 1), ('b2', 1), ('weight_decay', float('inf'))):
      if not 0 <= settings[name] < high:
        raise UserError(
          f'config.{section}.{name} is {settings[name]}\n'
          f'it must be at least 0 and below {high}'
        )
    if settings.warmup_updates < 0:
      raise UserError(
        f'config.{section}.warmup_updates is {settings.warmup_updates}\n'
        'it must be at least 0'
      )


def check_default(
  config: ConfigDict, section: str, why: str, do: str = 'remove it'
) -> None:
  """Raises UserError if an unused section differs from the default.

  Args:
    config: the whole configuration.
    section: name of the section.
    why: reason that the algorithm does not use it, as a predicate.
    do: advice to the user.
  """
  defaults = dict(leaves(base.get_config()[section]))
  for name, value in leaves(config[section]):
    if value != defaults[name]:
      raise UserError(
        f'config.{section}.{name} is {value!r}, but {config.algorithm.name} '
        f'{why}\n{do}'
      )


def check_schedule(field: str, settings: ConfigDict, updates: int) -> None:
  """Raises UserError if a schedule does not fit the number of updates."""
  try:
    build.optimizer(settings, updates)
  except UserError as error:
    raise UserError(f'config.{field}: {error}') from error


def _check_critic(config: ConfigDict, wanted: bool) -> None:
  """Refuses invalid settings of a critic, or any if there is no critic."""
  section = config.critic
  if not wanted:
    check_default(
      config,
      'critic',
      'has no critic',
      'remove it, or use an algorithm with one, such as ppo',
    )
    return
  if section.trunk not in critics.TRUNKS:
    raise UserError(
      f'config.critic.trunk is {section.trunk!r}\n'
      f'choose one of {", ".join(critics.TRUNKS)}'
    )
  if section.path and section.trunk == 'shared':
    raise UserError(
      f'config.critic.path is {section.path!r}, but a shared trunk is the '
      "policy's\nset config.critic.trunk to 'separate', or path to ''"
    )
  if section.warmup >= config.steps > 0:
    raise UserError(
      f'config.critic.warmup is {section.warmup}, but there are only '
      f'{config.steps} steps: the policy would never learn\n'
      f'set it to {config.steps - 1} or less'
    )


def _check_schedules(config: ConfigDict, with_critic: bool) -> None:
  per_step = config.training.epochs * config.training.minibatches
  warmup = config.critic.warmup if with_critic else 0
  phases = {
    'optimizer': (config.optimizer, (config.steps - warmup) * per_step),
    'critic.optimizer': (config.critic.optimizer, config.steps * per_step),
    'warm_start.optimizer': (
      config.warm_start.optimizer,
      config.warm_start.steps,
    ),
  }
  for section in ('optimizer', 'critic.optimizer'):
    decay = phases[section][0].decay
    if config.tokens and decay != 'constant':
      raise UserError(
        f'config.{section}.decay is {decay!r}, but its end is unknown if '
        "config.tokens ends the run\nset decay to 'constant', or tokens to 0 "
        'and config.steps'
      )
  for section, (settings, updates) in phases.items():
    check_schedule(section, settings, updates)


def _check_on_policy(config: ConfigDict, needs: Needs) -> None:
  """Refuses several updates per step for a loss without a ratio."""
  updates = config.training.epochs * config.training.minibatches
  if needs.on_policy and updates > 1:
    raise UserError(
      f'{config.algorithm.name} has no importance ratio, but a step takes '
      f'{updates} updates\n'
      'set config.training.epochs and minibatches to 1, or use a clipped loss'
    )


def _check_regrouping(config: ConfigDict, needs: Needs) -> None:
  """Refuses data tools that do not fit the estimator's rollouts."""
  rollout = config.rollout
  name = 'refill' if rollout.refill else 'hints'
  if not rollout[name]:
    return
  if needs.branches:
    raise UserError(
      f'config.rollout.{name} replaces groups of responses, but '
      f'{config.algorithm.name} branches from their keys and values\n'
      f'remove {name}, or use an algorithm without branches'
    )
  if rollout.refill and rollout.samples < 2:
    raise UserError(
      'config.rollout.refill needs groups whose rewards differ, but '
      'config.rollout.samples is 1\nset samples to 2 or more, or refill to 0'
    )


def _check_prompts(settings: ConfigDict) -> None:
  """Refuses an invalid filter or curriculum, and unused settings."""
  low, high = settings.min_pass_rate, settings.max_pass_rate
  if not 0 <= low <= high <= 1:
    raise UserError(
      f'config.prompts.min_pass_rate is {low}, max_pass_rate {high}\n'
      'set both from 0 to 1, the minimum first'
    )
  parts = {
    'pass_rates': ('min_pass_rate', 'max_pass_rate'),
    'curriculum': ('curriculum_steps', 'curriculum_stages'),
  }
  for name, others in parts.items():
    if not settings[name]:
      _check_unset('prompts', name, others, settings)
  steps, stages = settings.curriculum_steps, settings.curriculum_stages
  if settings.curriculum and stages > steps + 1:
    raise UserError(
      f'config.prompts.curriculum_steps is {steps}, too few for '
      f'{stages} stages\nset it to {stages - 1} or more'
    )


def _check_hints(rollout: ConfigDict) -> None:
  if not rollout.hints:
    names = 'hint_threshold', 'hint_template'
    _check_unset('rollout', 'hints', names, rollout)
    return
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


def _check_unset(
  section: str, name: str, others: tuple[str, ...], settings: ConfigDict
) -> None:
  """Refuses settings of a disabled tool."""
  defaults = base.get_config()[section]
  for other in others:
    if settings[other] != defaults[other]:
      raise UserError(
        f'config.{section}.{other} is {settings[other]!r}, which has no '
        f'effect unless config.{section}.{name} is set\n'
        f'set {name}, or remove {other}'
      )


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
