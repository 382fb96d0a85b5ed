"""Builds the arguments of the library's functions from a configuration."""

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import data
from jaxrl_llm import estimators, naming, rollouts, sharding, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import (
  actor_critic,
  advantages,
  algorithms,
  diagnostics,
  positions,
  supervised_preference,
  thresholds,
  weighted_trees,
)
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.rewards import RewardPart, Workers, calling
from jaxrl_llm.sampling import policy
from jaxrl_llm.sampling.allocation import Independent
from jaxrl_llm.tasks import pass_rates, vocabulary
from jaxrl_llm.tasks import prompts as prompts_lib

# Modules whose functions `config.algorithm` may name, and modules whose
# functions its arguments may name.
ALGORITHMS = (algorithms, actor_critic)
PARTS = (advantages, positions, thresholds, weighted_trees)
# By name in `config.rollout.allocation`.
ALLOCATIONS = {'independent': Independent}

# Sections whose specifications may name a user's functions.
CODE = ('task', 'algorithm', 'rewards')

# Arguments of a reward in worker processes besides those of its factory.
_LIMITS = ('workers', 'timeout', 'memory', 'environment')


class Model(NamedTuple):
  """A model with its tokenizer and source.

  Attributes:
    config, params, tokenizer: the model.
    eos_ids: tokens that end a response.
    source: the Hugging Face folder; None for a model made from scratch.
  """

  config: ModelConfig
  params: Any
  tokenizer: Any
  eos_ids: tuple[int, ...]
  source: str | None


def model(config, seed: int) -> Model:
  """Loads `config.path`, or initialises a model of `config.architecture`."""
  built = outline(config)
  if config.path:
    _, params = folders.load(
      config.path,
      config.param_dtype,
      shardings=sharding.shardings(built.params),
      **model_settings(config),
    )
  else:
    key = jax.random.key(seed)
    params = transformer.init(built.config, key, config.param_dtype)
  return built._replace(params=params)


def outline(config) -> Model:
  """Returns the same as `model`, with shapes in place of parameters."""
  settings = model_settings(config)
  if config.path:
    shape = folders.load_config(config.path, **settings)
    tokenizer = folders.load_tokenizer(config.path)
    eos_ids = folders.eos_token_ids(config.path, tokenizer)
  else:
    if not config.alphabet:
      message = 'config.model: neither path nor alphabet is set'
      folder = 'set a Hugging Face folder: --config.model.path=FOLDER'
      raise UserError(f'{message}\n{folder}')
    tokenizer = vocabulary.character_tokenizer(config.alphabet)
    shape = _architecture(config.architecture, len(tokenizer), settings)
    eos_ids = folders.eos_token_ids(tokenizer=tokenizer)
  folders.check_vocabulary(shape, tokenizer)
  params = jax.eval_shape(
    lambda: transformer.init(shape, jax.random.key(0), config.param_dtype)
  )
  return Model(shape, params, tokenizer, eos_ids, config.path or None)


def task(config, tokenizer) -> data.Data:
  """Returns the whole data set of `config.task`."""
  return naming.call(
    data, config.task.to_dict(), 'config.task', tokenizer=tokenizer
  )


def dataset(config, tokenizer) -> data.Data:
  """Returns the data set for training: `task` filtered by `config.prompts`.

  Raises:
    UserError: the file of pass rates lacks prompts, or no prompt remains.
  """
  whole, settings = task(config, tokenizer), config.prompts
  if not settings.pass_rates:
    return whole
  low, high = settings.min_pass_rate, settings.max_pass_rate
  rates = pass_rates.read_rates(settings.pass_rates)
  chosen = pass_rates.filter_by_rate(whole.train, rates, low, high)
  note = (
    f'{settings.pass_rates}: {len(chosen.rows):,} of {len(whole.train):,} '
    f'training prompts have a pass rate within [{low:g}, {high:g}]; excluded '
    f'{chosen.below:,} below, {chosen.above:,} above, {chosen.unrated:,} '
    'without a rate'
  )
  return whole._replace(train=chosen.rows, notes=(*whole.notes, note))


def encode(config, rows, tokenizer) -> prompts_lib.EncodedPrompts:
  """Encodes rows as token ids, as specified by `config.prompts`."""
  return prompts_lib.encode_prompts(
    rows,
    tokenizer,
    config.prompts.max_tokens,
    overlong=config.prompts.overlong,
    **around_prompts(config),
  )


def around_prompts(config) -> dict[str, Any]:
  """Returns the settings of the text around a row's prompt."""
  settings = config.prompts
  return {
    'chat_template': settings.chat_template or None,
    'system_prompt': settings.system_prompt or None,
    'suffix': settings.suffix,
  }


def encode_targets(
  config, rows, built: Model, column: str, limited: bool = True
) -> list[np.ndarray]:
  """Encodes the texts of a column, each followed by the end token.

  Args:
    config: the whole configuration.
    rows: rows with the column.
    built: model with tokenizer and end tokens.
    column: name of the column.
    limited: refuse texts of more than `config.rollout.max_tokens`.

  Raises:
    UserError: a text is missing, too long or cannot be encoded, or there is no
      end token to learn.
  """
  if not built.eos_ids:
    raise UserError('the tokenizer has no end token to learn')
  end = built.tokenizer.eos_token_id
  return prompts_lib.encode_targets(
    rows,
    built.tokenizer,
    config.rollout.max_tokens if limited else None,
    end if end in built.eos_ids else built.eos_ids[0],
    column,
  )


def check_room(config, built: Model) -> None:
  """Raises UserError if a model cannot read prompt and response together."""
  prompt, response = config.prompts.max_tokens, config.rollout.max_tokens
  if prompt + response > built.config.max_length:
    raise UserError(
      f'{prompt} prompt and {response} response tokens exceed the '
      f"model's {built.config.max_length}\n"
      'lower config.prompts.max_tokens or config.rollout.max_tokens'
    )


def generation(
  config,
  built: Model,
  pad_id: int,
  *,
  samples: int | None = None,
  temperature: float | None = None,
) -> rollouts.Generation:
  """Builds the sampling settings of `config.rollout`.

  Args:
    config, built: the whole configuration and the model.
    pad_id: token after the end of a response.
    samples, temperature: in place of the configuration's.
  """
  check_room(config, built)
  settings, allocation = config.rollout, None
  if settings.allocation and samples is None and temperature is None:
    allocation = ALLOCATIONS[settings.allocation](settings.samples)
  if temperature is None:
    temperature = settings.temperature
  return rollouts.Generation(
    samples=settings.samples if samples is None else samples,
    max_tokens=settings.max_tokens,
    decoding=policy.Decoding(
      temperature=temperature,
      top_k=settings.top_k,
      top_p=settings.top_p,
      num_tokens=known_tokens(built),
    ),
    eos_ids=built.eos_ids,
    pad_id=pad_id,
    allocation=allocation,
  )


def known_tokens(built: Model) -> int:
  """Returns the number of token ids; further embedding rows are padding."""
  return max(built.tokenizer.get_vocab().values()) + 1


def estimator(config) -> estimators.Estimator:
  """Builds the estimator of `config.algorithm` and checks its shapes."""
  spec = config.algorithm.to_dict()
  built = named_estimator(spec)
  if config.rollout.samples < built.needs.samples:
    raise UserError(
      f'config.rollout.samples is {config.rollout.samples}; '
      f'{spec["name"]} needs at least {built.needs.samples} per prompt'
    )
  if config.rollout.temperature == 0:
    raise UserError(
      'config.rollout.temperature is 0: greedy responses have no policy '
      'gradient\nset a temperature above 0 (config.evaluation may use 0)'
    )
  with _reported(spec):
    rollout = config.rollout
    shapes = estimators.rollout_shapes(
      built.needs, rollout.prompts, rollout.samples, rollout.max_tokens
    )
    jax.eval_shape(built.prepare, shapes)
  return built


def named_estimator(spec) -> estimators.Estimator:
  """Builds the estimator of a `config.algorithm` without checks."""
  with _reported(spec):
    return naming.call(ALGORITHMS, spec, 'config.algorithm', PARTS)


def reference(config) -> estimators.Estimator:
  """Builds the named estimator of `estimators.supervised_preference`."""
  spec = config.algorithm.to_dict()
  with _reported(spec):
    return naming.call(supervised_preference, spec, 'config.algorithm')


@contextlib.contextmanager
def _reported(spec) -> Iterator[None]:
  """Turns errors of a recipe into the user's."""
  try:
    yield
  except UserError:
    raise
  except (ArithmeticError, TypeError, ValueError) as error:
    reason = ' '.join(str(error).split())[:300]
    message = f'config.algorithm: {spec["name"]}: {reason}'
    raise UserError(message) from error


def token_metrics(config) -> dict[str, diagnostics.Diagnostic]:
  """Returns per-token diagnostics with the algorithm's clip range."""
  spec = config.algorithm.to_dict()
  argument = functools.partial(naming.argument, ALGORITHMS, spec)
  return diagnostics.per_token(
    argument('clip'), argument('clip_high'), argument('ratio')
  )


def init_state(
  params, optimizer, estimator, critic=None
) -> training.TrainState:
  """Returns a state before the first update, for any phase of a run.

  Args:
    params: parameters of the policy.
    optimizer: optimiser of the trained parameters.
    estimator: estimator of the whole run.
    critic: parameters of the critic, in a phase that trains one.
  """
  trainable = {'policy': params} | (
    {} if critic is None else {'critic': critic}
  )
  running = estimators.start_running(estimator.needs)
  return training.init_state(trainable, optimizer, running)


def reward_parts(config) -> list[RewardPart]:
  """Builds the reward functions of `config.rewards` with their weights."""
  if not config.rewards:
    raise UserError('config.rewards is empty: name at least one reward')
  parts = []
  for name, spec in config.rewards.to_dict().items():
    field = f'config.rewards.{name}'
    if not isinstance(spec, dict):
      raise UserError(f'{field} is {spec!r}\nwrite dict(name={spec!r})')
    parts.append(_reward_part(name, dict(spec), field))
  return parts


def code_files(config) -> list[str]:
  """Returns the user's files whose functions the configuration names.

  Unreadable files are omitted: loading them later reports the field.
  """
  files = [naming.file_of(name) for name in code_names(config).values()]
  return [
    file
    for file in dict.fromkeys(files)
    if file and os.path.isfile(file) and os.access(file, os.R_OK)
  ]


def code_names(config, sections: Sequence[str] = CODE) -> dict[str, str]:
  """Returns field → 'file.py:function' or 'module:function' of sections."""
  return {
    field: name
    for section in sections
    for field, name in _names(config[section], f'config.{section}')
    if ':' in name
  }


def _names(spec, field: str) -> Iterator[tuple[str, str]]:
  """Yields the functions that a specification and its arguments name."""
  if not isinstance(spec, ConfigDict):
    return
  for key, value in spec.items():
    if key == 'name' and isinstance(value, str):
      yield f'{field}.name', value
    yield from _names(value, f'{field}.{key}')


def optimizer(config, total_updates: int):
  """Builds AdamW and its schedule from an `optimizer` section.

  The schedule is jitted, so that it compiles to one program.
  """
  arguments = config.to_dict()
  schedule = training.schedule(
    arguments.pop('learning_rate'),
    total_updates,
    arguments.pop('warmup_updates'),
    arguments.pop('decay'),
  )
  return training.adamw(schedule, **arguments), jax.jit(schedule)


def micro_prompts(config) -> int:
  """Returns the number of prompts, with all responses, per micro-batch."""
  settings = config.training
  minibatch = config.rollout.prompts // settings.minibatches
  return settings.micro_prompts or minibatch


def _reward_part(name: str, spec: dict, field: str) -> RewardPart:
  weight = spec.pop('weight', 1.0)
  if isinstance(weight, bool) or not isinstance(weight, int | float):
    raise UserError(f'{field}.weight is {weight!r}, not a number')
  if not isinstance(spec.get('name'), str):
    raise UserError(
      f"{field} has no 'name'\n"
      "set it to a function of jaxrl_llm.rewards, or 'file.py:function'"
    )
  chosen = spec.pop('name')
  if 'workers' in spec:
    limits = {key: spec.pop(key) for key in _LIMITS if key in spec}
    return RewardPart(
      name, Workers(chosen, spec, field=field, **limits), weight
    )
  return RewardPart(name, calling.load_reward(chosen, spec, field), weight)


def model_settings(config) -> dict[str, Any]:
  """Returns the fields of `ModelConfig` that select how a model computes."""
  return {
    'dtype': config.dtype,
    'remat': config.remat,
    'unroll': config.unroll,
    'attention': config.attention,
  }


def _architecture(fields, vocab_size: int, settings: dict) -> ModelConfig:
  known = [
    name
    for name in inspect.signature(ModelConfig).parameters
    if name not in ('vocab_size', *settings)
  ]
  for name in set(fields) - set(known):
    raise UserError(
      f'config.model.architecture has no field {name!r}\n'
      f'it takes {", ".join(known)}'
    )
  # A configuration read from JSON has lists in place of tuples.
  values = {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in fields.to_dict().items()
  }
  try:
    return ModelConfig(vocab_size=vocab_size, **values, **settings)
  except TypeError as error:
    raise UserError(f'config.model.architecture: {error}') from error
