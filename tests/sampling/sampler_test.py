"""The sampler against the scorer, exact probabilities and transformers."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import toys
from scipy import stats
from selection import mostly_slow

from jaxrl_llm import sampling
from jaxrl_llm.errors import UserError
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.sampling import policy
from jaxrl_llm.sampling.policy import Decoding

GREEDY = Decoding(temperature=0.0)
KEY = jax.random.key(0)
choose = jax.jit(policy.draw_token, static_argnames='decoding')
score = jax.jit(policy.score, static_argnames=('config', 'decoding'))


def assert_well_formed(samples, eos_ids, pad_id):
  """Mask up to the first EOS, padding and zeros behind it."""
  tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
  length = tokens.shape[-1]
  for p, g in np.ndindex(tokens.shape[:2]):
    ends = np.flatnonzero(np.isin(tokens[p, g], eos_ids) & mask[p, g])
    size = ends[0] + 1 if len(ends) else length
    np.testing.assert_array_equal(mask[p, g], np.arange(length) < size)
    assert bool(samples.finished[p, g, 0]) == bool(len(ends))
    assert (tokens[p, g, size:] == pad_id).all()
    assert (np.asarray(samples.log_probs)[p, g, size:] == 0).all()


@pytest.mark.parametrize(
  'name, decoding, pad_id',
  [
    ('llama', Decoding(), 0),
    ('gemma', Decoding(temperature=0.7, top_k=5), 12),
    ('gpt2', Decoding(temperature=1.2, top_k=9, top_p=0.8, num_tokens=11), 7),
  ],
)
def test_sampler_is_scorer(name, decoding, pad_id):
  """Also both are the sorted float64 distribution of a plain pass.

  Ragged prompts down to one token, G = 24, two EOS ids of which one may pad.
  """
  config, params = toys.make_policy(name)
  prompts = toys.make_prompts([6, 1, 3, 2])
  settings = dict(decoding=decoding, eos_ids=(4, 7), pad_id=pad_id)
  settings |= dict(samples=24, max_tokens=5)
  settings['statistics'] = ('entropy', 'score_norms')
  samples = sampling.sample(config, params, prompts, KEY, **settings)
  assert_well_formed(samples, (4, 7), pad_id)
  mask, tokens = np.asarray(samples.mask), np.asarray(samples.tokens)
  assert mask.all(axis=-1).any() and not mask.all()
  assert {4, 7} <= set(tokens[mask].tolist())
  assert len(np.unique(tokens.reshape(-1, 5), axis=0)) > 12
  scored = score(config, params, prompts, tokens, decoding)
  exact = toys.exact_statistics(config, params, prompts, tokens, decoding)
  for field, expected in exact.items():
    found = np.asarray(samples[field])
    assert np.abs(scored[field] - found)[mask].max() <= 1e-5
    assert (found[~mask] == 0).all()
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)


def assert_frequencies(counts, probabilities):
  """Chi-square with cells below 5 expected put together."""
  expected = probabilities * counts.sum()
  assert (counts[probabilities == 0] == 0).all()
  rare = expected < 5
  pool = lambda x: np.append(x[~rare], x[rare].sum())
  counts, expected = pool(counts), pool(expected)
  assert len(counts) > 8
  kept = expected > 0
  assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_frequencies_of_whole_sequences():
  """20,000 responses of up to two tokens to each of two prompts."""
  config, params = toys.make_policy(vocab_size=6)
  prompts = toys.make_prompts([1, 4], vocab_size=6)
  decoding, eos = Decoding(temperature=1.5), 2
  count = 20_000
  settings = dict(decoding=decoding, eos_ids=(eos,), pad_id=eos)
  key, sizes = jax.random.key(5), dict(samples=count, max_tokens=2)
  samples = sampling.sample(config, params, prompts, key, **sizes, **settings)
  every = np.array([[[a, 0] for a in range(6)]] * 2, np.int32)
  logits = toys.plain_logits(config, params, prompts, every)
  p = toys.adjusted_probabilities(logits, decoding)
  for i in range(2):
    joint = p[i, 0, 0][:, None] * p[i, :, 1]
    # EOS first: the response is over, padded by what is EOS as well.
    joint[eos] = np.where(np.arange(6) == eos, p[i, 0, 0, eos], 0.0)
    cells = np.asarray(samples.tokens[i]) @ [6, 1]
    assert_frequencies(np.bincount(cells, minlength=36), joint.reshape(-1))


WIDE = [Decoding(), Decoding(top_k=40), Decoding(top_p=0.8, num_tokens=290)]


@pytest.mark.parametrize('decoding', mostly_slow(WIDE, WIDE[2]))
def test_frequencies_of_a_wide_vocabulary(decoding):
  """300 tokens fill two blocks of 128 and a part of a third."""
  random = np.random.default_rng(0)
  row = random.normal(0.0, 1.5, 300).astype(np.float32)
  logits = jnp.broadcast_to(row, (10_000, 300))
  counts = np.zeros(300, int)
  for seed in range(5):
    uniform = jax.random.uniform(jax.random.key(seed), (10_000,))
    tokens, found = choose(logits, uniform, decoding)
    counts += np.bincount(tokens, minlength=300)
    p = toys.adjusted_probabilities(row, decoding)
    np.testing.assert_allclose(found.log_probs, np.log(p[tokens]), atol=1e-5)
  assert_frequencies(counts, p)


def test_impossible_tokens_are_never_drawn():
  """Numbers exactly where the cumulative sum of 1,000 blocks steps.

  XLA sums so many as a tree, whose rounding makes the cumulative sum rise and
  fall also at blocks without a possible token.
  """
  random = np.random.default_rng(0)
  sums = random.exponential(size=1000) * (random.random(1000) < 0.3)
  sums = sums.astype(np.float32)
  levels = np.asarray(jax.jit(jnp.cumsum)(jnp.asarray(sums)))
  (steps,) = np.nonzero((np.diff(levels, prepend=0.0) != 0) & (sums == 0))
  assert len(steps)
  steps = steps[:20]
  levels = np.concatenate([levels[steps], levels[steps - 1]]) / levels[-1]
  numbers = np.concatenate(
    [levels, np.nextafter(levels, 0), np.nextafter(levels, 1), [0, 1 - 2**-23]]
  ).astype(np.float32)
  row = np.full((1000, 128), -np.inf, np.float32)
  with np.errstate(divide='ignore'):
    row[:, 5] = np.log(sums)
  logits = jnp.broadcast_to(row.reshape(-1), (len(numbers), 128_000))
  tokens, found = choose(logits, numbers, Decoding())
  assert np.isfinite(found.log_probs).all()
  assert np.isfinite(row.reshape(-1)[np.asarray(tokens)]).all()


def ending(config, params, token):
  """The same model, which now says `token` and nothing else."""
  width = config.hidden_size
  head = jnp.zeros((config.vocab_size, width)).at[token].set(1e3)
  params = dict(params, head={'embedding': head})
  # A final norm whose output is 1 everywhere.
  norm = {'scale': jnp.zeros(width), 'bias': jnp.ones(width)}
  return dict(params, norm=norm)


def test_decoding_stops_when_every_row_has_ended():
  """The same program takes the time of one step instead of 1,000."""
  config, params = toys.make_policy(norm='layer', max_length=4096)
  prompts = toys.make_prompts([3, 1])
  settings = dict(samples=2, max_tokens=1000, eos_ids=(3, 5), pad_id=1)
  run = functools.partial(
    sampling.sample, config, prompts=prompts, key=KEY, **settings
  )

  def seconds(token):
    model = ending(config, params, token)
    samples = jax.block_until_ready(run(params=model))
    start = time.perf_counter()
    jax.block_until_ready(run(params=model))
    return time.perf_counter() - start, np.asarray(samples.mask).sum(axis=-1)

  never, lengths = seconds(4)
  assert (lengths == 1000).all()
  at_once, lengths = seconds(5)
  assert (lengths == 1).all()
  assert at_once < never / 5


def greedy(config, params, prompts):
  settings = dict(decoding=GREEDY, eos_ids=(1,), samples=1, max_tokens=12)
  return sampling.sample(config, params, prompts, KEY, **settings)


def test_greedy_is_that_of_transformers(tmp_path):
  torch = pytest.importorskip('torch')
  import transformers

  config, params = toys.make_policy()
  folders.save(tmp_path / 'model', config, params)
  prompts = toys.make_prompts([4, 1], width=9)
  samples = greedy(config, params, prompts)
  with tiny_models.quiet():
    model = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'model', dtype=torch.float32
    )
    for i, size in enumerate(prompts.lengths):
      ids = torch.tensor(prompts.tokens[i : i + 1, :size]).long()
      expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=1,
        pad_token_id=0,
      )[0, size:]
      ours = np.asarray(samples.tokens[i, 0])[np.asarray(samples.mask[i, 0])]
      np.testing.assert_array_equal(ours, expected)


def test_samples_depend_on_the_key_alone():
  given = *toys.make_policy(), toys.make_prompts([3, 1])
  sample = functools.partial(sampling.sample, *given, samples=2, max_tokens=4)
  run = lambda key: np.asarray(sample(key).tokens)
  np.testing.assert_array_equal(run(KEY), run(KEY))
  assert (run(KEY) != run(jax.random.key(1))).any()


@pytest.mark.parametrize(
  'fields, message',
  [
    (dict(max_tokens=28), '33 tokens exceed the 32 positions'),
    (dict(max_tokens=0), 'max_tokens=0 must be at least 1'),
    (dict(samples=0), 'samples=0 and'),
    (dict(statistics=('entropy', 'mean')), r"\['mean'\] are not kept; choose"),
  ],
)
def test_impossible_sizes_are_refused(fields, message):
  config, params = toys.make_policy()
  sizes = {**dict(samples=2, max_tokens=27), **fields}
  with pytest.raises(UserError, match=message):
    sampling.sample(config, params, toys.make_prompts([5]), KEY, **sizes)


def test_one_possible_token_is_always_drawn():
  logits = jnp.full((1000, 300), -jnp.inf).at[:, 299].set(-80.0)
  uniform = jnp.linspace(0.0, 1.0, 1000, endpoint=False)
  tokens, found = choose(logits, uniform, Decoding())
  np.testing.assert_array_equal(tokens, 299)
  np.testing.assert_array_equal(found.log_probs, 0.0)
