"""The decoder against torch: at once, token by token, behind shared prompts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import trees
from selection import mostly_slow

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.cache import Cache, Segment
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import folders

TOLERANCE = dict(rtol=0, atol=1e-4)
apply = jax.jit(transformer.apply, static_argnums=0)
prefill = jax.jit(transformer.prefill, static_argnums=0)
logits = jax.jit(transformer.logits, static_argnums=0)


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  """name → (torch model, config, params), through a folder on disk."""
  pytest.importorskip('torch')

  @functools.cache
  def load(name):
    folder = tmp_path_factory.mktemp(name)
    model = tiny_models.build(name, folder)
    with tiny_models.quiet():
      return model, *folders.load(folder)

  return load


def random_tokens(*shape):
  random = np.random.default_rng(1)
  return random.integers(0, tiny_models.VOCABULARY, shape).astype(np.int32)


@pytest.mark.parametrize('name', tiny_models.CASES)
def test_logits_equal_torch(loaded, name):
  model, config, params = loaded(name)
  tokens = random_tokens(2, 48)
  expected = tiny_models.torch_logits(model, tokens)
  hidden, cache = apply(config, params, tokens)
  ours = logits(config, params, hidden)
  assert cache is None and ours.dtype == jnp.float32
  assert expected.std() > 0.3  # else equality would say little
  np.testing.assert_allclose(ours, expected, **TOLERANCE)


@pytest.mark.parametrize('name', tiny_models.STRUCTURES)
def test_parameters_as_sampling_reads_them_give_torchs_logits(loaded, name):
  model, config, params = loaded(name)
  tokens = random_tokens(2, 12)
  expected = tiny_models.torch_logits(model, tokens)
  layout = transformer.sampling_layout(config, params)
  # Projections are joined: query, key and value, and gate and up.
  assert len(layout['layers']) == config.num_layers
  assert 'query' not in layout['layers'][0]['attention']
  hidden, _ = apply(config, layout, tokens)
  ours = logits(config, layout, hidden)
  np.testing.assert_allclose(ours, expected, **TOLERANCE)


@pytest.mark.parametrize(
  'name', mostly_slow(tiny_models.STRUCTURES, 'llama', 'gpt2')
)
def test_prompt_shared_then_decoded_then_forked(loaded, name):
  """[prompt, shared by 4 | response, shared by 2 | own tokens] of 8 rows."""
  model, config, params = loaded(name)
  prompts, lengths = random_tokens(2, 7), np.array([7, 3], np.int32)
  responses, cuts = random_tokens(4, 6), np.array([6, 1, 0, 4], np.int32)
  ends = random_tokens(8, 5)
  head = functools.partial(logits, config, params)

  prompt = prefill(config, params, prompts, lengths)
  cache = transformer.new_cache(config, (prompt,), 4, 6)
  decoded = []
  for t in range(6):
    hidden, cache = apply(config, params, responses[:, t : t + 1], cache)
    decoded.append(head(hidden))
  decoded = jnp.concatenate(decoded, axis=1)
  assert int(cache.index) == 6
  for b in range(4):
    n = lengths[b // 2]
    text = np.concatenate([prompts[b // 2, :n], responses[b]])
    expected = tiny_models.torch_logits(model, text[None])[0, n:]
    np.testing.assert_allclose(decoded[b], expected, **TOLERANCE)

  forked = cache.suffix.replace(lengths=jnp.asarray(cuts))
  cache = Cache(prefixes=(prompt, forked), suffix=None, index=jnp.int32(0))
  hidden, unchanged = apply(config, params, ends, cache)
  assert unchanged.suffix is None
  scored = head(hidden)
  for b in range(8):
    n, m = lengths[b // 4], cuts[b // 2]
    text = [prompts[b // 4, :n], responses[b // 2, :m], ends[b]]
    expected = tiny_models.torch_logits(model, np.concatenate(text)[None])[0]
    np.testing.assert_allclose(scored[b], expected[n + m :], **TOLERANCE)


def make_config(**changes):
  fields = dict(
    vocab_size=11,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
  )
  return ModelConfig(**{**fields, **changes})


@pytest.fixture(scope='module')
def params():
  return transformer.init(make_config(), jax.random.key(0))


@pytest.mark.slow
def test_several_tokens_per_decoding_step(params):
  config = make_config(window=4)
  tokens = random_tokens(2, 9) % 11
  expected, _ = apply(config, params, tokens)
  cache = transformer.new_cache(config, (), 2, 9)
  got = []
  for piece in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
    hidden, cache = apply(config, params, piece, cache)
    got.append(hidden)
  got = jnp.concatenate(got, axis=1)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_empty_prompt_is_no_prompt(params):
  config = make_config()
  tokens = random_tokens(2, 5) % 11
  prompt = prefill(config, params, random_tokens(1, 6) % 11, np.array([0]))
  cache = Cache(prefixes=(prompt,), suffix=None, index=0)
  behind, _ = apply(config, params, tokens, cache)
  alone, _ = apply(config, params, tokens)
  np.testing.assert_allclose(behind, alone, atol=1e-5)


def test_padding_changes_nothing(params):
  config = make_config()
  tokens = random_tokens(2, 8) % 11
  garbage = tokens.copy()
  garbage[:, 5:] = 7
  first, _ = apply(config, params, tokens)
  second, _ = apply(config, params, garbage)
  np.testing.assert_array_equal(first[:, :5], second[:, :5])


def shared_loss(config, params, prompts, lengths, tokens):
  prompt = transformer.prefill(config, params, prompts, lengths)
  cache = Cache(prefixes=(prompt,), suffix=None, index=0)
  hidden, _ = transformer.apply(config, params, tokens, cache)
  return jnp.square(transformer.logits(config, params, hidden)).sum()


HOW = [dict(remat=True), dict(unroll=2), dict(unroll=2, remat=True)]


@pytest.mark.parametrize('how', mostly_slow(HOW, HOW[2]))
def test_gradient_through_a_shared_prompt(how, params):
  """Equals the gradient of whole texts, the prompt's repeated per row."""
  prompts, tokens = random_tokens(2, 4) % 11, random_tokens(6, 3) % 11
  lengths = np.array([4, 4])

  def whole(config, params):
    text = jnp.concatenate([jnp.repeat(prompts, 3, axis=0), tokens], axis=1)
    hidden, _ = transformer.apply(config, params, text)
    logits = transformer.logits(config, params, hidden[:, 4:])
    return jnp.square(logits).sum()

  config = make_config()
  expected = jax.jit(jax.grad(functools.partial(whole, config)))(params)
  loss = functools.partial(shared_loss, make_config(**how))
  got = jax.jit(jax.grad(loss))(params, prompts, lengths, tokens)
  trees.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('unroll', [1, 4])
def test_remat_needs_less_memory(unroll):
  def temporary(remat):
    config = make_config(num_layers=8, remat=remat, unroll=unroll)
    params = jax.eval_shape(
      lambda key: transformer.init(config, key), jax.random.key(0)
    )
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    loss = lambda params, tokens: transformer.apply(config, params, tokens)[
      0
    ].sum()
    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(True) < 0.5 * temporary(False)


def generation_memory(prompt_length, length, rows=32):
  """Temporary bytes of a while loop of decoding steps behind 2 prompts."""
  config = make_config(num_layers=3, head_dim=32)

  def generate(params, prompt):
    cache = transformer.new_cache(config, (prompt,), rows, length)

    def body(state):
      tokens, cache = state
      hidden, cache = transformer.apply(config, params, tokens, cache)
      scores = transformer.logits(config, params, hidden)
      return scores.argmax(-1).astype(jnp.int32), cache

    first = jnp.zeros((rows, 1), jnp.int32)
    unfinished = lambda state: state[1].index < length
    return jax.lax.while_loop(unfinished, body, (first, cache))[0]

  key = jax.random.key(0)
  params = jax.eval_shape(lambda key: transformer.init(config, key), key)
  tokens = jnp.zeros((2, prompt_length), jnp.int32)
  lengths = jnp.zeros(2, jnp.int32)
  read = functools.partial(transformer.prefill, config)
  prompt = jax.eval_shape(read, params, tokens, lengths)
  compiled = jax.jit(generate).lower(params, prompt).compile()
  per_token = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim
  return compiled.memory_analysis().temp_size_in_bytes, per_token


@pytest.mark.usefixtures('optimized')
def test_decoding_writes_the_cache_in_place():
  """Room for 512 more tokens costs one cache, not a copy in each step."""
  small, per_token = generation_memory(16, 512)
  large, _ = generation_memory(16, 1024)
  assert large - small < 1.5 * 512 * 32 * per_token


@pytest.mark.usefixtures('optimized')
def test_samples_share_the_prompt():
  """512 more prompt tokens cost far less than a copy for each of 32 rows."""
  small, per_token = generation_memory(512, 16)
  large, _ = generation_memory(1024, 16)
  assert large - small < 0.1 * 512 * 32 * per_token


def test_bfloat16(params):
  """Compute in bfloat16 keeps parameters, logits and gradients float32."""
  config = make_config(dtype='bfloat16')
  tokens = random_tokens(2, 9) % 11
  hidden, _ = apply(config, params, tokens)
  exact, _ = apply(make_config(), params, tokens)
  assert hidden.dtype == jnp.bfloat16
  got = logits(config, params, hidden)
  expected = logits(make_config(), params, exact)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, expected, atol=0.1)
  loss = functools.partial(shared_loss, config)
  lengths = np.array([9])
  gradient = jax.eval_shape(jax.grad(loss), params, tokens[:1], lengths, tokens)
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {
    jnp.dtype('float32')
  }


def test_parameters():
  """Standard deviation 1/√in; bfloat16 parameters on request."""
  config = make_config(hidden_size=256, query_bias=True)
  params = transformer.init(config, jax.random.key(0), param_dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype('bfloat16')
  }
  query = params['layers']['attention']['query']
  assert query['kernel'].shape == (2, 256, 256)
  assert abs(float(query['kernel'].astype(float).std()) - 1 / 16) < 1e-3
  assert not np.array_equal(query['kernel'][0], query['kernel'][1])
  np.testing.assert_array_equal(query['bias'], jnp.zeros_like(query['bias']))


@pytest.mark.parametrize(
  'tokens, cached, words',
  [
    ((3, 4), None, 'cannot share the 2 rows'),
    ((4, 4), (2, 8), 'cache has 2 rows'),
    ((4, 9), (4, 8), 'room for 8 tokens'),
    ((2, 17), (2, 16), 'exceed the 16 positions'),
  ],
)
def test_shapes_that_do_not_fit(params, tokens, cached, words):
  config = make_config(max_length=16)
  segment = Segment(
    keys=jnp.zeros((2, 2, 2, 8, 3)),
    values=jnp.zeros((2, 2, 2, 3, 8)),
    lengths=jnp.zeros(2, jnp.int32),
  )
  if cached is None:
    cache = Cache(prefixes=(segment,), suffix=None, index=0)
  else:
    cache = transformer.new_cache(config, (), *cached)
  with pytest.raises(UserError, match=words):
    transformer.apply(config, params, jnp.zeros(tokens, jnp.int32), cache)


def test_cache_beyond_the_positions():
  with pytest.raises(UserError, match='17 tokens'):
    transformer.new_cache(make_config(max_length=16), (), 1, 17)


@pytest.mark.parametrize('name', ['stories260k', 'arithmetic-sequence-init'])
def test_real_models(shared, name):
  config, params = folders.load(shared / 'models' / name)
  reference = np.load(shared / 'models' / name / 'reference_logits.npz')
  for i in range(2):
    tokens, expected = reference[f'ids_{i}'], reference[f'logits_{i}']
    hidden, _ = apply(config, params, tokens[None])
    ours = logits(config, params, hidden)[0]
    np.testing.assert_allclose(ours, expected, **TOLERANCE)
    start = len(reference[f'prompt_ids_{i}'])
    greedy = np.argmax(ours[start - 1 : -1], axis=-1)
    np.testing.assert_array_equal(greedy, tokens[start:])


def test_real_gpt2(shared):
  folder = shared / 'models' / 'gpt-nano-sort'
  config, params = folders.load(folder)
  reference = np.load(folder / 'reference_activations.npz')
  hidden, _ = apply(config, params, reference['idx'].astype(np.int32))
  np.testing.assert_allclose(hidden, reference['ln_f'], **TOLERANCE)
  ours = logits(config, params, hidden)
  np.testing.assert_allclose(ours, reference['lm_head'], **TOLERANCE)
