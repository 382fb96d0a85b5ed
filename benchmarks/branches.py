"""Cost of branches compared with ordinary responses, on a run's model.

    python -m benchmarks.branches --run=FOLDER --prompts=32 --samples=8

Responses and branches of them are sampled in turns, so that other load on the
machine slows both down alike.  A response's time contains its share of the
prompts' prefill, which branches do not have.  Prints one JSON line; besides the
fields of `measuring`, whose `seconds` are those of a round of branches:

  rows: rows of the decode batch, one per response, the same for both.
  tokens, branch_tokens: generated per round.
  seconds_per_token, branch_seconds_per_token: medians over the rounds; `ratio`
    is the median of the second over the first within a round.
  utilization, branch_utilization: tokens / (rows × decode steps).
  copied_bytes: keys and values copied per round, and `prefix_bytes`: those of
    all branches' prefixes, which were not copied.
"""

import functools
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import measuring
from experiments import build, cli
from experiments.studies import audit_draws
from jaxrl_llm import estimators, rollouts, sampling
from jaxrl_llm.rollouts import branches
from jaxrl_llm.tasks import prompts as prompts_lib


def measure(
  subject: audit_draws.Subject,
  samples: int,
  wanted: estimators.Branches,
  rounds: int,
) -> dict[str, Any]:
  """Times rounds of responses and of branches of them.

  Args:
    subject: model and prompts.
    samples: G.
    wanted: number and positions of branches.
    rounds: number of timed rounds; one that compiles comes before them.

  Returns:
    The module's fields by name, and `branch_seconds` of each round.
  """
  config, model = subject.config, subject.model
  encoded = build.encode(config, subject.rows, model.tokenizer)
  batch = prompts_lib.gather(encoded, range(len(encoded.rows)))
  generation = build.generation(
    config,
    model,
    encoded.pad_id,
    samples=samples,
    temperature=config.rollout.temperature,
  )
  respond = functools.partial(
    sampling.sample_and_keep,
    model.config,
    model.params,
    rollouts.to_prompts(batch),
    samples=generation.samples,
    max_tokens=generation.max_tokens,
    decoding=generation.decoding,
    eos_ids=generation.eos_ids,
    pad_id=generation.pad_id,
  )
  records = []
  for number in range(rounds + 1):
    keys = jax.random.split(jax.random.key(number), 3)
    (responses, cache), seconds = measuring.timed(
      lambda key=keys[0]: respond(key)
    )
    fork_positions = jax.block_until_ready(
      branches.draw_fork_positions(
        wanted, responses.tokens, responses.mask, None, keys[1]
      )
    )
    (_, work), branch_seconds = measuring.timed(
      lambda state=(cache, responses, fork_positions, keys[2]): sampling.fork(
        model.config,
        model.params,
        *state,
        branches=wanted.samples,
        decoding=generation.decoding,
        eos_ids=generation.eos_ids,
        pad_id=generation.pad_id,
      )
    )
    mask = np.asarray(responses.mask)
    slot_bytes = _bytes((cache.suffix.keys, cache.suffix.values)) / mask.size
    row_steps = mask.sum(axis=2).max() * responses.finished.size
    records.append(
      {
        'tokens': int(mask.sum()),
        'branch_tokens': int(work.tokens),
        'branch_seconds': branch_seconds,
        'seconds_per_token': seconds / mask.sum(),
        'branch_seconds_per_token': branch_seconds / int(work.tokens),
        'utilization': mask.sum() / row_steps,
        'branch_utilization': int(work.tokens) / float(work.row_steps),
        'copied_bytes': float(work.copied),
        'prefix_bytes': slot_bytes * int(fork_positions.sum()) * wanted.samples,
      }
    )
  seconds = [one.pop('branch_seconds') for one in records][1:]
  return {
    'rows': mask.shape[0] * mask.shape[1],
    **_summary(records[1:]),
    'branch_seconds': seconds,
  }


def _bytes(arrays: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(arrays))


def _summary(rounds: list[dict[str, float]]) -> dict[str, float]:
  """Returns medians, and that of the rounds' own ratios."""
  ratio = [
    r['branch_seconds_per_token'] / r['seconds_per_token'] for r in rounds
  ]
  medians = {
    name: float(f'{np.median([r[name] for r in rounds]):.4g}')
    for name in rounds[0]
  }
  return {**medians, 'ratio': round(float(np.median(ratio)), 3)}


def main() -> None:
  """Measures as the flags specify."""
  options = flags.FLAGS
  compilations = measuring.Compilations()
  subject = audit_draws.of_run(
    options.run, options.step, options.prompts, options.trust_code
  )
  wanted = estimators.Branches(
    options.positions, options.branches, estimators.positions.uniform()
  )
  fields = measure(subject, options.samples, wanted, options.rounds)
  seconds = fields.pop('branch_seconds')
  report, _ = measuring.report(
    'branches',
    seconds,
    compilations.found(),
    subject=subject.title,
    positions=options.positions,
    branches=options.branches,
    **fields,
  )
  measuring.show(report)


if __name__ == '__main__':
  flags.DEFINE_string('run', None, 'Folder of a run.', required=True)
  flags.DEFINE_string('step', 'newest', 'Step of the checkpoint.')
  flags.DEFINE_integer('prompts', 32, 'P.')
  flags.DEFINE_integer('samples', 8, 'G.')
  flags.DEFINE_integer('positions', 4, 'Positions per response.')
  flags.DEFINE_integer('branches', 4, 'Branches per position.')
  flags.DEFINE_integer('rounds', 10, 'Timed rounds.')
  cli.define_trust_flag()
  cli.run(main)
