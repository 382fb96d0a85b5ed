"""RestEM: sample, keep what is right, train the initial model on it, repeat.

    python -m experiments.rest_em \\
      --config=experiments/configs/arithmetic_rest_em.py

A round is `config.rounds.sampling` steps that sample and score responses as
`experiments.train` does, and `learning` updates on those whose reward is above
the algorithm's threshold, at most `per_prompt` of one prompt.  The updates
begin with the model that the first round began with; the policy that samples is
that of the round before.  `config.steps` counts steps of both kinds.

Everything else is as in `experiments.train`: --workdir, --resume, evaluation.

Singh et al., `Beyond Human Data <https://arxiv.org/abs/2312.06585>`_, 2023
"""

import functools

from experiments import cli, offline, offline_checks, run
from experiments.schedule import Script
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import stored


def given(config, model, data) -> offline.Given:
  """RestEM has no data but its samples."""
  del config, model, data
  raise UserError('config.rounds.sampling is 0: RestEM learns from its samples')


METHOD = offline.Method(
  given, lambda valid, rewards: stored.singles(valid), restarts=True
)
SCRIPT = Script(
  functools.partial(offline_checks.check, names=('rest_em',), sampled=True),
  functools.partial(offline.Offline, method=METHOD),
)


if __name__ == '__main__':
  run.define_flags()
  cli.run(lambda: run.main(SCRIPT))
