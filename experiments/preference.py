"""DPO, DPO-Positive and IPO, on pairs that are given or sampled.

    python -m experiments.preference \\
      --config=experiments/configs/arithmetic_dpop.py

With `config.rounds.sampling` at 0 the task's rows bring the pairs, in the
columns prompt, chosen and rejected, and every step is an update on `batch` of
them; the reference is the model that the run begins with.  An end token follows
each response, unless chosen_finished or rejected_finished says false: it was
cut off.  Otherwise a run goes in rounds: `sampling` steps sample and score
responses as `experiments.train` does; of every prompt the best response is
paired with the worst, the second best with the second worst, and so on while
their rewards differ, at most `per_prompt` pairs; and `learning` updates follow.
The reference of a round is the policy that sampled it.  What the reference says
is computed once, when pairs are made: its parameters are not kept in memory.

Everything else is as in `experiments.train`: --workdir, --resume, evaluation.
"""

import functools

import numpy as np

from experiments import build, cli, offline, offline_checks, run
from experiments.schedule import Script
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import stored
from jaxrl_llm.tasks import pairs as pairs_lib
from jaxrl_llm.tasks import prompts as prompts_lib


def given(config, model, data) -> offline.Given:
  """The pairs of a task's training rows, after the length policy of prompts.

  Raises:
    UserError: a row has no pair, or one of equal responses, or none is within
      budget.
  """
  encoded = build.encode(config, data.train, model.tokenizer)
  sides = [
    _encode_side(config, encoded.rows, model, column)
    for column in ('chosen', 'rejected')
  ]
  pairs = list(zip(*sides, strict=True))
  equal = [i for i, pair in enumerate(pairs) if np.array_equal(*pair)]
  if equal:
    raise UserError(
      f'{len(equal)} of {len(pairs)} pairs have equal responses; the first is '
      f'of the prompt {encoded.rows[equal[0]]["prompt"]!r:.60}\nremove them'
    )
  budget = config.rollout.max_tokens
  kept = [i for i, pair in enumerate(pairs) if max(map(len, pair)) <= budget]
  longest = max(len(ids) for pair in pairs for ids in pair)
  long = len(pairs) - len(kept)
  if long and (config.prompts.overlong == 'error' or not kept):
    raise UserError(
      f'{long} of {len(pairs)} pairs have a response of more than '
      f'config.rollout.max_tokens, {budget}; the longest has {longest}\n'
      "raise it, or leave them out with config.prompts.overlong='drop'"
    )
  pool = stored.given(
    range(len(kept)),
    [pairs[i] for i in kept],
    [[1.0, 0.0]] * len(kept),
    encoded.pad_id,
  )
  encoded = prompts_lib.take(encoded, kept)
  note = f'{len(kept):,} pairs; left out as over budget: {encoded.dropped:,} '
  note += f'with their prompt, {long:,} with a response'
  return offline.Given(encoded, pool, (note,))


def _encode_side(config, rows, model, column: str) -> list:
  """Ids of the responses in a column; those that were cut off have no end."""
  ended = pairs_lib.finished(rows, column)
  sides = build.encode_targets(config, rows, model, column, limited=False)
  return [
    ids if end else ids[:-1] for ids, end in zip(sides, ended, strict=True)
  ]


METHOD = offline.Method(
  given, lambda valid, rewards: stored.ranked_pairs(rewards, valid)
)
SCRIPT = Script(
  functools.partial(offline_checks.check, names=('dpo', 'dpop', 'ipo')),
  functools.partial(offline.Offline, method=METHOD),
)


if __name__ == '__main__':
  run.define_flags()
  cli.run(lambda: run.main(SCRIPT))
