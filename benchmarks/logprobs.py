"""How fast log-probabilities of responses are computed, without a gradient.

    python -m benchmarks.logprobs --vocabulary=32000

Random responses to the job's prompts are scored as a trainer scores those of a
reference policy.  Beside the fields of `measuring` it prints:

  tokens_per_second: of responses, scored.
  roofline: `seconds` that the arithmetic takes at this machine's best, and
    which `fraction` of the time that is (`arithmetic`).
"""

import jax
from absl import flags

from benchmarks import arithmetic, job, measuring
from experiments import cli
from jaxrl_llm import rollouts
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import prompts as prompts_lib


def main() -> None:
  """Measures what the flags name."""
  given = flags.FLAGS
  compilations = measuring.Compilations()
  shape = job.shape()
  folder = job.folder(shape, given.models)
  config, params = folders.load(folder, shape.dtype, dtype=shape.dtype)
  encoded = prompts_lib.encode_prompts(
    [{'prompt': x} for x in job.prompts(given.prompts, given.prompt_tokens)],
    folders.load_tokenizer(folder),
    given.prompt_tokens,
  )
  prompts = rollouts.to_prompts(
    prompts_lib.gather(encoded, range(given.prompts))
  )
  size = given.prompts, given.samples, given.new_tokens
  tokens = jax.random.randint(jax.random.key(0), size, 0, shape.vocabulary)
  rounds = measuring.repeat(
    lambda _: rollouts.score_tokens(
      config,
      params,
      prompts,
      tokens,
      policy.Decoding(),
      given.micro_prompts or given.prompts,
      given.chunk,
    ),
    given.rounds,
  )
  job_size = {
    'prompts': given.prompts,
    'samples': given.samples,
    'prompt_tokens': given.prompt_tokens,
    'new_tokens': given.new_tokens,
  }
  found, roofline = measuring.report(
    'logprobs',
    rounds.seconds,
    compilations.found(),
    shape.dtype,
    recompiled=compilations.between(rounds.start, rounds.end),
    shape=shape._asdict(),
    **job_size,
  )
  median = found['seconds']['median']
  least = roofline.seconds(*arithmetic.scoring(config, *job_size.values()))
  found['tokens_per_second'] = measuring.rounded(tokens.size / median)
  found['roofline'] = measuring.beside(least, median)
  measuring.show(found)


if __name__ == '__main__':
  job.define_flags()
  flags.DEFINE_integer('prompts', 8, 'P.', 1)
  flags.DEFINE_integer('samples', 4, 'G.', 1)
  flags.DEFINE_integer('prompt_tokens', 64, 'Of each prompt; even.', 2)
  flags.DEFINE_integer('new_tokens', 64, 'Of each response.', 1)
  flags.DEFINE_integer('micro_prompts', 0, 'At one time; 0 for all.', 0)
  flags.DEFINE_integer('chunk', 256, 'Positions with logits at one time.', 1)
  flags.DEFINE_integer('rounds', 9, 'Timed ones.', 1)
  cli.run(main)
