"""How much memory the compiled update of an algorithm takes, beside others'.

    python -m experiments.planning.memory \\
      --config=experiments/configs/quickstart.py --algorithms=grpo,trepo,ppo

The update is compiled for shapes alone, on the machine at hand: no parameter
exists and no data set is read, so that a model may be measured on a machine
that could not hold it.  Each algorithm takes the place of `config.algorithm`,
with its defaults; one that has no default for an argument is given it as
--algorithms=grpo,dr_grpo:max_length=14.

  peak = arguments + outputs + temporary − aliased   bytes

Arguments and outputs are parameters, optimiser state, prompts and batch; the
state is donated, so that outputs take the place of arguments: aliased.  It is
XLA's own account of one optimiser minibatch's update, with as many prompts and
responses as the configuration has: not of sampling, and not of what else the
process holds, such as a reference policy.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from experiments import build, checks, cli, critics, offline, online, supervised
from experiments.configs import base
from jaxrl_llm.errors import UserError
from jaxrl_llm.sampling import policy

_MIB = 2**20


class Memory(NamedTuple):
  """Bytes of one compiled update.

  Attributes:
    parameters: of all that is trained.
    optimizer: of the optimiser's state.
    batch: of prompts and batch.
    outputs, temporary, aliased: as XLA accounts for them.
    peak: arguments + outputs + temporary − aliased.
  """

  parameters: int
  optimizer: int
  batch: int
  outputs: int
  temporary: int
  aliased: int
  peak: int


def measure(config: ConfigDict) -> Memory:
  """Compiles the update of `experiments.train` and reads off what it takes.

  Args:
    config: of that script.

  Raises:
    UserError: the configuration is wrong, or the backend keeps no account.
  """
  model = build.outline(config.model)
  estimator = build.estimator(config)
  needs = estimator.needs
  critic = critics.critic(config, model) if needs.critic else None
  optimizer, _ = critics.optimizer(config, needs)
  state = critics.shapes(config, estimator, critic, optimizer, model.params)
  update = online.trainer(config, model).make_update(
    build.micro_prompts(config)
  )
  prompts = config.rollout.prompts // config.training.minibatches
  rollouts = build.abstract_rollouts(config, needs, prompts)
  batch = jax.eval_shape(estimator.prepare, rollouts)
  return account(config, update, state, batch)


def measure_offline(config: ConfigDict) -> Memory:
  """`measure` for a script that learns from responses that are there."""
  model = build.outline(config.model)
  estimator = build.reference(config)
  optimizer, _ = build.optimizer(config.optimizer, offline.updates(config))
  trainer = supervised.trainer(config, model, estimator, optimizer)
  update = trainer.make_update(supervised.batch(config))
  state = jax.eval_shape(
    lambda params: build.init_state(params, optimizer, estimator), model.params
  )
  group = config.copy_and_resolve_references()
  group.rollout.samples = estimator.needs.samples
  rollouts = build.abstract_rollouts(
    group, estimator.needs, config.rounds.batch
  )
  batch = jax.eval_shape(estimator.prepare, rollouts)
  return account(config, update, state, batch)


def account(config: ConfigDict, update, state, batch) -> Memory:
  """What the compiled update of a state and a batch, given as shapes, takes.

  Args:
    config: whose prompts may have so many tokens.
    update: of `training.make_update`.
    state: shapes of its state.
    batch: shapes of its batch.

  Raises:
    UserError: the backend keeps no account.
  """
  prompts = batch.tokens.shape[0]
  array = jax.ShapeDtypeStruct
  given = policy.Prompts(
    tokens=array((prompts, config.prompts.max_tokens), jnp.int32),
    lengths=array((prompts,), jnp.int32),
  )
  compiled = update.lower(state, None, given, batch).compile()
  told = compiled.memory_analysis()
  if told is None:
    raise UserError(
      f'the {jax.default_backend()} backend gives no account of memory'
    )
  arguments = told.argument_size_in_bytes
  rest = told.output_size_in_bytes + told.temp_size_in_bytes
  return Memory(
    parameters=_bytes(state.trainable),
    optimizer=_bytes(state.opt_state),
    batch=_bytes((given, batch)),
    outputs=told.output_size_in_bytes,
    temporary=told.temp_size_in_bytes,
    aliased=told.alias_size_in_bytes,
    peak=arguments + rest - told.alias_size_in_bytes,
  )


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def with_algorithm(config: ConfigDict, spec: dict[str, Any]) -> ConfigDict:
  """A copy of a configuration with another algorithm, checked."""
  changed = config.copy_and_resolve_references().unlock()
  changed.algorithm = ConfigDict(spec)
  if not build.named_estimator(changed.algorithm).needs.critic:
    changed.critic = base.get_config().critic
  changed.lock()
  checks.check(changed)
  return changed


def parse(text: str) -> dict[str, Any]:
  """'ppo:lam=0.9:kl=0.1' → dict(name='ppo', lam=0.9, kl=0.1).

  Raises:
    UserError: an argument is no `name=value` with a Python literal.
  """
  name, *arguments = re.split(r':(?=\w+=)', text)  # not in file.py:function
  spec = {'name': name}
  for argument in arguments:
    key, _, value = argument.partition('=')
    try:
      spec[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
      raise UserError(
        f'--algorithms: {argument!r} of {name}\nwrite {name}:{key}=NUMBER'
      ) from error
  return spec


def measure_all(
  config: ConfigDict, algorithms: Sequence[str]
) -> dict[str, Memory]:
  """`measure` of several algorithms, as the command line names them."""
  return {
    text: measure(with_algorithm(config, parse(text))) for text in algorithms
  }


def table(measured: dict[str, Memory]):
  """The numbers as a `rich` table, an algorithm per column."""
  from rich.table import Table

  shown = Table(title='MiB of one update', title_justify='left')
  shown.add_column('')
  for label in measured:
    shown.add_column(label, justify='right', overflow='fold')
  for name in Memory._fields:
    values = [getattr(memory, name) / _MIB for memory in measured.values()]
    shown.add_row(name, *(f'{value:,.2f}' for value in values))
  first = next(iter(measured.values())).peak
  ratios = [memory.peak / first for memory in measured.values()]
  shown.add_row(f'peak / {next(iter(measured))}', *(f'{r:.4f}' for r in ratios))
  return shown


def main() -> None:
  """Measures what the flags name."""
  from rich.console import Console

  jax.config.update('jax_numpy_rank_promotion', 'raise')
  algorithms = flags.FLAGS.algorithms
  if not algorithms:
    raise UserError('--algorithms is empty: name at least one')
  measured = measure_all(cli.config(), algorithms)
  Console().print(table(measured))


if __name__ == '__main__':
  flags.DEFINE_list(
    'algorithms', ['grpo', 'trepo', 'ppo'], 'Names, with NAME:argument=value.'
  )
  cli.define_config_flag()
  cli.run(main)
