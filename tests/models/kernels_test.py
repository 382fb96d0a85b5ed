"""Fused kernels against `attention.attend`, and which pass gets which."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import trees
from jax.sharding import AbstractDevice, AbstractMesh

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import attention, kernels, transformer
from jaxrl_llm.models.config import ModelConfig

HEADS, GROUPS, DIM = 4, 2, 8
CONFIG = ModelConfig(
  vocab_size=16,
  hidden_size=32,
  intermediate_size=32,
  num_layers=2,
  num_heads=HEADS,
  num_kv_heads=GROUPS,
  dtype='bfloat16',
)


def on(platform):
  """As when compiling for a device of a platform that is not here."""
  device = AbstractDevice(device_kind='', num_cores=1, platform=platform)
  mesh = AbstractMesh(
    (1, 1, 1), ('data', 'fsdp', 'tensor'), abstract_device=device
  )
  return jax.sharding.use_abstract_mesh(mesh)


def choose(platform, length=128, prefixes=(), stored=False, **fields):
  config = dataclasses.replace(CONFIG, **fields)
  with on(platform):
    return kernels.choose(config, length, prefixes, stored)


WINDOW = dict(window=300, sliding=(), prefixes=(200,))


@pytest.mark.parametrize('asked', [dict(stored=True), dict(length=127), WINDOW])
def test_what_no_kernel_does(asked):
  for platform in ('tpu', 'gpu'):
    assert choose(platform, **asked) == 'xla'
  with pytest.raises(UserError, match='300 of 328'):
    choose('tpu', attention='splash', **WINDOW)


def test_on_a_tpu():
  assert choose('tpu') == 'splash'
  assert choose('tpu', window=328, sliding=(), prefixes=(200,)) == 'splash'
  for fields in (
    dict(attention_softcap=2.0),
    dict(dtype='float32'),
    dict(head_dim=256),
  ):
    assert choose('tpu', **fields) == 'splash'
  assert choose('tpu', attention='xla') == 'xla'


@pytest.mark.parametrize(
  'fields, reason',
  [
    (dict(attention_softcap=2.0), 'soft cap'),
    (dict(dtype='float32'), 'not float32'),
    (dict(head_dim=136), 'not 136'),
    (dict(head_dim=12), 'not 12'),
  ],
)
def test_what_cudnn_does_not(fields, reason):
  assert choose('gpu', **fields) == 'xla'
  with pytest.raises(UserError, match=reason):
    choose('gpu', attention='cudnn', **fields)


def test_on_a_gpu():
  assert choose('gpu') == ('cudnn' if kernels.has_cudnn() else 'xla')


def test_elsewhere():
  assert choose('cpu') == 'xla'
  assert choose('cpu', attention='splash') == 'splash'
  with pytest.raises(UserError, match='attention must be one of'):
    dataclasses.replace(CONFIG, attention='flash')


def draw(*shape):
  random = np.random.default_rng(sum(shape))
  return jnp.asarray(random.normal(size=shape), jnp.float32)


def segment(rows, slots):
  return draw(rows, GROUPS, DIM, slots), draw(rows, GROUPS, slots, DIM)


def by_xla(query, prefixes, lengths, own, **settings):
  parts = []
  for (keys, values), length in zip(prefixes, lengths, strict=True):
    valid = jnp.arange(keys.shape[-1])[None] < length[:, None]
    parts.append(attention.Part(keys, values, valid[:, None, None, None, None]))
  causal = jnp.tri(query.shape[1], dtype=bool)[None, None, None, None]
  parts.append(attention.Part(*own, causal))
  return attention.attend(query, parts, **settings)


@pytest.fixture
def stand_in(monkeypatch):
  """XLA computes what cuDNN would be given."""
  standard = jax.nn.dot_product_attention

  def compute(*args, implementation, **kwargs):
    assert implementation == 'cudnn'
    return standard(*args, **kwargs, implementation='xla')

  monkeypatch.setattr(jax.nn, 'dot_product_attention', compute)


@pytest.mark.parametrize(
  'kernel, length, prefixes, softcap',
  [
    ('splash', 130, [(2, 37, [20, 0]), (4, 3, [3, 1, 0, 2])], None),
    ('splash', 513, [], 2.0),
    ('cudnn', 9, [(2, 6, [4, 0])], None),
    ('cudnn', 8, [(1, 5, [5]), (4, 3, [3, 1, 0, 2])], None),
    ('cudnn', 9, [], None),
  ],
)
def test_equals_xla(stand_in, kernel, length, prefixes, softcap):
  """Values and gradients; splash is interpreted."""
  batch = 4 if prefixes else 1
  lengths = [jnp.array(real) for _, _, real in prefixes]
  arrays = (
    draw(batch, length, HEADS, DIM),
    [segment(rows, slots) for rows, slots, _ in prefixes],
    segment(batch, length),
  )
  weights = draw(batch, length, HEADS, DIM)

  def total(attend, query, prefixes, own):
    settings = dict(scale=0.7, softcap=softcap)
    out = attend(query, prefixes, lengths, own, **settings)
    return (out * weights).sum(), out

  def found(attend):
    gradient = jax.grad(lambda *x: total(attend, *x), (0, 1, 2), has_aux=True)
    return jax.jit(gradient)(*arrays)

  fused = found(lambda *x, **kw: kernels.attend(kernel, *x, **kw))
  trees.assert_close(fused, found(by_xla), rtol=1e-4, atol=2e-5)


def read(config, params, prompts, lengths, tokens):
  """Hidden states behind shared prompts, as training computes them."""
  prefix = transformer.prefill(config, params, prompts, lengths)
  cache = transformer.Cache(prefixes=(prefix,), suffix=None, index=jnp.int32(0))
  hidden, _ = transformer.apply(config, params, tokens, cache)
  return hidden.astype(jnp.float32)


def inputs():
  """A prompt of 99 tokens and two responses of 128."""
  tokens = np.random.default_rng(0).integers(0, 16, (3, 128))
  tokens = jnp.asarray(tokens, jnp.int32)
  return tokens[:1], jnp.array([99]), tokens[1:]


@pytest.mark.slow
def test_a_model_is_as_exact_with_cudnn(stand_in):
  """In bfloat16 its error is that of XLA's attention."""
  params = transformer.init(CONFIG, jax.random.key(0))

  def use(**fields):
    config = dataclasses.replace(CONFIG, **fields)
    return jax.jit(functools.partial(read, config))(params, *inputs())

  exact = use(attention='xla', dtype='float32')
  error = lambda kernel: jnp.linalg.norm(use(attention=kernel) - exact)
  rounding = error('xla')
  assert 0 < rounding < 0.02 * jnp.linalg.norm(exact)
  assert 0 < error('cudnn') < 1.3 * rounding


@pytest.mark.slow
def test_gradients_of_a_model_are_the_same_with_splash():
  config = dataclasses.replace(CONFIG, dtype='float32', remat=True)
  params = transformer.init(config, jax.random.key(0))
  weights = draw(2, 128, 32)

  def use(kernel):
    one = dataclasses.replace(config, attention=kernel)
    total = lambda params: (read(one, params, *inputs()) * weights).sum()
    return jax.jit(jax.grad(total))(params)

  trees.assert_close(use('splash'), use('xla'), rtol=1e-3, atol=1e-3)


def on_four_devices(index):
  standard = jax.nn.dot_product_attention
  jax.nn.dot_product_attention = lambda *args, implementation, **kwargs: (
    standard(*args, **kwargs, implementation='xla')
  )
  arrays = (
    draw(2, 6, HEADS, DIM),
    segment(1, 5),
    segment(2, 6),
    draw(2, 6, HEADS, DIM),
  )

  def total(arrays):
    query, prefix, own, weights = arrays
    lengths = jnp.array([3], jnp.int32)
    out = kernels.attend('cudnn', query, [prefix], [lengths], own, scale=0.7)
    return (out * weights).sum()

  gradient = lambda: jax.jit(jax.grad(total)).lower(arrays)
  expected = gradient().compile()(arrays)
  for shape in (1, 2, 2), (2, 2, 1), (1, 1, 4):
    with jax.set_mesh(sharding.make_mesh(*shape)):
      lowered = gradient()
      found = lowered.compile()(arrays)
    assert 'manual_computation' in lowered.as_text()
    trees.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_and_heads_are_split_over_a_mesh():
  """Also where an axis does not divide them."""
  peers.run(on_four_devices, count=1, devices=4)


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, package, kernel',
  [
    ('v5e:2x4', 'libtpu', 'tpu_custom_call'),
    ('h100:8', 'nvidia.cudnn', '__cudnn$fmha'),
  ],
)
def test_compiles_ahead_of_time(monkeypatch, topology, package, kernel):
  """The gradient of a model, rows and heads split, without the device."""
  pytest.importorskip(package)
  if package != 'libtpu':
    pytest.importorskip('jax_cuda13_plugin')
  planning = pytest.importorskip('experiments.planning.topologies')
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  target = planning.make(topology)
  config = dataclasses.replace(CONFIG, head_dim=64, max_length=2048)
  mesh = jax.sharding.Mesh(
    np.array(target.devices).reshape(2, 2, 2),
    ('data', 'fsdp', 'tensor'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    (params, ids(4, 300), ids(4), ids(16, 1001)),
  )
  total = lambda *arguments: read(config, *arguments).sum()
  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(total)).lower(*arguments)
  program = lowered.compile(target.compiler_options).as_text()
  assert kernel in program
  # No array of scores: keys are 1301 of 1001 queries, or padded.
  assert not re.search(r'f32\[[\d,]*10\d\d,1[35]\d\d\]', program)
