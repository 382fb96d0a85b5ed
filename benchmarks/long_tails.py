"""Cost of a few long responses compared with equally long ones.

    python -m benchmarks.long_tails

5 % of 256 responses have 128 tokens, the others 16.  The model counts up from
each prompt's last token to the end token, so that the lengths are known; its
layers compute as usual and add nothing.  Batches with the tail alternate with
even ones, in which every response has the mean length.  Besides the fields of
`measuring`, whose seconds are those of the batch with the tail, it prints:

  tokens, even_tokens: per batch, all useful.
  even_seconds: median of the even batches.
  ratio: median over the turns of seconds per token, with the tail over even.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import measuring
from experiments import cli
from jaxrl_llm import sampling
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling import policy

_VOCABULARY = 256
_END = _VOCABULARY - 1
_PROMPT_TOKENS = 16
_SHORT, _LONG = 16, 128
_CONFIG = ModelConfig(
  vocab_size=_VOCABULARY,
  hidden_size=_VOCABULARY,
  intermediate_size=768,
  num_layers=4,
  num_heads=8,
  num_kv_heads=4,
)


def counting_model(config: ModelConfig):
  """Creates parameters under which token n is followed by n + 1."""
  params = transformer.init(config, jax.random.key(0))
  layers = params['layers']
  for name, part in (('attention', 'out'), ('mlp', 'down')):
    silent = jax.tree.map(jnp.zeros_like, layers[name][part])
    layers = {**layers, name: {**layers[name], part: silent}}
  embedding = jnp.eye(config.vocab_size, config.hidden_size)
  return {
    **params,
    'layers': layers,
    'embed': {'embedding': embedding},
    # So sharp that nothing else is ever drawn.
    'head': {'embedding': 100.0 * jnp.roll(embedding, 1, axis=0)},
  }


def prompts_for(lengths: np.ndarray) -> policy.Prompts:
  """Returns prompts for responses of the given lengths, end tokens included."""
  shape = len(lengths), _PROMPT_TOKENS
  tokens = np.broadcast_to((_END - lengths)[:, None], shape)
  return policy.Prompts(
    tokens=jnp.asarray(tokens, jnp.int32),
    lengths=jnp.full(len(lengths), _PROMPT_TOKENS, jnp.int32),
  )


def main() -> None:
  """Measures as the flags specify."""
  options = flags.FLAGS
  compilations = measuring.Compilations()
  lengths = np.full(options.prompts, _SHORT)
  lengths[: round(options.prompts * options.tail)] = _LONG
  even = np.full(options.prompts, round(lengths.mean()))
  params = transformer.sampling_layout(_CONFIG, counting_model(_CONFIG))
  sample = functools.partial(
    sampling.sample, max_tokens=_LONG, samples=1, eos_ids=(_END,)
  )
  seconds, ratios, others = [], [], []
  for number in range(options.rounds + 1):
    per_token = []
    for wanted in (lengths, even):
      start = time.perf_counter()
      responses = sample(
        _CONFIG, params, prompts_for(wanted), jax.random.key(number)
      )
      jax.block_until_ready(responses)
      took = time.perf_counter() - start
      np.testing.assert_array_equal(np.sum(responses.mask, axis=(1, 2)), wanted)
      per_token.append(took / wanted.sum())
    if number:
      seconds.append(per_token[0] * lengths.sum())
      others.append(per_token[1] * even.sum())
      ratios.append(per_token[0] / per_token[1])
  fields, _ = measuring.report(
    'long_tails', seconds, compilations.found(), 'float32'
  )
  fields |= {
    'rows': options.prompts,
    'tokens': int(lengths.sum()),
    'even_tokens': int(even.sum()),
    'even_seconds': measuring.rounded(float(np.median(others))),
    'ratio': measuring.rounded(float(np.median(ratios))),
  }
  measuring.show(fields)


if __name__ == '__main__':
  flags.DEFINE_integer('prompts', 256, 'P, with one response each.', 1)
  flags.DEFINE_float('tail', 0.05, 'Share of long responses.', 0.0, 1.0)
  flags.DEFINE_integer('rounds', 5, 'Timed rounds.', 1)
  cli.run(main)
