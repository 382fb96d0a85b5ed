"""Online reinforcement learning of a language model.

    python -m experiments.train --config=experiments/configs/quickstart.py

A run writes everything into one folder, `--workdir` (default: runs/ and the
configuration's name), and `--resume` continues it, bit for bit:

    python -m experiments.train --workdir=runs/quickstart --resume

Without --config, a run continues with its own config.json; functions named in
it as file.py:function or module:function run only with --trust_code.
"""

from experiments import checks, cli, run
from experiments.online import Online
from experiments.schedule import Script

SCRIPT = Script(checks.check, Online)


def train(config, workdir, resume: bool = False) -> int:
  """Trains in a folder; see `run.train`."""
  return run.train(SCRIPT, config, workdir, resume)


if __name__ == '__main__':
  run.define_flags()
  cli.run(lambda: run.main(SCRIPT))
