"""Supervised fine-tuning on the task's demonstrations.

    python -m experiments.sft --config=experiments/configs/arithmetic_sft.py

A step is an update on `config.rounds.batch` worked solutions.  Everything else,
held-out evaluation, checkpoints, --workdir, --resume and the exported model, is
as in `experiments.train`.
"""

import functools

from experiments import cli, offline, offline_checks, run, supervised
from experiments.phase import Script
from jaxrl_llm import pools
from jaxrl_llm.errors import UserError


def given(config, model, rows) -> offline.Given:
  """The worked solutions of a task's rows; others are left out and counted."""
  shown = [row for row in rows if row.get('solution') is not None]
  if not shown:
    raise UserError(
      'no training row of config.task has a solution to learn from\n'
      'name a task with worked solutions, or give the rows a column solution'
    )
  encoded, pool = supervised.demonstrations(config, model, shown)
  note = f'{len(pool.prompts):,} demonstrations'
  if len(shown) < len(rows):
    note += f'; {len(rows) - len(shown):,} rows without a solution left out'
  return offline.Given(encoded, pool, (note,))


METHOD = offline.Method(given, lambda valid, rewards: pools.singles(valid))
SCRIPT = Script(
  functools.partial(offline_checks.check, names=('sft',), sampled=False),
  functools.partial(offline.Offline, method=METHOD),
)


if __name__ == '__main__':
  run.define_flags()
  cli.run(lambda: run.main(SCRIPT))
