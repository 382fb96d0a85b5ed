"""What a configuration must be before anything is loaded or written."""

import difflib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from experiments import build
from experiments.configs import base
from jaxrl_llm.errors import UserError

# Sections whose fields are arguments of the function that they name.
_FREE = frozenset({'model.architecture', 'task', 'rewards', 'algorithm'})

_DTYPES = ('float32', 'bfloat16')

_LEAST = {
  'seed': 0,
  'steps': 0,
  'prompts.max_tokens': 1,
  'rollout.prompts': 1,
  'rollout.samples': 1,
  'rollout.max_tokens': 1,
  'training.epochs': 1,
  'training.minibatches': 1,
  'training.micro_prompts': 0,
  'training.chunk': 1,
  'warm_start.steps': 0,
  'warm_start.batch': 1,
  'evaluation.every': 1,
  'evaluation.prompts': 0,
  'evaluation.batch': 1,
  'evaluation.samples': 1,
  'checkpoints.every': 1,
  'checkpoints.keep_latest': 1,
  'checkpoints.keep_best': 0,
  'log.samples': 0,
  'log.table': 0,
}


def check(config: ConfigDict) -> None:
  """Raises UserError for what can be told from the configuration alone.

  A field that `configs.base` does not have would be read by nothing; one that
  is missing would fail in the middle of a run.
  """
  fields, known = dict(leaves(config)), dict(leaves(base.get_config()))
  for name in fields:
    if name not in known:
      near = difflib.get_close_matches(name, known, 1)
      hint = f'did you mean config.{near[0]}?' if near else 'remove it'
      raise UserError(f'nothing reads config.{name}\n{hint}')
  for name in known:
    if name not in fields:
      raise UserError(
        f'config.{name} is missing\nbegin with config = base.get_config() of '
        'experiments.configs'
      )
  for name, least in _LEAST.items():
    if fields[name] < least:
      raise UserError(
        f'config.{name} is {fields[name]}\nit must be at least {least}'
      )
  _check_numbers(config)
  build.estimator(config)
  prompts, settings = config.rollout.prompts, config.training
  _check_divides(prompts, settings.minibatches, 'minibatches')
  minibatch = prompts // settings.minibatches
  micro_prompts = settings.micro_prompts or minibatch
  _check_divides(minibatch, micro_prompts, 'micro_prompts')


def _check_numbers(config: ConfigDict) -> None:
  if config.model.param_dtype not in _DTYPES:
    raise UserError(
      f'config.model.param_dtype is {config.model.param_dtype!r}\n'
      f'choose one of {", ".join(_DTYPES)}'
    )
  sections = {
    'optimizer': config.optimizer,
    'warm_start.optimizer': config.warm_start.optimizer,
  }
  for section, settings in sections.items():
    for name in ('learning_rate', 'max_grad_norm', 'eps'):
      value = settings[name]
      if value is not None and not value > 0:
        raise UserError(
          f'config.{section}.{name} is {value}\nit must be above 0'
        )


def _check_divides(prompts: int, parts: int, name: str) -> None:
  if prompts % parts:
    possible = [n for n in range(1, prompts + 1) if prompts % n == 0]
    raise UserError(
      f'config.training.{name} is {parts}, which does not divide {prompts} '
      f'prompts\nchoose one of {possible}'
    )


def leaves(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """(dotted name, value) of every field; a free section is one field."""
  for key, value in config.items():
    name = prefix + key
    if isinstance(value, ConfigDict) and name not in _FREE:
      yield from leaves(value, f'{name}.')
    else:
      yield name, value
