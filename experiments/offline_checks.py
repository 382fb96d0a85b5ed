"""Checks configurations of the scripts that learn from stored responses."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments import build, checks, offline
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
  needed = build.reference(config).needs.samples
  name, settings = config.algorithm.name, config.rounds
  if sampled and not settings.sampling:
    raise UserError(
      f'config.rounds.sampling is 0, but {name} learns from its own samples\n'
      'set it to the number of sampling steps per round'
    )
  for fields, reason in _unused(config, sampled).items():
    checks.check_unused(config, fields, reason)
  if settings.sampling:
    _check_rounds(config)
    _check_sampling(config, needed)
  check_divides(
    config.training.micro_prompts or settings.batch,
    settings.batch,
    'config.training.micro_prompts',
    'config.rounds.batch',
  )
  updates = {
    'optimizer': offline.updates(config),
    'warm_start.optimizer': config.warm_start.steps,
  }
  checks.check_schedules(config, updates)


def _unused(
  config: ConfigDict, sampled: bool | None
) -> dict[tuple[str, ...], str]:
  """Returns the reason, as for `check_unused`, by fields without effect."""
  name = config.algorithm.name
  unused = {
    ('critic',): f'but {name} has no critic',
    ('prompts.curriculum', 'rollout.refill', 'rollout.hints'): (
      f'but {name} does not use it: it is only for experiments.train'
    ),
    ('training.epochs', 'training.minibatches'): (
      f'but a step of {name} is one update'
    ),
  }
  if name == 'sft':
    unused['prompts.pass_rates',] = (
      'which filters prompts to sample from, but sft learns from demonstrations'
    )
  if sampled is False:
    unused['rounds.sampling',] = f'but {name} learns from the data of the task'
  if not config.rounds.sampling:
    unused['rounds.learning', 'rounds.per_prompt', 'tokens'] = (
      'but nothing is sampled: there is one round of config.steps updates'
    )
  return unused


def _check_rounds(config: ConfigDict) -> None:
  """Refuses steps that do not fill rounds, and rounds without updates."""
  if not config.rounds.learning:
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
