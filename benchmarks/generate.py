"""How fast responses are generated: texts in, texts out.

    python -m benchmarks.generate --vocabulary=32000

A round tokenises the prompts' texts, samples at temperature 1 until every
response has its full length, and decodes the responses to texts.  Beside the
fields of `measuring` it prints:

  tokens_per_second: generated, of the median round.
  roofline: `seconds` that the arithmetic of the whole round takes at this
    machine's best, and which `fraction` of the time that is (`arithmetic`).
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
    prompt_tokens: the most that a prompt may have.
    new_tokens: of each response.
  """

  def __init__(self, folder, dtype: str, prompt_tokens: int, new_tokens: int):
    self.config, params = folders.load(folder, dtype, dtype=dtype)
    self._params = transformer.sampling_layout(self.config, params)
    self._tokenizer = folders.load_tokenizer(folder)
    self._eos_ids = folders.eos_token_ids(folder, self._tokenizer)
    self._prompt_tokens = prompt_tokens
    self._new_tokens = new_tokens

  def __call__(self, texts: list[str], seed: int) -> list[str]:
    """One response to each prompt."""
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
  """Measures what the flags name."""
  given = flags.FLAGS
  job.use_devices()
  compilations = measuring.Compilations()
  shape = job.shape()
  with jax.set_mesh(sharding.make_mesh(data=-1, fsdp=1)):
    sampler = Sampler(
      job.folder(shape, given.models),
      shape.dtype,
      given.prompt_tokens,
      given.new_tokens,
    )
    texts = job.prompts(given.prompts, given.prompt_tokens)
    rounds = measuring.repeat(
      lambda number: sampler(texts, number), given.rounds
    )
  # Outside of the mesh: of one device, whose large products take all cores.
  found, roofline = measuring.report(
    'generate',
    rounds.seconds,
    compilations.found(),
    shape.dtype,
    recompiled=compilations.between(rounds.start, rounds.end),
    shape=shape._asdict(),
    devices=given.devices,
    prompts=given.prompts,
    prompt_tokens=given.prompt_tokens,
    new_tokens=given.new_tokens,
  )
  median = found['seconds']['median']
  least = roofline.seconds(
    *arithmetic.generation(
      sampler.config, given.prompts, 1, given.prompt_tokens, given.new_tokens
    )
  )
  tokens = given.prompts * given.new_tokens
  found['tokens_per_second'] = measuring.rounded(tokens / median)
  found['roofline'] = measuring.beside(least, median)
  measuring.show(found)


if __name__ == '__main__':
  job.define_flags()
  flags.DEFINE_integer('prompts', 32, 'P, with one response each.', 1)
  flags.DEFINE_integer('prompt_tokens', 64, 'Of each prompt; even.', 2)
  flags.DEFINE_integer('new_tokens', 128, 'Of each response.', 1)
  flags.DEFINE_integer('rounds', 9, 'Timed ones.', 1)
  cli.run(main)
