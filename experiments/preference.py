"""DPO, DPO-Positive and IPO on pairs from a data set or sampled pairs.

    python -m experiments.preference \\
      --config=experiments/configs/arithmetic_dpop.py

If `config.rounds.sampling` is 0, the pairs come from the task's columns prompt,
chosen and rejected, and every step is an update on `batch` pairs; the reference
is the initial model.  An end token is appended to each response unless
chosen_finished or rejected_finished is false, which marks a response that was
cut off.

Otherwise a run consists of rounds.  First, `sampling` steps sample and score
responses as in `experiments.train`.  For each prompt, the best response is
paired with the worst, the second best with the second worst, and so on while
their rewards differ, up to `per_prompt` pairs.  Then `learning` updates follow.
The reference of a round is the policy that sampled it.  Its log-probabilities
are computed once, with the pairs: its parameters are not kept in memory.

--workdir, --resume and evaluation are the same as in `experiments.train`.
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
  """Encodes the pairs of a task's training rows that are within budget.

  Raises:
    UserError: a row has no pair, the responses of a pair are equal, or no pair
      is within budget.
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
      f'{len(equal)} of {len(pairs)} pairs have equal responses; the first has '
      f'the prompt {encoded.rows[equal[0]]["prompt"]!r:.60}\nremove them'
    )
  budget = config.rollout.max_tokens
  kept = [i for i, pair in enumerate(pairs) if max(map(len, pair)) <= budget]
  longest = max(len(ids) for pair in pairs for ids in pair)
  long = len(pairs) - len(kept)
  if long and (config.prompts.overlong == 'error' or not kept):
    raise UserError(
      f'{long} of {len(pairs)} pairs have a response of more than '
      f'config.rollout.max_tokens, {budget}; the longest has {longest}\n'
      "raise it, or exclude them with config.prompts.overlong='drop'"
    )
  pool = stored.given(
    range(len(kept)),
    [pairs[i] for i in kept],
    [[1.0, 0.0]] * len(kept),
    encoded.pad_id,
  )
  encoded = prompts_lib.take(encoded, kept)
  note = f'{len(kept):,} pairs; excluded as over budget: '
  note += f'{encoded.dropped:,} by prompt, {long:,} by response'
  return offline.Given(encoded, pool, (note,))


def _encode_side(config, rows, model, column: str) -> list:
  """Encodes a column of responses; those cut off have no end token."""
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
