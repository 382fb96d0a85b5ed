"""The decoder as pure functions: `init`, `apply`, `logits`, `prefill`.

Parameters are a plain nested dictionary; every leaf under 'layers' is stacked
over layers, [L, ...].  Flax Linen stays inside this file and `layers.py`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import attention, layers
from jaxrl_llm.models import rope as rope_lib
from jaxrl_llm.models.cache import Cache, Segment
from jaxrl_llm.models.config import ModelConfig, check_length


def init(config: ModelConfig, key, param_dtype='float32') -> dict:
  """Draws parameters: standard deviation 1/√in, less for residual outputs."""
  return _init(config, jnp.dtype(param_dtype), key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(config: ModelConfig, dtype, key) -> dict:
  """Draws parameters in one program, traced once for shapes and values."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = Decoder(config, dtype).init(key, tokens, None)['params']
  return sharding.constrain_params(params)


def apply(config: ModelConfig, params, tokens, cache: Cache | None = None):
  """Computes hidden states after the final norm, and adds tokens to the cache.

  Layers are scanned, or applied one after another if `split_layers` has made
  them a tuple: that takes longer to compile and copies no layer's parameters.
  With a suffix they are always split.

  Right-padded rows need no mask: no token sees the padding after it.  The
  position of token i of a row is its prefixes' lengths plus `cache.index`
  plus i; the caller must check that it stays below `config.max_length`
  (`check_length`).

  Args:
    config: static.
    params: from `init` or `folders.load`.
    tokens: [B, T] int32.
    cache: None, a plain causal pass; with `suffix=None`, a differentiable
      pass after shared prefixes; with a suffix, a step of decoding, which
      under jit writes the suffix in place.

  Returns:
    hidden: [B, T, D] in the compute dtype.
    cache: None, the unchanged cache, or the cache with `index` moved by T.

  Raises:
    UserError: T exceeds the positions or the suffix; B is not a multiple of
      a prefix's rows.
  """
  _check(config, tokens, cache)
  if cache is None or cache.suffix is None:
    return _decode(config, params, tokens, cache)[0], cache
  params = split_layers(params)
  hidden, (keys, values) = _decode(config, params, tokens, cache, emit=True)
  written = cache.suffix.replace(keys=keys, values=values)
  index = cache.index + tokens.shape[1]
  return hidden, cache.replace(suffix=written, index=index)


def logits(config: ModelConfig, params, hidden):
  """Applies the head: [..., D] → [..., V] float32, soft-capped."""
  return apply_head(config, head_matrix(config, params), hidden)


def apply_head(config: ModelConfig, matrix, hidden):
  """Computes `logits` from the head's weights [V, D]."""
  y = project(hidden, matrix, config.dtype)
  if config.logit_softcap is not None:
    y = config.logit_softcap * jnp.tanh(y / config.logit_softcap)
  return y


def head_matrix(config: ModelConfig, params):
  """Returns the head's weights [V, D]: the embedding's if they are tied."""
  return params['embed' if config.tied else 'head']['embedding']


def project(hidden, matrix, dtype):
  """hidden [..., D] · matrix [V, D]ᵀ → [..., V] float32, multiplied in dtype.

  The gradient of the matrix is float32 even if dtype is bfloat16, so that
  summing chunks of positions loses nothing.
  """
  shape = hidden.shape
  hidden = hidden.reshape(-1, shape[-1]).astype(dtype)
  out = _project(hidden, matrix.astype(jnp.float32), dtype)
  return out.reshape(*shape[:-1], matrix.shape[0])


def _multiply(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _project_forward(hidden, matrix, dtype):
  out = _multiply('nd,vd->nv', hidden, matrix.astype(dtype))
  return out, (hidden, matrix)


def _project_backward(dtype, residuals, gradient):
  hidden, matrix = residuals
  gradient = gradient.astype(dtype)
  return (
    _multiply('nv,vd->nd', gradient, matrix.astype(dtype)).astype(dtype),
    _multiply('nv,nd->vd', gradient, hidden),
  )


_project = jax.custom_vjp(
  lambda hidden, matrix, dtype: _project_forward(hidden, matrix, dtype)[0],
  nondiff_argnums=(2,),
)
_project.defvjp(_project_forward, _project_backward)


def sampling_layout(config: ModelConfig, params):
  """Converts parameters to the layout of sampling, once per iteration.

  Layers are split and, unless a mesh's tensor axis splits them, siblings are
  joined.  On a mesh, parameters are split over its tensor axis alone.  Matrices
  have the compute dtype, to which they would be cast at each use.

  Args:
    config: of the model.
    params: in the layout of training.
  """
  return _sampling_layout(params, jnp.dtype(config.dtype))


@functools.partial(jax.jit, static_argnames='dtype')
def _sampling_layout(params, dtype):
  def cast(path, leaf):
    matrix = path[-1].key in ('kernel', 'embedding')
    return leaf.astype(dtype) if matrix else leaf

  # Cast before sending, so that half the bytes are sent.
  params = jax.tree_util.tree_map_with_path(cast, params)
  params = sharding.constrain_params(params, 'training')
  params = split_layers(sharding.constrain_params(params, 'sampling'))
  if sharding.mesh_sizes().get(sharding.TENSOR, 1) > 1:
    # Concatenated projections would be split elsewhere.
    return params
  return {**params, 'layers': tuple(map(layers.join, params['layers']))}


def split_layers(params):
  """Replaces stacked layers by a tuple of layers."""
  layers_ = params['layers']
  if isinstance(layers_, tuple):
    return params
  count = jax.tree.leaves(layers_)[0].shape[0]
  pick = lambda i: jax.tree.map(lambda x: x[i], layers_)
  return {**params, 'layers': tuple(pick(i) for i in range(count))}


def prefill(config: ModelConfig, params, tokens, lengths) -> Segment:
  """Computes keys and values of prompts, to be shared by all their samples.

  Args:
    tokens: [P, S] int32, right-padded.
    lengths: [P] int32, tokens that count; 0 is allowed.

  Returns:
    A segment of P rows; differentiable with respect to `params`.
  """
  _check(config, tokens, None)
  _, (keys, values) = _decode(config, params, tokens, None, emit=True)
  return Segment(keys=keys, values=values, lengths=lengths)


def new_cache(config: ModelConfig, prefixes, rows: int, length: int) -> Cache:
  """Creates a cache with a suffix for `length` tokens of `rows` rows."""
  check_length(config, length)
  shape = rows, config.num_kv_heads, config.head_dim, length
  dtype = jnp.dtype(config.dtype)
  every = range(config.num_layers)
  suffix = Segment(
    keys=tuple(jnp.zeros(shape, dtype) for _ in every),
    values=tuple(jnp.zeros(shape, dtype).swapaxes(2, 3) for _ in every),
    lengths=jnp.zeros(rows, jnp.int32),
  )
  prefixes = tuple(prefix.split() for prefix in prefixes)
  return Cache(prefixes=prefixes, suffix=suffix, index=jnp.int32(0))


def _check(config, tokens, cache):
  batch, length = tokens.shape
  check_length(config, length)
  if cache is None:
    return
  for i, prefix in enumerate(cache.prefixes):
    if prefix.readers is not None and len(prefix.readers) != prefix.rows:
      raise UserError(
        f'Prefix {i} has {prefix.rows} rows and readers of '
        f'{len(prefix.readers)}.'
      )
    if prefix.readers is None and batch % prefix.rows:
      raise UserError(
        f'{batch} rows cannot share the {prefix.rows} rows of prefix {i}; the '
        'batch must be a multiple.'
      )
  if cache.suffix is None:
    return
  if cache.suffix.rows != batch or cache.suffix.capacity < length:
    raise UserError(
      f'The cache has {cache.suffix.rows} rows with room for '
      f'{cache.suffix.capacity} tokens; got [{batch}, {length}] tokens.'
    )
  if jnp.ndim(cache.index) and length > 1:
    raise UserError(
      f'Rows with an index each read one token at a time, not {length}.'
    )


def _decode(config, params, tokens, cache, emit=False):
  """Returns hidden states and, if `emit`, each layer's (keys, values)."""
  layers_ = params['layers'] if isinstance(params['layers'], tuple) else None
  if layers_ is not None:
    params = {name: x for name, x in params.items() if name != 'layers'}
  # Parameters have their own dtype; the module's only matters to `init`.
  decoder = Decoder(config, jnp.float32, emit)
  return decoder.apply({'params': params}, tokens, cache, layers_)


class Decoder(nn.Module):
  """Embedding, layers and final norm; the head is `logits`."""

  config: ModelConfig
  param_dtype: Any
  emit: bool = False

  @nn.compact
  def __call__(self, tokens, cache: Cache | None, split=None):
    """Runs `_decode` with its own scanned layers, or with those of `split`."""
    context = _context(self.config, tokens, cache)
    x = self._embed(tokens, context.positions)
    prefixes = cache.prefixes if cache is not None else ()
    if split is None:
      x, entries = self._scan(x, prefixes, context)
    else:
      suffix = cache.suffix if cache is not None else None
      x, entries = self._one_by_one(split, x, prefixes, suffix, context)
    return layers.Norm(self.config, self.param_dtype, name='norm')(x), entries

  def _scan(self, x, prefixes, context):
    config = self.config
    prefixes = [prefix.stacked() for prefix in prefixes]
    per_layer = layers.PerLayer(
      sliding=jnp.array(config.sliding),
      prefixes=tuple((p.keys, p.values) for p in prefixes),
    )
    layer = layers.Layer
    if config.remat:
      # Unrolled, XLA would merge both computations of a layer.
      layer = nn.remat(layer, prevent_cse=config.unroll > 1)
    scan = nn.scan(
      layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=config.num_layers,
      unroll=config.unroll,
      # Layers share no mutable state, and checking that would trace them again.
      # `init` keeps the check, because it affects how keys are drawn.
      check_constancy_invariants=self.is_initializing(),
    )
    stack = scan(config, self.param_dtype, self.emit, name='layers')
    return stack(x, per_layer, context)

  def _one_by_one(self, split, x, prefixes, suffix, context):
    config, kept = self.config, []
    layer = layers.Layer(config, self.param_dtype, self.emit, parent=None)
    for i, params in enumerate(split):
      per_layer = layers.PerLayer(
        sliding=jnp.array(config.sliding[i]),
        prefixes=tuple((p.keys[i], p.values[i]) for p in prefixes),
        suffix=None if suffix is None else (suffix.keys[i], suffix.values[i]),
      )
      x, entries = layer.apply({'params': params}, x, per_layer, context)
      kept.append(entries)
    return x, tuple(zip(*kept, strict=True)) if self.emit else None

  def _embed(self, tokens, positions):
    config = self.config
    dtype = jnp.dtype(config.dtype)
    table = lambda name, rows: _Embedding(
      rows, config, self.param_dtype, name=name
    )
    x = table('embed', config.vocab_size)(tokens)
    if config.embedding_scale != 1:
      x = x * jnp.asarray(config.embedding_scale, dtype)
    if config.rope is None:
      x = x + table('positions', config.max_length)(positions)
    if not config.tied:
      # Only created here; `logits` reads it.
      table('head', config.vocab_size)(None)
    return x


class _Embedding(nn.Module):
  """A table [rows, D]; its initial standard deviation is 1/√D."""

  rows: int
  config: ModelConfig
  param_dtype: Any

  @nn.compact
  def __call__(self, ids):
    width = self.config.hidden_size
    normal = nn.initializers.normal(width**-0.5)
    shape = (self.rows, width)
    table = self.param('embedding', normal, shape, self.param_dtype)
    if ids is None:
      return None
    # Padding may lie past the last learned position; it is never seen.
    rows = _look_up(table, ids)
    return rows.astype(self.config.dtype)


def _look_up(table, ids):
  """Looks up rows of a table [V, D] whose columns are split over fsdp.

  Each device looks up its columns for all rows of the batch along fsdp, and
  the devices exchange them: far fewer bytes than a table.
  """
  ids = sharding.constrain(ids, sharding.DATA, None)
  rows = jnp.take(table, ids, axis=0, mode='clip')
  rows = sharding.constrain(rows, sharding.DATA, None, sharding.FSDP)
  return sharding.constrain(rows, sharding.ROWS, None, None)


def _context(config, tokens, cache) -> layers.Context:
  batch, length = tokens.shape
  index = jnp.asarray(cache.index if cache is not None else 0, jnp.int32)
  prefixes = cache.prefixes if cache is not None else ()
  readers = tuple(_readers(prefix, batch) for prefix in prefixes)
  starts, start = [], jnp.zeros(batch, jnp.int32)
  for prefix, reader in zip(prefixes, readers, strict=True):
    starts.append(start)
    start = start + _lengths_read(prefix, reader, batch)
  positions = (start + index)[:, None]
  positions = positions + jnp.arange(length, dtype=jnp.int32)[None]
  turn = lambda rope: (
    None
    if rope is None
    else rope_lib.rotation(rope, config.head_dim, positions)
  )
  return layers.Context(
    positions=positions,
    rotation=turn(config.rope),
    local_rotation=turn(config.local_rope),
    starts=tuple(starts),
    lengths=tuple(prefix.lengths for prefix in prefixes),
    readers=readers,
    index=index,
  )


def _readers(prefix: Segment, batch: int) -> attention.Readers | None:
  rows = prefix.readers
  if rows is None:
    return None
  places = jnp.arange(rows.size, dtype=jnp.int32).reshape(rows.shape)
  nowhere = jnp.full(batch, rows.size, jnp.int32)
  return attention.Readers(rows, nowhere.at[rows].set(places, mode='drop'))


def _lengths_read(prefix: Segment, readers, batch: int):
  """Returns the number of tokens of a prefix that each row reads, [B]."""
  if readers is None:
    return jnp.repeat(prefix.lengths, batch // prefix.rows)
  index = readers.places // readers.rows.shape[1]
  return prefix.lengths.at[index].get(mode='fill', fill_value=0)
