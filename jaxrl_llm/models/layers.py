"""The Linen modules of the decoder: norm, attention, feed-forward, layer."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import sharding
from jaxrl_llm.models import attention, kernels
from jaxrl_llm.models import rope as rope_lib
from jaxrl_llm.models.config import ModelConfig

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}
# Maximum number of rows in a product of a decode step.
_FEW_ROWS = 64
EVERYTHING = 2**30  # a window wider than any text
# Projections of the same input, and the name of their concatenation.
JOINED = 'joined'
_SIBLINGS = {'attention': ('query', 'key', 'value'), 'mlp': ('gate', 'up')}


class PerLayer(NamedTuple):
  """Inputs of one layer or, with a leading [L], of all that are scanned.

  Attributes:
    sliding: bool, whether the layer uses the window.
    prefixes: (keys, values) of every prefix.
    suffix: (keys, values) of the rows' own tokens, or None.
  """

  sliding: Any
  prefixes: tuple
  suffix: tuple | None = None


class Context(NamedTuple):
  """Inputs that all layers share.

  Attributes:
    positions: [B, T] int32, of the call's tokens.
    rotation, local_rotation: (cosine, sine) of the positions, or None.
    starts: for each prefix the position of its first key, [B] int32.
    lengths: for each prefix its `Segment.lengths`, [R] int32.
    readers: for each prefix its `attention.Readers`, or None.
    index: int32 scalar or [B], where in the suffix the call's tokens go.
  """

  positions: Any
  rotation: Any
  local_rotation: Any
  starts: tuple
  lengths: tuple
  readers: tuple
  index: Any


class Norm(nn.Module):
  """RMS or layer normalisation of the last axis, in float32."""

  config: ModelConfig
  param_dtype: Any

  @nn.compact
  def __call__(self, x):
    config = self.config
    shape = (1,) * (x.ndim - 1) + x.shape[-1:]
    initial = nn.initializers.constant(1.0 - config.norm_offset)
    scale = self.param('scale', initial, x.shape[-1:], self.param_dtype)
    y = x.astype(jnp.float32)
    if config.norm == 'layer':
      y = y - y.mean(axis=-1, keepdims=True)
    variance = jnp.square(y).mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(variance + config.norm_epsilon)
    scale = scale.astype(jnp.float32) + config.norm_offset
    y = y * scale.reshape(shape)
    if config.norm == 'layer':
      zeros = nn.initializers.zeros_init()
      bias = self.param('bias', zeros, x.shape[-1:], self.param_dtype)
      y = y + bias.astype(jnp.float32).reshape(shape)
    return y.astype(x.dtype)


class Dense(nn.Module):
  """x @ kernel + bias in the compute dtype; kernel [in, out].

  Its initial standard deviation is 1/√in, times `scale`.  `axes` are the mesh
  axes over which the product splits the kernel.
  """

  features: int
  config: ModelConfig
  param_dtype: Any
  bias: bool
  scale: float = 1.0
  axes: tuple = (None, sharding.TENSOR)

  @nn.compact
  def __call__(self, x):
    dtype = jnp.dtype(self.config.dtype)
    width = x.shape[-1]
    normal = nn.initializers.normal(self.scale * width**-0.5)
    shape = (width, self.features)
    kernel = self.param('kernel', normal, shape, self.param_dtype)
    # Cast first, so that half the bytes are gathered.
    kernel = sharding.constrain(kernel.astype(dtype), *self.axes)
    y = _multiply(x.astype(dtype), kernel)
    if self.bias:
      zeros = nn.initializers.zeros_init()
      bias = self.param('bias', zeros, (self.features,), self.param_dtype)
      y = y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


def _multiply(x, kernel):
  """Multiplies x [B, T, in] by kernel [in, out]."""
  if x.ndim != 3 or x.shape[0] * x.shape[1] > _FEW_ROWS:
    return jnp.dot(x, kernel)
  return jax.lax.platform_dependent(
    x, kernel, cpu=_multiply_few, default=jnp.dot
  )


def _multiply_few(x, kernel):
  """Multiplies few rows on a CPU.

  XLA's product is faster there if the rows are the last dimension, and without
  the barrier it would undo their transposition.
  """
  rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
  return jnp.einsum('in,io->no', rows, kernel).reshape(*x.shape[:-1], -1)


def join(layer):
  """Concatenates sibling projections of one layer, for fewer products.

  A decode step reads few rows, where every product has a fixed cost.
  """

  def join_siblings(params, names):
    if any(name not in params for name in names):
      return params
    rest = {name: x for name, x in params.items() if name not in names}
    siblings = [params[name] for name in names]
    side_by_side = lambda *x: jnp.concatenate(x, axis=-1)
    return {**rest, JOINED: jax.tree.map(side_by_side, *siblings)}

  joined = {
    part: join_siblings(layer[part], names) for part, names in _SIBLINGS.items()
  }
  return {**layer, **joined}


def _project(module: nn.Module, names, features, bias: bool, x):
  """Projects x by the module's parameters, joined or not."""
  dense = lambda width, name: Dense(
    width, module.config, module.param_dtype, bias, name=name
  )
  if module.has_variable('params', JOINED):
    ends = np.cumsum(features)
    return jnp.split(dense(int(ends[-1]), JOINED)(x), ends[:-1], axis=-1)
  pairs = zip(features, names, strict=True)
  return [dense(width, name)(x) for width, name in pairs]


class Attention(nn.Module):
  """Projections, rotation and cache around the kernel of `kernels.choose`."""

  config: ModelConfig
  param_dtype: Any

  @nn.compact
  def __call__(self, x, layer: PerLayer, context: Context):
    """Returns (output [B, T, D], (keys, values) of the rows' own tokens)."""
    config = self.config
    heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
    query, keys, values = (
      y.reshape(*x.shape[:2], -1, config.head_dim)
      for y in _project(
        self,
        _SIBLINGS['attention'],
        [count * config.head_dim for count in heads],
        config.query_bias,
        x,
      )
    )
    query = self._by_heads('query', query)
    keys = self._by_heads('key', keys)
    values = self._by_heads('value', values, norm=False)
    if config.rope is not None:
      turn = _select_rotation(config, layer, context)
      query = rope_lib.rotate(query, *turn)
      keys = rope_lib.rotate(keys, *turn)
    entries = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
    if layer.suffix is not None:
      entries = _write(layer.suffix, entries, context.index)
    kernel = kernels.choose(
      config,
      x.shape[1],
      tuple(keys.shape[-1] for keys, _ in layer.prefixes),
      stored=layer.suffix is not None
      or any(r is not None for r in context.readers),
    )
    options = dict(scale=config.query_scale, softcap=config.attention_softcap)
    if kernel == 'xla':
      out = attention.attend(
        query, _parts(config, layer, context, entries), **options
      )
    else:
      out = kernels.attend(
        kernel, query, layer.prefixes, context.lengths, entries, **options
      )
    out = Dense(
      config.hidden_size,
      config,
      self.param_dtype,
      config.output_bias,
      scale=(2 * config.num_layers) ** -0.5,
      axes=(sharding.TENSOR, None),
      name='out',
    )(out.reshape(*out.shape[:2], -1))
    return out, entries

  def _by_heads(self, name, y, norm=True):
    """Splits a projection, [B, T, heads, d], over a mesh and normalises it."""
    config = self.config
    axis = sharding.heads_axis(config.num_kv_heads)
    y = sharding.constrain(y, sharding.ROWS, None, axis, None)
    if norm and config.query_key_norm:
      y = Norm(config, self.param_dtype, name=f'{name}_norm')(y)
    return y


def _select_rotation(config, layer: PerLayer, context: Context):
  if config.local_rope is None:
    return context.rotation
  return tuple(
    jnp.where(layer.sliding, local, everywhere)
    for local, everywhere in zip(
      context.local_rotation, context.rotation, strict=True
    )
  )


def _write(suffix, entries, index):
  """Writes keys and values of the call's tokens into the suffix's."""
  if index.ndim:
    row = jnp.arange(index.size, dtype=jnp.int32)
    options = dict(mode='drop', unique_indices=True, indices_are_sorted=True)
    keys = suffix[0].at[row, :, :, index].set(entries[0][..., 0], **options)
    values = suffix[1].at[row, :, index].set(entries[1][:, :, 0], **options)
    return keys, values
  update = jax.lax.dynamic_update_slice_in_dim
  return (
    update(suffix[0], entries[0], index, axis=3),
    update(suffix[1], entries[1], index, axis=2),
  )


def _parts(config, layer: PerLayer, context: Context, entries):
  """Returns the prefixes and the rows' own (keys, values) as parts."""
  parts = [
    attention.Part(
      keys,
      values,
      _valid_prefix(config, layer, context, i),
      context.readers[i],
    )
    for i, (keys, values) in enumerate(layer.prefixes)
  ]
  valid = _valid_own(config, layer, context, entries[0].shape[-1])
  return [*parts, attention.Part(*entries, valid)]


def _window(config, layer: PerLayer):
  return jnp.where(layer.sliding, config.window, EVERYTHING)


def _valid_own(config, layer: PerLayer, context: Context, slots: int):
  """Marks own tokens up to the query itself, [B or 1, 1, 1, 1, T, S]."""
  length = context.positions.shape[1]
  query = context.index.reshape(-1, 1, 1)
  query = query + jnp.arange(length, dtype=jnp.int32)[None, :, None]
  distance = query - jnp.arange(slots, dtype=jnp.int32)[None, None]
  valid = distance >= 0
  if config.window is not None:
    valid &= distance < _window(config, layer)
  return valid[:, None, None, None]


def _valid_prefix(config, layer: PerLayer, context: Context, i: int):
  """Marks real tokens of prefix i in the window, [R, 1, g or 1, 1, T or 1, S].

  A query's distance from a key differs by row, as prefixes' lengths do.
  """
  lengths, starts = context.lengths[i], context.starts[i]
  readers = context.readers[i]
  slot = jnp.arange(layer.prefixes[i][0].shape[-1], dtype=jnp.int32)
  valid = slot[None] < lengths[:, None]
  valid = valid[:, None, None, None, None]
  if config.window is not None:
    query = context.positions - starts[:, None]
    distance = query[..., None] - slot[None, None]
    if readers is None:
      distance = distance.reshape(lengths.size, -1, *distance.shape[1:])
    else:
      distance = distance.at[readers.rows].get(mode='clip')
    distance = distance[:, None, :, None]
    valid = valid & (distance < _window(config, layer))
  return valid


class FeedForward(nn.Module):
  """down(act(gate(x)) · up(x)), or down(act(up(x)))."""

  config: ModelConfig
  param_dtype: Any

  @nn.compact
  def __call__(self, x):
    config = self.config
    settings = (config, self.param_dtype, config.mlp_bias)
    activate = ACTIVATIONS[config.activation]
    width = config.intermediate_size
    if config.gated:
      names = _SIBLINGS['mlp']
      gate, up = _project(self, names, [width, width], config.mlp_bias, x)
      up = activate(gate) * up
    else:
      up = activate(Dense(width, *settings, name='up')(x))
    scale = (2 * config.num_layers) ** -0.5
    axes = sharding.TENSOR, None
    return Dense(
      config.hidden_size, *settings, scale=scale, axes=axes, name='down'
    )(up)


class Layer(nn.Module):
  """One decoder layer, which can be the body of a scan over layers."""

  config: ModelConfig
  param_dtype: Any
  emit: bool

  @nn.compact
  def __call__(self, x, layer: PerLayer, context: Context):
    """Returns x and, if `emit`, the tokens' (keys, values), else None."""
    config = self.config
    norm = lambda name: Norm(config, self.param_dtype, name=name)
    attend = Attention(config, self.param_dtype, name='attention')
    y, entries = attend(norm('attention_norm')(x), layer, context)
    if config.post_norms:
      y = norm('attention_post_norm')(y)
    x = x + y
    y = FeedForward(config, self.param_dtype, name='mlp')(norm('mlp_norm')(x))
    if config.post_norms:
      y = norm('mlp_post_norm')(y)
    x = sharding.constrain(x + y, sharding.ROWS, None, None)
    return x, entries if self.emit else None
