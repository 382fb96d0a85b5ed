"""Supervised fine-tuning on the task's demonstrations.

    python -m experiments.sft --config=experiments/configs/arithmetic_sft.py

Each step is an update on `config.rounds.batch` worked solutions.  Held-out
evaluation, checkpoints, --workdir, --resume and the exported model are the same
as in `experiments.train`.
"""

import functools

from experiments import cli, offline, offline_checks, run
from experiments.schedule import Script
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import stored


def given(config, model, data) -> offline.Given:
  """Returns the task's worked solutions."""
  rows = data.demonstrations
  if not rows:
    raise UserError(
      'config.task has no demonstrations to learn from\n'
      'choose a task with worked solutions, or add a column solution'
    )
  encoded, pool = offline.demonstrations(config, model, rows)
  return offline.Given(encoded, pool, (f'{len(rows):,} demonstrations',))


METHOD = offline.Method(given, lambda valid, rewards: stored.singles(valid))
SCRIPT = Script(
  functools.partial(offline_checks.check, names=('sft',), sampled=False),
  functools.partial(offline.Offline, method=METHOD),
)


if __name__ == '__main__':
  run.define_flags()
  cli.run(lambda: run.main(SCRIPT))
