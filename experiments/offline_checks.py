"""Checks configurations of the scripts that learn from stored responses."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments import build, checks, offline
from experiments.configs import base
from jaxrl_llm.errors import UserError
from jaxrl_llm.minibatches import check_divides


def check(
  config: ConfigDict, *, names: Sequence[str], sampled: bool | None = None
) -> None:
  """Raises UserError for settings that the script does not support.

  Args:
    config: configuration with the fields of `configs.base`.
    names: algorithms that the script supports.
    sampled: True if responses must be sampled, False if the task must supply
      them; None for either.
  """
  checks.check_fields(config)
  checks.check_name(config, names)
  name = config.algorithm.name
  estimator = build.reference(config)
  checks.check_default(config, 'critic', 'has no critic')
  _check_tools(config)
  _check_rounds(config, sampled)
  if config.rounds.sampling:
    _check_sampling(config, estimator.needs.samples)
  for field in ('epochs', 'minibatches'):
    if config.training[field] != 1:
      raise UserError(
        f'config.training.{field} is {config.training[field]}, but a step of '
        f'{name} is one update\nset it to 1'
      )
  batch = config.rounds.batch
  micro = config.training.micro_prompts or batch
  name = 'config.training.micro_prompts'
  check_divides(micro, batch, name, 'config.rounds.batch')
  checks.check_schedule('optimizer', config.optimizer, offline.updates(config))
  checks.check_schedule(
    'warm_start.optimizer', config.warm_start.optimizer, config.warm_start.steps
  )


def _check_tools(config: ConfigDict) -> None:
  """Refuses tools that only online RL has."""
  for section, field in (
    ('prompts', 'curriculum'),
    ('rollout', 'refill'),
    ('rollout', 'hints'),
  ):
    if value := config[section][field]:
      raise UserError(
        f'config.{section}.{field} is {value!r}, but {config.algorithm.name} '
        'does not use it: it is only for experiments.train\nremove it'
      )
  if config.prompts.pass_rates and config.algorithm.name == 'sft':
    raise UserError(
      'config.prompts.pass_rates filters prompts to sample from, but sft '
      'learns from demonstrations\nremove it'
    )


def _check_rounds(config: ConfigDict, sampled: bool | None) -> None:
  """Refuses steps, rounds and tokens that do not fit together."""
  settings, name = config.rounds, config.algorithm.name
  if sampled and not settings.sampling:
    raise UserError(
      f'config.rounds.sampling is 0, but {name} learns from its own samples\n'
      'set it to the number of sampling steps per round'
    )
  if sampled is False and settings.sampling:
    raise UserError(
      f'config.rounds.sampling is {settings.sampling}, but {name} learns from '
      'the data of the task\nset it to 0'
    )
  if not settings.sampling:
    unread = {
      'rounds.learning': (settings.learning, 0),
      'rounds.per_prompt': (
        settings.per_prompt,
        base.get_config().rounds.per_prompt,
      ),
      'tokens': (config.tokens, 0),
    }
    for field, (value, default) in unread.items():
      if value != default:
        raise UserError(
          f'config.{field} is {value}, but nothing is sampled: there is one '
          f'round of config.steps updates\nset it to {default}'
        )
    return
  if not settings.learning:
    raise UserError(
      'config.rounds.learning is 0: a round would learn nothing\n'
      'set it to the number of updates per round'
    )
  steps = offline.rounds(config).steps
  if config.steps % steps and not config.tokens:
    below = config.steps - config.steps % steps
    choice = f'{below} or {below + steps}' if below else steps
    raise UserError(
      f'config.steps is {config.steps}, which ends in the middle of a round of '
      f'{steps} steps\nset it to {choice}'
    )


def _check_sampling(config: ConfigDict, needed: int) -> None:
  if config.rollout.samples < needed:
    raise UserError(
      f'config.rollout.samples is {config.rollout.samples}; '
      f'{config.algorithm.name} needs at least {needed} per prompt'
    )
  if config.rollout.samples > 1 and config.rollout.temperature == 0:
    raise UserError(
      'config.rollout.temperature is 0: all samples would be equal\n'
      'set a temperature above 0'
    )
