"""Batches of which few rows go on, against the scorer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxrl_llm import sampling
from jaxrl_llm.models import prompts as prompts_lib
from jaxrl_llm.models import transformer
from jaxrl_llm.sampling import decoding, policy

T, EOS = 128, (4,)
score = jax.jit(policy.score, static_argnames=('config', 'decoding'))


@pytest.mark.parametrize(
  'prompts, samples', [(64, 1), pytest.param(16, 4, marks=pytest.mark.slow)]
)
def test_rows_that_go_on_alone_are_sampled_as_before(prompts, samples):
  config, params = toys.make_policy('llama', max_length=160)
  given = toys.make_prompts([1 + i % 5 for i in range(prompts)])
  settings = dict(samples=samples, max_tokens=T, eos_ids=EOS)
  found, cache = sampling.sample_and_keep(
    config, params, given, jax.random.key(0), **settings
  )
  lengths = np.asarray(found.mask).sum(axis=2)
  # More than a quarter ends early, and more than one row goes on.
  assert (lengths > np.sort(lengths, axis=None)[-16]).sum() > 1
  assert lengths.max() > 2 * np.median(lengths)
  expected = score(config, params, given, found.tokens).log_probs
  np.testing.assert_allclose(
    np.where(found.mask, found.log_probs, 0),
    np.where(found.mask, expected, 0),
    atol=1e-5,
  )
  ends = np.asarray(jnp.isin(found.tokens, jnp.array(EOS)) & found.mask)
  np.testing.assert_array_equal(ends.any(axis=2), found.finished[..., 0])
  # Fresh continuations read what the rows wrote, before and after.
  positions = jnp.asarray(np.maximum(lengths - 1, 0)[..., None], jnp.int32)
  forked = cache, found, positions, jax.random.key(1)
  branches, _ = sampling.fork(config, params, *forked, branches=1, eos_ids=EOS)
  tokens = np.array(found.tokens)
  for p, g in np.ndindex(lengths.shape):
    at = lengths[p, g] - 1
    if at:
      tokens[p, g, at:] = np.asarray(branches.tokens)[p, g, 0, 0, : T - at]
  again = score(config, params, given, jnp.asarray(tokens)).log_probs
  of_branch = np.asarray(branches.log_probs)[:, :, 0, 0]
  first = np.take_along_axis(
    np.asarray(again), np.maximum(lengths - 1, 0)[..., None], axis=2
  )
  drawn = (lengths > 1)[..., None]
  assert drawn.sum() > 16
  np.testing.assert_allclose(
    np.where(drawn, of_branch[..., :1], 0), np.where(drawn, first, 0), atol=1e-5
  )


def test_tokens_follow_the_number_of_a_row():
  """Whatever rows are decoded with it, and wherever in the batch it is."""
  config, params = toys.make_policy('llama')
  params = transformer.split_layers(params)
  question = toys.make_prompts([3])
  settings = decoding.Settings(policy.Decoding(), EOS, 0, ())

  @jax.jit
  def decode(numbers):
    _, rows = decoding.decode_rows(
      config,
      params,
      jax.random.key(2),
      prompts_lib.prefill_prompts(config, params, question),
      jnp.repeat(prompts_lib.last_tokens(question), 8),
      numbers,
      total=16,
      max_tokens=6,
      settings=settings,
    )
    return rows.tokens

  order = np.array([5, 0, 7, 1, 2, 6, 3, 4])
  tokens = np.asarray(decode(jnp.arange(8)))
  assert len(np.unique(tokens, axis=0)) > 4
  np.testing.assert_array_equal(decode(jnp.asarray(order)), tokens[order])
