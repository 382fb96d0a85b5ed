"""Memory that the compiled update of each algorithm takes.

    python -m experiments.planning.memory \\
      --config=experiments/configs/quickstart.py --algorithms=grpo,trepo,ppo

The update is compiled from shapes alone, on this machine: no parameter exists
and no data set is read, so a model may be larger than the machine.  Each
algorithm replaces `config.algorithm`, with its own defaults; arguments without
a default are set as in --algorithms=grpo,dr_grpo:max_length=14.

  peak = arguments + outputs + temporary − aliased   bytes

This is XLA's own account of an update on one optimiser minibatch.  Arguments
are parameters, optimizer state and batch (with its prompts); the state is
donated, so outputs take the place of arguments: aliased.  Neither sampling nor
anything else in the process, such as a reference policy, is included.
"""

import ast
import re
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import build, checks, cli, offline
from experiments.configs import base
from experiments.planning import programs, report
from jaxrl_llm import estimators
from jaxrl_llm.errors import UserError


class Memory(NamedTuple):
  """Bytes of one compiled update, as the module explains them."""

  parameters: int
  optimizer: int
  batch: int
  outputs: int
  temporary: int
  aliased: int
  peak: int


def measure(config: ConfigDict) -> Memory:
  """Compiles the update of `experiments.train` and returns its memory."""
  trainer, arguments = programs.step(config, build.outline(config.model))
  update = trainer.make_update(trainer.setting.micro_prompts)
  return _measure(update, *arguments)


def measure_offline(config: ConfigDict) -> Memory:
  """`measure` for a script that learns from stored responses."""
  model, count = build.outline(config.model), config.rounds.batch
  estimator = build.reference(config)
  optimizer, _ = build.optimizer(config.optimizer, offline.updates(config))
  trainer = offline.trainer(config, model, estimator, optimizer)
  needs = estimator.needs
  rollouts = estimators.rollout_shapes(
    needs, count, needs.samples, config.rollout.max_tokens
  )
  return _measure(
    trainer.make_update(offline.batch(config)),
    jax.eval_shape(trainer.init, model.params),
    None,
    programs.prompts(config, count),
    jax.eval_shape(estimator.prepare, rollouts),
  )


def _measure(update, state, frozen, *batch) -> Memory:
  sizes = [
    sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part))
    for part in (state.trainable, state.opt_state, batch)
  ]
  compiled = update.lower(state, frozen, *batch).compile()
  account = compiled.memory_analysis()
  outputs, temporary = account.output_size_in_bytes, account.temp_size_in_bytes
  aliased = account.alias_size_in_bytes
  peak = account.argument_size_in_bytes + outputs + temporary - aliased
  return Memory(*sizes, outputs, temporary, aliased, peak)


def with_algorithm(config: ConfigDict, spec: dict[str, Any]) -> ConfigDict:
  """Returns a copy of a configuration with another algorithm, checked."""
  changed = config.copy_and_resolve_references().unlock()
  changed.algorithm = ConfigDict(spec)
  if not build.named_estimator(changed.algorithm).needs.critic:
    changed.critic = base.get_config().critic
  changed.lock()
  checks.check(changed)
  return changed


def parse(text: str) -> dict[str, Any]:
  """'ppo:lam=0.9:kl=0.1' → dict(name='ppo', lam=0.9, kl=0.1)."""
  name, *arguments = re.split(r':(?=\w+=)', text)  # keeps file.py:function
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


def table(results: dict[str, Memory]) -> str:
  """A table with an algorithm per column."""
  rows = [['MiB of one update', *results]]
  for name, *sizes in zip(Memory._fields, *results.values(), strict=True):
    rows.append([name, *(f'{size / 2**20:,.2f}' for size in sizes)])
  first = next(iter(results))
  ratios = [memory.peak / results[first].peak for memory in results.values()]
  rows.append([f'peak / {first}', *(f'{ratio:.4f}' for ratio in ratios)])
  return report.markdown(rows)


def main() -> None:
  """Prints the memory of the algorithms that the flags name."""
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  algorithms = flags.FLAGS.algorithms
  if not algorithms:
    raise UserError('--algorithms is empty: name at least one')
  config, specs = cli.config(), map(parse, algorithms)
  results = [measure(with_algorithm(config, spec)) for spec in specs]
  print(table(dict(zip(algorithms, results, strict=True))))


if __name__ == '__main__':
  flags.DEFINE_list(
    'algorithms', ['grpo', 'trepo', 'ppo'], 'Names, with NAME:argument=value.'
  )
  cli.define_config_flag()
  cli.run(main)
