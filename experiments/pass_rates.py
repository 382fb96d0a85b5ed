"""How often a model's responses to each training prompt are right.

    python -m experiments.pass_rates --workdir=runs/quickstart \\
      --samples=8 --output=rates.jsonl
    python -m experiments.pass_rates --model=FOLDER --config=FILE.py \\
      --output=rates.jsonl

A training then keeps the prompts that are neither too easy nor too hard, and
may begin with the easy ones:

    python -m experiments.train --config=FILE.py \\
      --config.prompts.pass_rates=rates.jsonl \\
      --config.prompts.min_pass_rate=0.1 --config.prompts.max_pass_rate=0.9

One line of the output: {"prompt": …, "pass_rate": 0.625, "samples": 8}; the
rate is null for a prompt that is over budget or whose responses have no score.
The first line says how it was measured.  The prompts are those of the task,
before any filter; they are sampled as in training, unless flags say otherwise.

Until it is complete the file is called OUTPUT.partial.  The same command goes
on where that ends, and gives the same file as in one go.

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

from experiments import build, cli, evaluate, validation
from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import digests
from jaxrl_llm.runs.records import RecordFile
from jaxrl_llm.tasks import sources


def measure(
  config,
  model: build.Model,
  output: str,
  *,
  title: str = '',
  samples: int = 8,
  temperature: float | None = None,
  batch: int | None = None,
  metric: str | None = None,
  threshold: float = 1.0,
) -> list[dict[str, Any]]:
  """Writes the pass rate of every training prompt.

  The rate is the share of a prompt's responses, of those with a score, whose
  score is at least the threshold.

  Args:
    config: task, prompts, rewards, response length and seed.
    model: the model.
    output: the file to write, which must not be there yet.
    title: what the model is called, for the file's first line.
    samples: responses per prompt.
    temperature: None for that of training.
    batch: prompts at one time; None for that of evaluation.
    metric: name in `config.rewards`; None for that of greatest weight.
    threshold: the least score of a right response.

  Returns:
    The records.

  Raises:
    UserError: settings that do not fit each other, or a file that is of
      another measurement.
  """
  rewards = build.reward_parts(config)
  metric = evaluate.choose_metric(rewards, metric)
  if temperature is None:
    temperature = config.rollout.temperature
  if samples > 1 and temperature == 0:
    raise UserError(
      f'at temperature 0 all {samples} samples of a prompt are equal\n'
      'set --temperature above 0, or --samples=1'
    )
  if pathlib.Path(output).exists():
    raise UserError(f'--output {output} exists\nremove it, or name another')
  rows = build.task(config, model.tokenizer).train
  held = validation.build_held_out(
    config,
    model,
    rows,
    rewards,
    jax.random.fold_in(jax.random.key(config.seed), 7),
    samples=samples,
    temperature=temperature,
    prompts=0,
    batch=batch or config.evaluation.batch,
  )
  settings = _settings(config, held, model.params) | {
    'model': title,
    'metric': metric,
    'threshold': threshold,
  }
  partial = pathlib.Path(f'{output}.partial')
  prompts = [row['prompt'] for row in held.encoded.rows]
  records = _begin(partial, settings, prompts, held.batch)
  kept = {id(row) for row in held.encoded.rows}
  unread = [
    {'prompt': row['prompt'], 'pass_rate': None, 'samples': 0}
    for row in rows
    if id(row) not in kept
  ]
  with contextlib.closing(RecordFile(partial)) as file:
    rates = _rates(held, model.params, len(records), metric, threshold)
    for found in itertools.chain(rates, [unread]):
      for record in found:
        file.write(record)
      file.sync()
      records += found
  os.replace(partial, output)
  return records


def _settings(config, held: validation.HeldOut, params) -> dict[str, Any]:
  """What must be equal for two measurements to give the same numbers."""
  weights = digests.describe(digests.named_leaves(params))
  source = sources.PromptSource(held.encoded, held.batch, config.seed)
  return {
    'samples': held.generation.samples,
    'decoding': str(held.generation.decoding),
    'max_tokens': held.generation.max_tokens,
    'rewards': config.rewards.to_dict(),
    'prompts': source.fingerprint(),
    'parameters': hashlib.sha256(json.dumps(weights).encode()).hexdigest(),
  }


def _rates(
  held: validation.HeldOut, params, first: int, metric: str, threshold: float
) -> Iterator[list[dict[str, Any]]]:
  """Records of one batch of prompts after the other, from the first on."""
  encoded = held.encoded
  for start in range(first, len(encoded.rows), held.batch):
    rows = slice(start, start + held.batch)
    part = held._replace(
      encoded=encoded._replace(
        tokens=encoded.tokens[rows], rows=encoded.rows[rows]
      ),
      # Of the place, not of where the measurement began.
      key=jax.random.fold_in(held.key, start),
    )
    scores = validation.answer(part, params, step=0).parts[metric]
    yield [
      _record(row['prompt'], known, threshold)
      for row, known in zip(part.encoded.rows, scores, strict=True)
    ]


def _record(prompt: str, scores: np.ndarray, threshold: float) -> dict:
  """A prompt's line; scores are NaN where there is none."""
  known = scores[~np.isnan(scores)]
  rate = float((known >= threshold).mean()) if known.size else None
  return {'prompt': prompt, 'pass_rate': rate, 'samples': known.size}


def _begin(
  path: pathlib.Path, settings: dict, prompts: Sequence[str], batch: int
) -> list[dict]:
  """Readies the unfinished file; gives the records that it keeps.

  Whole batches are kept: what a kill left broken or incomplete is measured
  again.

  Raises:
    UserError: it is of other settings or other prompts, or cannot be written.
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
    whole = lines[1:][: len(prompts)]
    # The last batch may be smaller, and is whole with the last prompt.
    if len(whole) < len(prompts):
      whole = whole[: len(whole) // batch * batch]
    records = [json.loads(line) for line in whole]
    if [record['prompt'] for record in records] != prompts[: len(records)]:
      raise UserError(f'{path} is of other prompts\nremove it to start afresh')
    write_atomically(path, header + b''.join(whole))
  except OSError as error:
    raise UserError(
      f'--output {path} cannot be written: {error.strerror}'
    ) from error
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged\nremove it to start afresh') from error
  return records


def summary(records: Sequence[dict[str, Any]]) -> str:
  """How many prompts are always right, never, or in between."""
  rates = [r['pass_rate'] for r in records if r['pass_rate'] is not None]
  counts = (
    sum(rate == 0 for rate in rates),
    sum(0 < rate < 1 for rate in rates),
    sum(rate == 1 for rate in rates),
  )
  mean = np.mean(rates) if rates else np.nan
  return (
    f'{len(records):,} prompts: never right {counts[0]:,}, sometimes '
    f'{counts[1]:,}, always {counts[2]:,}, without a rate '
    f'{len(records) - len(rates):,}; mean rate {mean:.4f}'
  )


def main() -> None:
  """Measures what the flags name."""
  values = flags.FLAGS
  if values.output is None:
    raise UserError('--output is missing\nfor example --output=rates.jsonl')
  config, model, title = evaluate.subject()
  records = measure(
    config,
    model,
    values.output,
    title=title,
    samples=values.samples,
    temperature=values.temperature,
    batch=values.batch,
    metric=values.metric,
    threshold=values.threshold,
  )
  print(summary(records))


if __name__ == '__main__':
  evaluate.define_subject_flags()
  evaluate.define_metric_flags()
  flags.DEFINE_integer('samples', 8, 'Responses per prompt.', 1)
  flags.DEFINE_string('output', None, 'File of JSON lines to write.')
  cli.run(main)
