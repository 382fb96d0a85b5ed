"""Speed of computing log-probabilities of responses, without a gradient.

    python -m benchmarks.logprobs --vocabulary=32000

Random responses to the job's prompts are scored as a trainer scores those of a
reference policy.  Besides the fields of `measuring` it prints:

  tokens_per_second: scored tokens of responses.
  roofline: `seconds` of the arithmetic at this machine's best, and their
    `fraction` of the measured time (`arithmetic`).
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
  """Measures as the flags specify."""
  options = flags.FLAGS
  compilations = measuring.Compilations()
  shape = job.shape()
  folder = job.folder(shape, options.models)
  config, params = folders.load(folder, shape.dtype, dtype=shape.dtype)
  encoded = prompts_lib.encode_prompts(
    [
      {'prompt': x} for x in job.prompts(options.prompts, options.prompt_tokens)
    ],
    folders.load_tokenizer(folder),
    options.prompt_tokens,
  )
  prompts = rollouts.to_prompts(
    prompts_lib.gather(encoded, range(options.prompts))
  )
  size = options.prompts, options.samples, options.new_tokens
  tokens = jax.random.randint(jax.random.key(0), size, 0, shape.vocabulary)
  rounds = measuring.repeat(
    lambda _: rollouts.score_tokens(
      config,
      params,
      prompts,
      tokens,
      policy.Decoding(),
      options.micro_prompts or options.prompts,
      options.chunk,
    ),
    options.rounds,
  )
  job_size = {
    'prompts': options.prompts,
    'samples': options.samples,
    'prompt_tokens': options.prompt_tokens,
    'new_tokens': options.new_tokens,
  }
  fields, roofline = measuring.report(
    'logprobs',
    rounds.seconds,
    compilations.found(),
    shape.dtype,
    recompiled=compilations.between(rounds.start, rounds.end),
    shape=shape._asdict(),
    **job_size,
  )
  median = fields['seconds']['median']
  least = roofline.seconds(*arithmetic.scoring(config, *job_size.values()))
  fields['tokens_per_second'] = measuring.rounded(tokens.size / median)
  fields['roofline'] = measuring.beside(least, median)
  measuring.show(fields)


if __name__ == '__main__':
  job.define_flags()
  flags.DEFINE_integer('prompts', 8, 'P.', 1)
  flags.DEFINE_integer('samples', 4, 'G.', 1)
  flags.DEFINE_integer('prompt_tokens', 64, 'Tokens per prompt; even.', 2)
  flags.DEFINE_integer('new_tokens', 64, 'Tokens per response.', 1)
  flags.DEFINE_integer('micro_prompts', 0, 'Prompts at a time; 0 for all.', 0)
  flags.DEFINE_integer('chunk', 256, 'Positions with logits at one time.', 1)
  flags.DEFINE_integer('rounds', 9, 'Timed rounds.', 1)
  cli.run(main)
