"""Fused attention for the passes that store nothing: training and scoring.

There each row reads its shared prompt and its own tokens, all known in advance:
keys and values are joined per row for one kernel, which never writes the scores
to memory.  Other passes use `attention.attend`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.models.config import ModelConfig

# The unit of a TPU's vector registers: lengths are padded to a multiple.
LANES = 128
MAX_BLOCK = 512  # tokens; its scores fill 1 MiB of a core's memory


def choose(
  config: ModelConfig, length: int, prefixes=(), stored: bool = False
) -> str:
  """Returns the attention kernel of a pass: 'xla', 'splash' or 'cudnn'.

  | the pass, or the model | on TPU | on GPU | elsewhere |
  |---|---|---|---|
  | decoding, branches: a stored suffix or listed readers | xla | xla | xla |
  | fewer than 128 own tokens | xla | xla | xla |
  | a window narrower than prefixes and own tokens | xla | xla | xla |
  | soft-capped scores | splash | xla | xla |
  | float32 | splash | xla | xla |
  | head_dim above 128 or not a multiple of 8 | splash | xla | xla |
  | cuDNN absent | splash | xla | xla |
  | anything else | splash | cudnn | xla |

  The first row that applies counts.  Any length works: the kernels' adapters
  pad.  A kernel named by `config.attention` replaces the platform's, and is
  refused where the third or a later row has xla; without a TPU, splash is
  interpreted, slowly, for tests.

  Args:
    config: static.
    length: T, own tokens of each row.
    prefixes: S, the number of keys, of each prefix.
    stored: whether keys are written to a suffix, or rows find their prefix
      by a list of readers.

  Raises:
    UserError: `config.attention` names a kernel that the model cannot have.
  """
  wanted = config.attention
  if wanted == 'auto':
    wanted = {'tpu': 'splash', 'gpu': 'cudnn'}.get(_platform(), 'xla')
  if wanted == 'xla' or stored or length < LANES:
    return 'xla'
  reason = _obstacle(config, wanted, length + sum(prefixes))
  if reason is None:
    return wanted
  if config.attention == 'auto':
    return 'xla'
  raise UserError(
    f'attention={wanted!r} cannot compute this model: {reason}.\n'
    "Use attention='auto', which falls back to XLA."
  )


def _obstacle(config: ModelConfig, kernel: str, keys: int) -> str | None:
  """Returns why a kernel cannot compute the model, a phrase, or None."""
  if any(config.sliding) and config.window < keys:
    # Padding separates a prompt from a row's tokens, so that a window of
    # positions is not one of slots; and layers with and without it share a
    # program.
    return f'layers see {config.window} of {keys} tokens (sliding window)'
  if kernel == 'splash':
    return None
  if config.attention_softcap is not None:
    return 'cuDNN has no soft cap'
  if config.dtype != 'bfloat16':
    return f'cuDNN multiplies bfloat16, not {config.dtype}'
  if config.head_dim > 128 or config.head_dim % 8:
    return f'cuDNN takes heads up to 128 in steps of 8, not {config.head_dim}'
  if not has_cudnn():
    return 'cuDNN is not installed'
  return None


def _platform() -> str:
  """Returns the platform of the current mesh, or of the default backend.

  A program compiled ahead of time for a TPU under its mesh thus gets the TPU's
  kernel on a machine without one.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def has_cudnn() -> bool:
  """Checks whether programs for a GPU can use cuDNN here; needs no GPU."""
  attend = functools.partial(
    jax.nn.dot_product_attention, implementation='cudnn'
  )
  x = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
  try:
    jax.eval_shape(attend, x, x, x)
  except RuntimeError:
    return False
  return True


def attend(kernel: str, query, prefixes, lengths, own, *, scale, softcap=None):
  """Computes causal attention of rows over shared prefixes and own tokens.

  Equals `attention.attend` over the same parts.  Under a mesh the rows are
  split over (data, fsdp) and the heads over tensor, where these divide them;
  a kernel cannot be partitioned automatically.

  Args:
    kernel: 'splash' or 'cudnn', from `choose`.
    query: [B, T, N, d], N = H · M.
    prefixes: for each prefix keys [R, H, d, S] and values [R, H, S, d]; each
      of the R is read by the next B / R rows.
    lengths: for each prefix [R] int32, the number of real keys among the S.
    own: keys [B, H, d, T] and values [B, H, T, d].
    scale: multiplies q·k.
    softcap: c of c·tanh(x/c) on the scaled scores, or None; splash only.

  Returns:
    [B, T, N, d] in the query's dtype.

  References:
    Dao et al., `FlashAttention <https://arxiv.org/abs/2205.14135>`_, 2022
  """
  keys, values, real = _join(query.shape[0], prefixes, lengths, own)
  if kernel == 'splash':
    compute = functools.partial(splash, scale=scale, softcap=softcap)
  else:
    compute = functools.partial(cudnn, scale=scale)
  axes = sharding.mesh_sizes()
  if not axes:
    return compute(query, keys, values, real)
  rows = sharding.row_axes(query.shape[0], 1)[0] or None
  heads = sharding.heads_axis(keys.shape[1])
  cached = PartitionSpec(rows, heads, None, None)
  queried = PartitionSpec(rows, None, heads, None)
  return jax.shard_map(
    compute,
    in_specs=(queried, cached, cached, PartitionSpec(rows, None)),
    out_specs=queried,
    # Kernels do not declare the axes over which their outputs vary.
    check_vma=False,
  )(query, keys, values, real)


def _join(batch: int, prefixes, lengths, entries):
  """Joins all parts' keys and values, [B, H, S, d], and masks, [B, S].

  S is the sum of all prefixes' and T; a row's own tokens come last.
  """
  keys, values, real = [], [], []
  for (key, value), length in zip(prefixes, lengths, strict=True):
    times = batch // key.shape[0]
    slot = jnp.arange(key.shape[-1], dtype=jnp.int32)
    keys.append(jnp.repeat(key, times, axis=0))
    values.append(jnp.repeat(value, times, axis=0))
    valid = slot[None] < length[:, None]
    real.append(jnp.repeat(valid, times, axis=0))
  real.append(jnp.ones((batch, entries[0].shape[-1]), bool))
  keys = jnp.concatenate([*keys, entries[0]], axis=-1).swapaxes(2, 3)
  values = jnp.concatenate([*values, entries[1]], axis=2)
  return keys, values, jnp.concatenate(real, axis=1)


def splash(query, keys, values, real, *, scale, softcap=None):
  """Computes splash attention of the last T keys' queries, [B, T, N, d].

  Both lengths are padded to blocks of at most 512 tokens.  The causal mask is
  static and its upper blocks are skipped; a prompt's padding is a segment that
  no query belongs to.

  Args:
    query: [B, T, N, d].
    keys, values: [B, H, S, d]; the last T are the queries' own.
    real: [B, S] bool, the keys that a query may see, its own included.
    scale: multiplies q·k.
    softcap: c of c·tanh(x/c) on the scaled scores, or None.
  """
  # Pallas takes a fifth of a second to import, and few runs use the kernel.
  from jax.experimental.pallas.ops.tpu import splash_attention

  length, heads, slots = query.shape[1], query.shape[2], keys.shape[2]
  block_q, padded = _blocks(length)
  block_kv, padded_kv = _blocks(slots)
  mask = splash_attention.CausalMask((padded, padded_kv), slots - length)
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=splash_attention.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
    attn_logits_soft_cap=softcap,
    interpret=_platform() != 'tpu',
  )
  query = (query.astype(jnp.float32) * scale).astype(query.dtype)
  pad = lambda x, axis, size: jnp.pad(
    x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
  )
  segments = splash_attention.SegmentIds(
    jnp.ones(padded, jnp.int32),
    pad(real.astype(jnp.int32), 1, padded_kv),
  )
  of_rows = splash_attention.SegmentIds(None, 0)
  out = jax.vmap(kernel, in_axes=(0, 0, 0, of_rows))(
    pad(query.transpose(0, 2, 1, 3), 2, padded),
    pad(keys, 2, padded_kv),
    pad(values, 2, padded_kv),
    segments,
  )
  return out[:, :, :length].transpose(0, 2, 1, 3)


def _blocks(length: int) -> tuple[int, int]:
  """Returns the block, in tokens, and the length padded to a multiple of it."""
  count = -(-length // MAX_BLOCK)
  block = LANES * -(-length // (LANES * count))
  return block, count * block


def cudnn(query, keys, values, real, *, scale):
  """Computes cuDNN attention of the last T keys' queries, [B, T, N, d].

  cuDNN's own causal mask aligns the first query with the first key, so it only
  serves a pass without prefixes.  After a prefix the mask is a tensor
  [B, 1, T, S], shared by all heads, and masked blocks are not skipped.

  Args:
    query, keys, values, real, scale: as for `splash`.
  """
  length, slots = query.shape[1], keys.shape[2]
  keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
  attend = functools.partial(
    jax.nn.dot_product_attention, scale=scale, implementation='cudnn'
  )
  # Its gradient needs even lengths.
  pad = lambda x: jnp.pad(
    x, ((0, 0), (0, x.shape[1] % 2), *((0, 0),) * (x.ndim - 2))
  )
  query, keys, values, real = map(pad, (query, keys, values, real))
  if length == slots:
    return attend(query, keys, values, is_causal=True)[:, :length]
  slot = jnp.arange(keys.shape[1], dtype=jnp.int32)
  last = jnp.arange(query.shape[1], dtype=jnp.int32) + slots - length
  mask = real[:, None] & (slot[None] <= last[:, None])[None]
  return attend(query, keys, values, mask=mask[:, None])[:, :length]
