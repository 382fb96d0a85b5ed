"""Labels prompts by sampling a model: preference pairs or pass rates.

    python -m experiments.label --what=pairs --workdir=runs/mine \\
      --split=train --samples=4 --output=pairs.jsonl
    python -m experiments.label --what=pass_rates --workdir=runs/quickstart \\
      --samples=8 --output=rates.jsonl

The model is a run's (--workdir) or a Hugging Face folder (--model=FOLDER
--config=FILE.py).  Its responses are sampled as in training, unless flags
change that, and scored by `config.rewards`.

pairs: the weighted sum of the rewards is the gold score.  For each prompt the
best response is paired with the worst, the second best with the second worst,
and so on while their scores differ.  The response with the higher score is
preferred; with --noise above 0 the preference is drawn (Bradley and Terry,
https://doi.org/10.2307/2334029, 1952):

  P(first preferred) = σ((g₁ − g₂) / noise),   g the gold scores

  {"prompt": …, "chosen": …, "rejected": …, "chosen_score": 0.8,
   "rejected_score": -0.3, "chosen_finished": true, "rejected_finished": false}

`experiments.reward_model` and `experiments.preference` read the file through
the task jsonl.  They put no end token after a response that did not finish: it
was cut off at `config.rollout.max_tokens`.  Of several responses with the same
tokens only the first may enter a pair.

pass_rates: the share of each training prompt's responses whose --metric is at
least --threshold; null for a prompt over budget or without scores.

  {"prompt": …, "pass_rate": 0.625, "samples": 8}

The first line records the settings.  Until it is complete the file is called
OUTPUT.partial; the same command continues it, with the same result as without
an interruption.  --config.prompts.pass_rates=rates.jsonl, min_pass_rate and
max_pass_rate then let a training keep prompts of medium difficulty.

A reward or task that a run's configuration names as file.py:function or
module:function is executed with --trust_code alone: read it first.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import build, cli, evaluate
from jaxrl_llm import evaluation
from jaxrl_llm.atomic import as_json, write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import stored
from jaxrl_llm.runs import digests
from jaxrl_llm.runs.metrics import RecordFile
from jaxrl_llm.tasks import pairs, sources

SPLITS = ('train', 'held_out')
_MADE = (
  '{pairs:,} pairs of {prompts:,} prompts; of their responses {unfinished:,} '
  'were cut off, and {flipped:,} pairs prefer the lower score\n'
  'left out: {over_budget:,} prompts over budget, {unscored:,} responses '
  'without a score, {repeated:,} repeated, {tied:,} pairs with equal scores'
)
# Flags that only one of the two reads.
_READS = {
  'pairs': ('split', 'prompts', 'per_prompt', 'noise', 'seed'),
  'pass_rates': ('metric', 'threshold'),
}


def make_pairs(
  config,
  model: build.Model,
  split: str = 'train',
  *,
  samples: int = 4,
  per_prompt: int = 1,
  noise: float = 0.0,
  seed: int | None = None,
  **sampling: Any,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """Samples, scores and pairs responses.

  Args:
    config: task, prompts, rewards and response length.
    model: the model.
    split: one of `SPLITS`.
    samples: responses per prompt, at least 2.
    per_prompt: the most pairs of one prompt.
    noise: in units of the gold score; 0 for none.
    seed: for responses and noise; None for the configuration's.
    **sampling: temperature, prompts or batch, in place of the defaults.

  Returns:
    (rows, counts): a row per pair, in the order of the prompts, and the numbers
    that the script prints.

  Raises:
    UserError: the settings allow no pairs, or no pair was found.
  """
  if samples < 2:
    raise UserError(f'--samples is {samples}\na pair needs at least 2')
  if not 0 <= noise < np.inf:
    raise UserError(f'--noise is {noise}\nit must be 0, for none, or above')
  seeds = config.seed if seed is None else seed, SPLITS.index(split)
  rows = getattr(build.task(config, model.tokenizer), split)
  sampling |= {'samples': samples}
  held = _held_out(config, model, rows, (seeds[0], 8, seeds[1]), **sampling)
  answers = evaluation.answer(held, model.params)
  evaluate.print_failures(answers, 'responses')
  rows, counts = _paired(config, held, answers, per_prompt, noise, seeds)
  if not rows:
    raise UserError(
      f'no prompt of the split {split} has two responses that differ, and in '
      f'their scores\nraise --samples, now {samples}, or use more prompts'
    )
  return rows, counts


def _held_out(config, model, rows, seeds: Sequence[int], **changes: Any):
  """Returns a held-out set, sampled as in training but for `changes`."""
  defaults = {'temperature': config.rollout.temperature, 'prompts': 0}
  return evaluate.build_held_out(
    config, model, rows, seeds, **defaults | changes
  )


def _paired(
  config, held, answers: evaluation.Answers, per_prompt, noise, seeds
) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """Pairs scored responses; the arguments and the result are `make_pairs`'."""
  scored = ~np.isnan(answers.rewards)
  repeated = _repeated(config, held, answers, scored)
  usable = scored & ~repeated
  ranked = stored.ranked_pairs(answers.rewards, usable)
  # The number of a prompt's first pair; its pairs are adjacent.
  first = np.searchsorted(ranked[:, 0], ranked[:, 0])
  ranked = ranked[np.arange(len(ranked)) - first < per_prompt]
  chosen = noisy_pairs(ranked, answers.rewards, noise, seeds)
  possible = np.minimum(usable.sum(axis=1) // 2, per_prompt).sum()
  counts = {
    'pairs': len(chosen),
    'prompts': len(held.encoded.rows),
    'over_budget': held.encoded.dropped,
    'unscored': (~scored).sum(),
    'repeated': repeated.sum(),
    'tied': possible - len(chosen),
    'flipped': (chosen != ranked).any(axis=1).sum(),
    'unfinished': (~answers.finished[chosen[:, :1], chosen[:, 1:]]).sum(),
  }
  rows = [_row(held.encoded.rows[p], answers, p, *two) for p, *two in chosen]
  return rows, {name: int(count) for name, count in counts.items()}


def _repeated(
  config,
  held: evaluation.HeldOut,
  answers: evaluation.Answers,
  scored: np.ndarray,
) -> np.ndarray:
  """Marks [P, G] responses with the tokens of an earlier scored sibling."""
  texts = pairs.encode_responses(
    [r['prompt'] for r in held.encoded.rows for _ in range(scored.shape[1])],
    answers.completions,
    [True] * scored.size,
    held.setting.tokenizer,
    **build.around_prompts(config),
  )
  repeated, seen = np.zeros(scored.shape, bool), set()
  for i in np.flatnonzero(scored):
    read = i // scored.shape[1], *texts[i]
    repeated.flat[i] = read in seen
    seen.add(read)
  return repeated


def noisy_pairs(
  pairs: np.ndarray, rewards: np.ndarray, noise: float, seed: Sequence[int]
) -> np.ndarray:
  """Draws the preferred response of each pair; see the head of this file.

  Args:
    pairs: [N, 3] int, as from `ranked_pairs`.
    rewards: [P, G].
    noise: in the rewards' units; 0 always prefers the higher one.
    seed: for the draws.

  Returns:
    [N, 3] int: prompt, preferred and rejected response, in the same order.
  """
  prompts, first, second = pairs.T
  margins = rewards[prompts, first] - rewards[prompts, second]
  # σ(x) = (1 + tanh(x / 2)) / 2
  chance = np.tanh(margins / noise / 2) / 2 + 0.5 if noise else margins >= 0
  swapped = np.random.default_rng(seed).random(len(pairs)) >= chance
  return np.where(swapped[:, None], pairs[:, [0, 2, 1]], pairs)


def _row(row: dict, answers: evaluation.Answers, prompt: int, *pair) -> dict:
  """Returns a pair's output line."""
  for name, sample in zip(('chosen', 'rejected'), pair, strict=True):
    i = prompt * answers.rewards.shape[1] + sample
    row = row | {
      name: answers.completions[i],
      f'{name}_score': float(answers.rewards.flat[i]),
      f'{name}_finished': bool(answers.finished.flat[i]),
    }
  return row


def measure_pass_rates(
  config,
  model: build.Model,
  output: str,
  *,
  title: str = '',
  samples: int = 8,
  metric: str | None = None,
  threshold: float = 1.0,
  **sampling: Any,
) -> list[dict[str, Any]]:
  """Writes and returns the pass rate of every training prompt.

  Args:
    config, model, samples, **sampling: as for `make_pairs`.
    output: the file to write; OUTPUT.partial is continued.
    title: the model's name in the file's first line.
    metric: name in `config.rewards`; None for that of greatest weight.
    threshold: the least score of a right response.

  Raises:
    UserError: the settings conflict, or the partial file has others.
  """
  rows = build.task(config, model.tokenizer).train
  sampling |= {'samples': samples}
  held = _held_out(config, model, rows, (config.seed, 7), **sampling)
  metric = evaluate.choose_metric(held.setting.rewards, metric)
  weights = digests.describe(digests.named_leaves(model.params))
  source = sources.PromptSource(held.encoded, held.batch, config.seed)
  settings = {
    'samples': samples,
    'decoding': str(held.setting.generation.decoding),
    'max_tokens': held.setting.generation.max_tokens,
    'rewards': config.rewards.to_dict(),
    'prompts': source.fingerprint(),
    'parameters': hashlib.sha256(json.dumps(weights).encode()).hexdigest(),
    'model': title,
    'metric': metric,
    'threshold': threshold,
  }
  partial = pathlib.Path(f'{output}.partial')
  prompts = [row['prompt'] for row in held.encoded.rows]
  records = _begin(partial, settings, prompts, held.batch)
  kept = {id(row) for row in held.encoded.rows}
  over_budget = [row['prompt'] for row in rows if id(row) not in kept]
  unscored = over_budget, np.zeros((len(over_budget), 0))
  scored = _scores(held, model.params, metric, len(records))
  with contextlib.closing(RecordFile(partial)) as file:
    for batch in itertools.chain(scored, [unscored]):
      for prompt, scores in zip(*batch, strict=True):
        records.append(_record(prompt, scores, threshold))
        file.write(records[-1])
      file.sync()
  os.replace(partial, output)
  return records


def _scores(
  held: evaluation.HeldOut, params, metric: str, first: int
) -> Iterator[tuple[list[str], np.ndarray]]:
  """Yields prompts and scores [P, G], batch after batch from `first` on."""
  encoded = held.encoded
  for start in range(first, len(encoded.rows), held.batch):
    rows = slice(start, start + held.batch)
    part = encoded._replace(
      tokens=encoded.tokens[rows], rows=encoded.rows[rows]
    )
    # The key depends on the position, not on where a measurement was resumed.
    key = jax.random.fold_in(held.key, start)
    answers = evaluation.answer(held._replace(encoded=part, key=key), params)
    yield [row['prompt'] for row in part.rows], answers.parts[metric]


def _record(prompt: str, scores: np.ndarray, threshold: float) -> dict:
  """Returns a prompt's output line; a missing score is NaN."""
  known = scores[~np.isnan(scores)]
  rate = float((known >= threshold).mean()) if known.size else None
  return {'prompt': prompt, 'pass_rate': rate, 'samples': known.size}


def _begin(
  path: pathlib.Path, settings: dict, prompts: Sequence[str], batch: int
) -> list[dict]:
  """Readies the partial file; returns the records of its complete batches.

  Raises:
    UserError: it has other settings, is damaged, or cannot be written.
  """
  header = json.dumps({'settings': settings}).encode() + b'\n'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    if lines and lines[-1][-1:] != b'\n':
      lines.pop()
    if lines and lines[0] != header:
      raise UserError(
        f'{path} was begun with another model or other settings\n'
        'repeat its command to go on with it, or remove it'
      )
    count = min(len(lines) - 1, len(prompts)) // batch * batch
    whole = lines[1 : count + 1]
    records = [json.loads(line) for line in whole]
    if [record['prompt'] for record in records] != prompts[: len(records)]:
      raise KeyError('prompt')
    write_atomically(path, header + b''.join(whole))
  except OSError as error:
    raise cli.cannot_write(path, error) from error
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged\nremove it to start afresh') from error
  return records


def summarize_pass_rates(records: Sequence[dict[str, Any]]) -> str:
  """Returns a line of numbers for the screen."""
  rates = [r['pass_rate'] for r in records if r['pass_rate'] is not None]
  never, always = rates.count(0), rates.count(1)
  mean = np.mean(rates) if rates else np.nan
  return (
    f'{len(records):,} prompts: never right {never:,}, sometimes '
    f'{len(rates) - never - always:,}, always {always:,}, without a rate '
    f'{len(records) - len(rates):,}; mean rate {mean:.4f}'
  )


def main() -> None:
  """Labels what the flags name."""
  values = flags.FLAGS
  what = values.what
  cli.require(what='pairs', output=f'{what or "pairs"}.jsonl')
  (other,) = _READS.keys() - {what}
  for name in _READS[other]:
    if values[name].present:
      raise UserError(f'--{name} is given, which only --what={other} reads')
  output = values.output
  if what == 'pairs' and not output.endswith('.jsonl'):
    raise UserError(
      f'--output is {output!r}\nname a file, such as --output=pairs.jsonl'
    )
  if pathlib.Path(output).exists():
    raise UserError(f'--output {output} exists\nremove it, or name another')
  config, model, title = evaluate.subject()
  settings = cli.given('samples', 'temperature', 'batch', *_READS[what])
  if what == 'pass_rates':
    records = measure_pass_rates(config, model, output, title=title, **settings)
    print(summarize_pass_rates(records))
    return
  rows, counts = make_pairs(config, model, **settings)
  lines = [json.dumps(as_json(row, f'row {i}')) for i, row in enumerate(rows)]
  cli.write_output(output, '\n'.join(lines) + '\n')
  print(f'{title}: {_MADE.format(**counts)}')


def define_flags() -> None:
  """Defines the flags of this script."""
  flags.DEFINE_enum('what', None, list(_READS), 'Labels to make.')
  evaluate.define_subject_flags()
  flags.DEFINE_integer('samples', None, 'Per prompt; 4 for pairs, else 8.', 1)
  flags.DEFINE_string('output', None, 'File of JSON lines to write.')
  flags.DEFINE_enum('split', 'train', SPLITS, 'Pairs: split of the task.')
  flags.DEFINE_integer('prompts', 0, 'Pairs: first N prompts; 0 for all.', 0)
  flags.DEFINE_integer('per_prompt', 1, 'Pairs: the most of one prompt.', 1)
  flags.DEFINE_float('noise', 0.0, 'Pairs: noise, in score units.', 0.0)
  flags.DEFINE_integer('seed', None, "Pairs: None for the configuration's.", 0)
  evaluate.define_metric_flags()


if __name__ == '__main__':
  define_flags()
  cli.run(main)
