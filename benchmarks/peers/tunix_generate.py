"""The sampler of Tunix, texts in and texts out."""

import jax
from transformers import AutoTokenizer
from tunix.generate import sampler as sampler_lib

from benchmarks.peers import tunix_model
from benchmarks.peers import work as work_lib


def main() -> None:
  """Does the work."""
  work = work_lib.read()
  config, model = tunix_model.load(work.folder)
  tokenizer = AutoTokenizer.from_pretrained(work.folder)
  sampler = sampler_lib.Sampler(
    model,
    work_lib.with_end(tokenizer, work),
    sampler_lib.CacheConfig(
      cache_size=work.prompt_tokens + work.new_tokens,
      num_layers=config.num_layers,
      num_kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
    ),
  )
  seeds = iter(range(10**6))

  def call() -> list[str]:
    output = sampler(
      work.texts[: work.prompts],
      max_generation_steps=work.new_tokens,
      max_prompt_length=work.prompt_tokens,
      temperature=1.0,
      # Without it the sampler is greedy.
      top_p=1.0,
      seed=jax.random.key(next(seeds)),
    )
    lengths = set(map(len, output.tokens))
    if lengths != {work.new_tokens}:
      raise ValueError(f'responses of other lengths: {lengths}')
    return output.text

  work_lib.show(work_lib.repeat(call, work), 'google-tunix', 'jax', 'flax')


if __name__ == '__main__':
  main()
