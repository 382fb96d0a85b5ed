"""Branches that fork a response's keys and values, against whole passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from selection import mostly_slow

from jaxrl_llm import sampling
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.sampling import policy
from jaxrl_llm.sampling.policy import Decoding, Prompts

KEY, T, SAMPLES, BRANCHES = jax.random.key(0), 6, 3, 4
EOS, PAD = (4, 7), 0
STATISTICS = 'entropy', 'score_norms'
score = jax.jit(policy.score, static_argnames=('config', 'decoding'))
MODELS = {
  'llama': Decoding(),
  'gemma': Decoding(temperature=0.7, top_k=5),
  'gpt2': Decoding(temperature=1.2, top_k=9, top_p=0.8, num_tokens=11),
}


def rollout(name, decoding, rows=None, samples=SAMPLES):
  """Responses of up to T tokens, and branches at every place inside each.

  Returns:
    Model, prompts, responses, positions, branches and their `Work`.
  """
  model, prompts = toys.make_policy(name), toys.make_prompts([6, 1, 3, 2])
  settings = dict(decoding=decoding, eos_ids=EOS, pad_id=PAD)
  responses, cache = sampling.sample_and_keep(
    *model, prompts, KEY, samples=samples, max_tokens=T, **settings
  )
  inside = np.asarray(responses.mask)[..., 1:]
  positions = np.where(inside, np.arange(1, T), 0).astype(np.int32)
  given = cache, responses, jnp.asarray(positions), jax.random.key(1)
  settings |= dict(branches=BRANCHES, statistics=STATISTICS, rows=rows)
  forked, work = jax.device_get(sampling.fork(*model, *given, **settings))
  return *model, prompts, responses, positions, forked, work


def joined(responses, positions, forked):
  """Prefix and continuation of every branch: tokens, where it wrote them.

  Returns:
    [P, G, M, K, T] tokens, mask of the continuation, and what `score` gives
    of it there, by name.
  """
  shape = forked.tokens.shape[:-1] + (T,)
  tokens = np.broadcast_to(
    np.asarray(responses.tokens)[:, :, None, None], shape
  ).copy()
  mask = np.zeros(shape, bool)
  found = {name: np.zeros(shape) for name in ('log_probs', *STATISTICS)}
  for *i, m, k in np.ndindex(shape[:-1]):
    p = positions[*i, m]
    if not p:
      continue
    for source, target in (
      (forked.tokens, tokens),
      (forked.mask, mask),
      *((forked[name], found[name]) for name in found),
    ):
      target[*i, m, k, p:] = source[*i, m, k, : T - p]
      assert not forked.mask[*i, m, k, T - p :].any()
  return tokens, mask, found


@pytest.mark.parametrize(
  'name, samples',
  [
    pytest.param('llama', SAMPLES, marks=pytest.mark.slow),
    pytest.param('llama', 1, marks=pytest.mark.slow),
    ('gemma', SAMPLES),
    pytest.param('gpt2', SAMPLES, marks=pytest.mark.slow),
  ],
)
def test_statistics_are_those_of_the_whole_response(name, samples):
  """Whether or not the responses share their prompt's keys and values."""
  decoding = MODELS[name]
  config, params, prompts, responses, positions, forked, _ = rollout(
    name, decoding, samples=samples
  )
  tokens, mask, found = joined(responses, positions, forked)
  assert (positions > 0).any() and (positions == 0).any()
  prompt_rows = tokens.shape[0], -1, T
  scored = score(config, params, prompts, tokens.reshape(prompt_rows), decoding)
  # One state of Gemma's scores is ill-conditioned: against parameters in double
  # precision the scorer is off by 0.7e-5 there, and the sampler by 1.2e-5.
  bound = 2e-5 if name == 'gemma' else 1e-5
  for field, values in found.items():
    expected = np.asarray(scored[field]).reshape(mask.shape)
    assert np.abs(expected - values)[mask].max() <= bound
  # Branches are fresh: of those that could, some leave the response.
  own = np.broadcast_to(
    np.asarray(responses.tokens)[:, :, None, None], tokens.shape
  )
  assert (tokens != own)[mask].mean() > 0.2


@pytest.mark.parametrize(
  'name', mostly_slow(['llama', 'gemma', 'gpt2'], 'llama')
)
def test_greedy_branches_are_those_of_a_full_prefill(name):
  config, params, prompts, responses, positions, *_ = rollout(
    name, MODELS[name]
  )
  model = config, params
  greedy = Decoding(temperature=0.0, num_tokens=11)
  ends = dict(eos_ids=EOS, pad_id=PAD)
  settings = dict(decoding=greedy, **ends)
  sizes = dict(samples=SAMPLES, max_tokens=T, decoding=MODELS[name])
  again, cache = sampling.sample_and_keep(*model, prompts, KEY, **sizes, **ends)
  np.testing.assert_array_equal(again.tokens, responses.tokens)
  given = cache, responses, positions, KEY
  forked, _ = jax.device_get(
    sampling.fork(*model, *given, branches=1, **settings)
  )
  width = prompts.tokens.shape[1] + T
  rows, lengths, places = [], [], []
  for p, g, m in np.ndindex(positions.shape):
    if positions[p, g, m]:
      length = int(prompts.lengths[p])
      row = [
        *np.asarray(prompts.tokens)[p, :length],
        *np.asarray(responses.tokens)[p, g, : positions[p, g, m]],
      ]
      rows.append(np.pad(row, (0, width - len(row))))
      lengths.append(len(row))
      places.append((p, g, m))
  tokens, lengths = np.array(rows, np.int32), np.array(lengths, np.int32)
  prompts = Prompts(tokens=tokens, lengths=lengths)
  whole = sampling.sample(
    *model, prompts, KEY, samples=1, max_tokens=T, **settings
  )
  for i, place in enumerate(places):
    left = T - positions[place]
    np.testing.assert_array_equal(
      forked.tokens[place][0, :left] * forked.mask[place][0, :left],
      np.asarray(whole.tokens)[i, 0, :left] * forked.mask[place][0, :left],
    )
    written = np.asarray(whole.mask)[i, 0, :left]
    np.testing.assert_array_equal(forked.mask[place][0, :left], written)
    np.testing.assert_allclose(
      forked.log_probs[place][0, :left][written],
      np.asarray(whole.log_probs)[i, 0, :left][written],
      atol=1e-5,
    )


@pytest.mark.parametrize('rows', [1, pytest.param(40, marks=pytest.mark.slow)])
def test_tokens_do_not_depend_on_the_rows(rows):
  """Fewer rows than responses or more, which take over others' keys."""
  *_, expected, _ = rollout('gemma', MODELS['gemma'])
  *_, forked, work = rollout('gemma', MODELS['gemma'], rows)
  np.testing.assert_array_equal(forked.tokens, expected.tokens)
  np.testing.assert_array_equal(forked.mask, expected.mask)
  np.testing.assert_allclose(forked.log_probs, expected.log_probs, atol=2e-5)
  assert forked.mask.sum() <= work.row_steps
  if rows == 1:
    assert work.row_steps == work.tokens


def test_nothing_is_prefilled(monkeypatch):
  """The model reads one token per row and step, and prompts not at all."""
  read = []
  apply = transformer.apply

  def watched(config, params, tokens, cache):
    read.append(tokens.shape)
    return apply(config, params, tokens, cache)

  monkeypatch.setattr(transformer, 'apply', watched)
  model = toys.make_policy('llama')
  responses, cache = sampling.sample_and_keep(
    *model, toys.make_prompts([3, 2]), KEY, samples=2, max_tokens=T
  )
  read.clear()
  given = *model, cache, responses, jnp.full((2, 2, 1), 2)
  fork = functools.partial(sampling.fork.__wrapped__, *given, branches=3)
  jax.make_jaxpr(fork)(KEY)
  assert read == [(12, 1)]


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')
def test_the_cache_is_written_in_place():
  """Room for 256 more tokens costs the rows' caches, not a copy in each step.

  There is one of 32 rows and, in the end, one of 16.
  """
  config, _ = toys.make_policy('llama')
  config = dataclasses.replace(
    config, num_layers=8, sliding=(False,) * 8, max_length=1024
  )
  per_token = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim

  def temporary(length):
    params = jax.eval_shape(lambda: transformer.init(config, KEY))
    responses, cache = jax.eval_shape(
      functools.partial(
        sampling.sample_and_keep, config, samples=16, max_tokens=length
      ),
      params,
      toys.make_prompts([3, 2]),
      KEY,
    )
    positions = jax.ShapeDtypeStruct((2, 16, 1), jnp.int32)
    given = params, cache, responses, positions, KEY
    compiled = sampling.fork.lower(config, *given, branches=1).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  grown = temporary(512) - temporary(256)
  assert grown < 2 * 256 * 32 * per_token


def test_a_branch_has_what_the_response_had_left():
  *_, positions, forked, _ = rollout('llama', Decoding())
  for place in np.ndindex(positions.shape):
    for k in range(BRANCHES):
      mask, tokens = forked.mask[place][k], forked.tokens[place][k]
      size = int(mask.sum())
      np.testing.assert_array_equal(mask, np.arange(T - 1) < size)
      if not positions[place]:
        assert size == 0 and not forked.finished[place][k, 0]
        continue
      ends = np.isin(tokens[:size], EOS)
      assert (
        not ends[:-1].any() and bool(forked.finished[place][k, 0]) == ends[-1]
      )
      assert size == T - positions[place] or ends[-1]
      assert (tokens[size:] == PAD).all()
  assert forked.finished.any() and not forked.finished.all()


def test_no_branches_or_no_room_is_refused():
  model, prompts = toys.make_policy('llama'), toys.make_prompts([2])
  for branches, max_tokens, rows in ((0, 4, None), (2, 1, None), (2, 4, 0)):
    responses, cache = sampling.sample_and_keep(
      *model, prompts, KEY, samples=1, max_tokens=max_tokens
    )
    given = cache, responses, jnp.ones((1, 1, 1), jnp.int32), KEY
    with pytest.raises(UserError, match='at least 1|branches='):
      sampling.fork(*model, *given, branches=branches, rows=rows)
