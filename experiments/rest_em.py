"""RestEM: sample, keep correct responses, train the initial model, repeat.

    python -m experiments.rest_em \\
      --config=experiments/configs/arithmetic_rest_em.py

A round consists of `config.rounds.sampling` steps that sample and score
responses as in `experiments.train`, and `learning` updates on responses whose
reward exceeds the algorithm's threshold, at most `per_prompt` per prompt.  The
updates of every round start from the initial model; the policy that samples is
the result of the previous round.  `config.steps` counts steps of both kinds.

--workdir, --resume and evaluation are the same as in `experiments.train`.

Singh et al., `Beyond Human Data <https://arxiv.org/abs/2312.06585>`_, 2023
"""

import functools

from experiments import cli, offline, offline_checks, run
from experiments.schedule import Script
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import stored


def given(config, model, data) -> offline.Given:
  """Raises UserError: RestEM learns only from its samples."""
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
