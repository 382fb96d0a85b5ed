"""Cost of responses whose common prefixes are decoded once, on a run's model.

    python -m benchmarks.trees --run=FOLDER --prompts=128 --samples=8

Ordinary responses, the same ones with each prefix decoded once, and weighted
trees are sampled in turns, so that other load on the machine slows all alike.
Prints one JSON line; besides the fields of `measuring`, whose `seconds` are
those of the second kind:

  distinct: share of distinct tokens in ordinary groups.
  once, weighted: of the other two kinds {seconds, relative to ordinary
    responses within a round; tokens decoded; useful, those over slots × steps}.
"""

from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks import measuring
from experiments import build, cli
from experiments.studies import audit_draws
from jaxrl_llm import rollouts, sampling
from jaxrl_llm.estimators import Threshold, Trees
from jaxrl_llm.sampling import allocation
from jaxrl_llm.tasks import prompts as prompts_lib


def measure(
  subject: audit_draws.Subject, samples: int, tau: float, rounds: int
) -> dict[str, Any]:
  """Times rounds of the three kinds.

  Args:
    subject: model and prompts.
    samples: G.
    tau: τ of the weighted trees.
    rounds: number of timed rounds; one that compiles comes before them.

  Returns:
    The module's fields by name, and `seconds` of each round.
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
  common = model.config, model.params, rollouts.to_prompts(batch)
  settings = dict(
    max_tokens=generation.max_tokens,
    decoding=generation.decoding,
    eos_ids=generation.eos_ids,
    pad_id=generation.pad_id,
  )
  rule = Threshold(tau, at_most=round(1 / tau))
  kinds = {
    'once': allocation.Independent(samples),
    'weighted': allocation.Systematic(Trees(rule)),
  }
  records = {name: [] for name in kinds}
  whole = []
  for number in range(rounds + 1):
    key = jax.random.key(number)
    ordinary, seconds = measuring.timed(
      lambda key=key: sampling.sample(*common, key, samples=samples, **settings)
    )
    whole.append(int(ordinary.mask.sum()))
    for name, kind in kinds.items():
      grown, own = measuring.timed(
        lambda key=key, kind=kind: sampling.grow(
          *common, key, allocation=kind, **settings
        )
      )
      records[name].append(
        (own / seconds, int(grown.nodes), int(grown.row_steps), own)
      )
  fields = {}
  for name, rows in records.items():
    ratio, nodes, steps, own = np.transpose(rows[1:])
    fields[name] = {
      'seconds': round(float(np.median(ratio)), 3),
      'tokens': round(float(nodes.mean())),
      'useful': round(float(nodes.sum() / steps.sum()), 3),
    }
    fields.setdefault('times', list(own))
  distinct = fields['once']['tokens'] / np.mean(whole[1:])
  return {'distinct': round(float(distinct), 3), **fields}


def main() -> None:
  """Measures as the flags specify."""
  options = flags.FLAGS
  compilations = measuring.Compilations()
  subject = audit_draws.of_run(
    options.run, options.step, options.prompts, options.trust_code
  )
  fields = measure(subject, options.samples, options.tau, options.rounds)
  seconds = fields.pop('times')
  report, _ = measuring.report(
    'trees',
    seconds,
    compilations.found(),
    subject=subject.title,
    prompts=options.prompts,
    samples=options.samples,
    tau=options.tau,
    **fields,
  )
  measuring.show(report)


if __name__ == '__main__':
  flags.DEFINE_string('run', None, 'Folder of a run.', required=True)
  flags.DEFINE_string('step', 'newest', 'Step of the checkpoint.')
  flags.DEFINE_integer('prompts', 128, 'P.')
  flags.DEFINE_integer('samples', 8, 'G.')
  flags.DEFINE_float('tau', 0.125, 'τ of the weighted trees.')
  flags.DEFINE_integer('rounds', 10, 'Timed rounds.')
  cli.define_trust_flag()
  cli.run(main)
