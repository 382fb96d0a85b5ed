"""Pairs of a model's responses, of which a known reward prefers one.

    python -m experiments.make_pairs --workdir=runs/mine \\
      --split=train --samples=4 --output=pairs.jsonl
    python -m experiments.make_pairs --model=FOLDER --config=FILE.py \\
      --split=held_out --prompts=256 --noise=0.5 --output=held_out.jsonl

A model's responses to the prompts of one split of the task are scored by
`config.rewards`, whose weighted sum is the gold score.  Of every prompt the
best response is paired with the worst, the second best with the second worst,
and so on while their scores differ, at most --per_prompt pairs.  With --noise
above 0 the one preferred is drawn as Bradley and Terry have it,

  P(first preferred) = σ((g₁ − g₂) / noise),

with g the gold scores; at 0 it is the one with the higher score.

One line of the output is the prompt's row with more columns:

  {"prompt": …, "chosen": …, "rejected": …, "chosen_score": 0.8,
   "rejected_score": -0.3, "chosen_finished": true, "rejected_finished": false}

`experiments.reward_model` and `experiments.preference` read it as a task of the
name jsonl.  A response that has not finished was cut off at
`config.rollout.max_tokens`; they put no end token behind it.  Of a prompt's
responses with the same tokens only the first may be in a pair.

A reward or task that a run's configuration names as file.py:function or
module:function is executed with --trust_code alone: read it first.
"""

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments import build, cli, evaluate, validation
from experiments.validation import failure_messages
from jaxrl_llm.atomic import as_json, write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import stored
from jaxrl_llm.tasks import pairs

SPLITS = ('train', 'held_out')


class Made(NamedTuple):
  """Pairs, and what was left out of them.

  Attributes:
    rows: one per pair, of the prompts in their order.
    prompts: that were sampled from.
    over_budget: prompts that were not.
    unscored: responses without a score.
    repeated: responses with the tokens of an earlier one to the same prompt.
    tied: pairs whose scores are equal.
    flipped: pairs of which the one with the lower score was preferred.
    unfinished: responses in pairs that were cut off.
  """

  rows: list[dict[str, Any]]
  prompts: int
  over_budget: int
  unscored: int
  repeated: int
  tied: int
  flipped: int
  unfinished: int


def noisy_pairs(
  pairs: np.ndarray, rewards: np.ndarray, noise: float, seed: Sequence[int]
) -> np.ndarray:
  """Pairs of which one is preferred at random, as Bradley and Terry have it.

    P(first preferred) = σ((r₁ − r₂) / noise)

  Args:
    pairs: [N, 3] int, as `ranked_pairs` gives them.
    rewards: [P, G].
    noise: in the rewards' units; 0 prefers the higher one, for sure.
    seed: of the draws.

  Returns:
    [N, 3] int: prompt, preferred and rejected response, in the same order.

  References:
    Bradley and Terry, `Rank Analysis of Incomplete Block Designs
    <https://doi.org/10.2307/2334029>`_, 1952
  """
  prompts, first, second = pairs.T
  margins = rewards[prompts, first] - rewards[prompts, second]
  if noise > 0:
    from scipy import special  # slow to import

    draws = np.random.default_rng(seed).random(len(pairs))
    swapped = draws >= special.expit(margins / noise)
  else:
    swapped = margins < 0
  return np.where(swapped[:, None], pairs[:, [0, 2, 1]], pairs)


def make(
  config,
  model: build.Model,
  split: str,
  *,
  samples: int = 4,
  prompts: int = 0,
  per_prompt: int = 1,
  noise: float = 0.0,
  seed: int | None = None,
  temperature: float | None = None,
  batch: int | None = None,
  tell: Callable[[str], Any] = print,
) -> Made:
  """Samples, scores and pairs responses.

  Args:
    config: task, prompts, rewards and response length.
    model: the model.
    split: of `SPLITS`.
    samples: responses per prompt, at least 2.
    prompts: the first so many of the split; 0 for all.
    per_prompt: pairs of a prompt, at most.
    noise: τ, in units of the gold score; 0 for none.
    seed: of responses and noise; None for the configuration's.
    temperature: None for that of training.
    batch: prompts at one time; None for that of evaluation.
    tell: gets a line for each kind of failure of rewards in worker processes.

  Raises:
    UserError: settings that make no sense, or no pair was found.
  """
  if temperature is None:
    temperature = config.rollout.temperature
  _check(samples, noise, temperature)
  index = SPLITS.index(split)
  seed = config.seed if seed is None else seed
  rows = getattr(build.task(config, model.tokenizer), split)
  held = validation.build_held_out(
    config,
    model,
    rows,
    build.reward_parts(config),
    jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 8), index),
    samples=samples,
    temperature=temperature,
    prompts=prompts,
    batch=batch or config.evaluation.batch,
  )
  answers = validation.answer(held, model.params, step=0)
  for line in failure_messages(answers.failures, 'of the responses', set()):
    tell(line.removeprefix('eval/'))
  made = _paired(config, held, answers, per_prompt, noise, (seed, index))
  if not made.rows:
    raise UserError(
      f'no prompt of the split {split} has two responses that differ, and in '
      f'their scores\nsample more with --samples, now {samples}, or of more '
      'prompts'
    )
  return made


def _paired(
  config,
  held: validation.HeldOut,
  answers: validation.Answers,
  per_prompt: int,
  noise: float,
  seed: tuple[int, int],
) -> Made:
  """The pairs of scored responses, and what was left out."""
  scored = ~np.isnan(answers.rewards)
  repeated = _repeated(config, held.model, answers, scored)
  usable = scored & ~repeated
  ranked = stored.ranked_pairs(answers.rewards, usable)
  # The first of every prompt, whose pairs stand together.
  before = np.searchsorted(ranked[:, 0], ranked[:, 0])
  ranked = ranked[np.arange(len(ranked)) - before < per_prompt]
  chosen = noisy_pairs(ranked, answers.rewards, noise, seed)
  possible = np.minimum(usable.sum(axis=1) // 2, per_prompt).sum()
  members = chosen[:, :1], chosen[:, 1:]
  return Made(
    rows=[_row(held.encoded.rows[p], answers, p, *two) for p, *two in chosen],
    prompts=len(held.encoded.rows),
    over_budget=held.encoded.dropped,
    unscored=int((~scored).sum()),
    repeated=int(repeated.sum()),
    tied=int(possible) - len(chosen),
    flipped=int((chosen != ranked).any(axis=1).sum()),
    unfinished=int((~answers.finished[members]).sum()),
  )


def _check(samples: int, noise: float, temperature: float) -> None:
  """Raises UserError for settings without pairs."""
  if temperature == 0:
    raise UserError(
      f'at temperature 0 all {samples} samples of a prompt are equal\n'
      'set --temperature above 0'
    )
  if not 0 <= noise < math.inf:
    raise UserError(
      f'--noise is {noise}\nit must be a number, 0 for none or above'
    )


def _repeated(
  config, model: build.Model, answers: validation.Answers, scored: np.ndarray
) -> np.ndarray:
  """[P, n] whether an earlier scored response to the prompt reads the same."""
  samples = answers.samples
  texts = pairs.encode_responses(
    [sample.prompt for sample in samples],
    [sample.response for sample in samples],
    [True] * len(samples),
    model.tokenizer,
    chat_template=config.prompts.chat_template or None,
    system_prompt=config.prompts.system_prompt or None,
    suffix=config.prompts.suffix,
  )
  repeated, seen = np.zeros(scored.shape, bool), set()
  for place in np.argwhere(scored).tolist():
    i = np.ravel_multi_index(place, scored.shape)
    read = place[0], *texts[i]
    repeated[tuple(place)] = read in seen
    seen.add(read)
  return repeated


def _row(
  row: dict,
  answers: validation.Answers,
  prompt: int,
  chosen: int,
  rejected: int,
) -> dict[str, Any]:
  """The line of a pair."""
  pair = {}
  for name, sample in (('chosen', chosen), ('rejected', rejected)):
    place = prompt, sample
    i = np.ravel_multi_index(place, answers.rewards.shape)
    pair[name] = answers.samples[i].response
    pair[f'{name}_score'] = float(answers.rewards[place])
    pair[f'{name}_finished'] = bool(answers.finished[place])
  return row | pair


def write(path: str, rows: list[dict[str, Any]]) -> None:
  """Writes rows as JSON lines; the file is the old one or the whole new one.

  Raises:
    UserError: a column has no form in JSON, or the file cannot be written.
  """
  lines = [json.dumps(as_json(row, f'row {i}')) for i, row in enumerate(rows)]
  try:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, '\n'.join(lines) + '\n')
  except OSError as error:
    raise UserError(
      f'--output {path} cannot be written: {error.strerror}'
    ) from error


def summary(made: Made) -> str:
  """What was made, and what was left out of it."""
  return (
    f'{len(made.rows):,} pairs of {made.prompts:,} prompts; of their responses '
    f'{made.unfinished:,} were cut off, and {made.flipped:,} pairs prefer the '
    'lower score\n'
    f'left out: {made.over_budget:,} prompts over budget, {made.unscored:,} '
    f'responses without a score, {made.repeated:,} repeated, {made.tied:,} '
    'pairs with equal scores'
  )


def main() -> None:
  """Makes the pairs that the flags name."""
  values = flags.FLAGS
  if values.output is None or not values.output.endswith('.jsonl'):
    raise UserError(
      f'--output is {values.output!r}\nname a file, such as '
      '--output=pairs.jsonl'
    )
  if pathlib.Path(values.output).exists():
    raise UserError(
      f'--output {values.output} exists\nremove it, or name another'
    )
  config, model, title = evaluate.subject()
  made = make(
    config,
    model,
    values.split,
    samples=values.samples,
    prompts=values.prompts,
    per_prompt=values.per_prompt,
    noise=values.noise,
    seed=values.seed,
    temperature=values.temperature,
    batch=values.batch,
  )
  write(values.output, made.rows)
  print(f'{title}: {summary(made)}')


if __name__ == '__main__':
  evaluate.define_subject_flags()
  flags.DEFINE_enum('split', 'train', SPLITS, 'Split of the task.')
  flags.DEFINE_integer('samples', 4, 'Responses per prompt, 2 or more.', 2)
  flags.DEFINE_integer('prompts', 0, 'First so many prompts; 0 for all.', 0)
  flags.DEFINE_integer('per_prompt', 1, 'Pairs of a prompt, at most.', 1)
  flags.DEFINE_float('noise', 0.0, 'Of the preferences, in score units.', 0.0)
  flags.DEFINE_integer('seed', None, "None for the configuration's.", 0)
  flags.DEFINE_string('output', None, 'File of JSON lines to write.')
  cli.run(main)
