"""Speed of generating responses: texts in, texts out.

    python -m benchmarks.generate --vocabulary=32000

A round tokenises the prompts' texts, samples at temperature 1 until every
response has its full length, and decodes the responses to texts.  Besides the
fields of `measuring` it prints:

  tokens_per_second: generated tokens, in the median round.
  roofline: `seconds` of the arithmetic of the whole round at this machine's
    best, and their `fraction` of the measured time (`arithmetic`).
"""

import jax
from absl import flags

from benchmarks import arithmetic, job, measuring
from experiments import cli
from jaxrl_llm import rollouts, sharding
from jaxrl_llm.models import transformer
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import prompts as prompts_lib


class Sampler:
  """A model that continues texts.

  Args:
    folder: a Hugging Face folder.
    dtype: of the parameters and of the matrix products.
    prompt_tokens: most tokens of a prompt.
    new_tokens: tokens per response.
  """

  def __init__(self, folder, dtype: str, prompt_tokens: int, new_tokens: int):
    self.config, params = folders.load(folder, dtype, dtype=dtype)
    self._params = transformer.sampling_layout(self.config, params)
    self._tokenizer = folders.load_tokenizer(folder)
    self._eos_ids = folders.eos_token_ids(folder, self._tokenizer)
    self._prompt_tokens = prompt_tokens
    self._new_tokens = new_tokens

  def __call__(self, texts: list[str], seed: int) -> list[str]:
    """Returns one response to each prompt."""
    encoded = prompts_lib.encode_prompts(
      [{'prompt': text} for text in texts], self._tokenizer, self._prompt_tokens
    )
    generation = rollouts.Generation(
      samples=1,
      max_tokens=self._new_tokens,
      decoding=policy.Decoding(),
      eos_ids=self._eos_ids,
      pad_id=encoded.pad_id,
    )
    _, samples = rollouts.generate(
      self.config,
      self._params,
      prompts_lib.gather(encoded, range(len(texts))),
      generation,
      jax.random.key(seed),
    )
    tokens = sharding.to_host(samples.tokens)[:, 0]
    return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)


def main() -> None:
  """Measures as the flags specify."""
  options = flags.FLAGS
  job.use_devices()
  compilations = measuring.Compilations()
  shape = job.shape()
  with jax.set_mesh(sharding.make_mesh(data=-1, fsdp=1)):
    sampler = Sampler(
      job.folder(shape, options.models),
      shape.dtype,
      options.prompt_tokens,
      options.new_tokens,
    )
    texts = job.prompts(options.prompts, options.prompt_tokens)
    rounds = measuring.repeat(
      lambda number: sampler(texts, number), options.rounds
    )
  # Outside the mesh, on one device, whose large products use all cores.
  fields, roofline = measuring.report(
    'generate',
    rounds.seconds,
    compilations.found(),
    shape.dtype,
    recompiled=compilations.between(rounds.start, rounds.end),
    shape=shape._asdict(),
    devices=options.devices,
    prompts=options.prompts,
    prompt_tokens=options.prompt_tokens,
    new_tokens=options.new_tokens,
  )
  median = fields['seconds']['median']
  least = roofline.seconds(
    *arithmetic.generation(
      sampler.config,
      options.prompts,
      1,
      options.prompt_tokens,
      options.new_tokens,
    )
  )
  tokens = options.prompts * options.new_tokens
  fields['tokens_per_second'] = measuring.rounded(tokens / median)
  fields['roofline'] = measuring.beside(least, median)
  measuring.show(fields)


if __name__ == '__main__':
  job.define_flags()
  flags.DEFINE_integer('prompts', 32, 'P, with one response each.', 1)
  flags.DEFINE_integer('prompt_tokens', 64, 'Tokens per prompt; even.', 2)
  flags.DEFINE_integer('new_tokens', 128, 'Tokens per response.', 1)
  flags.DEFINE_integer('rounds', 9, 'Timed rounds.', 1)
  cli.run(main)
