"""Rotary position embeddings and their stretched variants.

References:
  Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021
  Peng et al., `YaRN <https://arxiv.org/abs/2309.00071>`_, 2023
  Ding et al., `LongRoPE <https://arxiv.org/abs/2402.13753>`_, 2024
  Grattafiori et al., `Llama 3 <https://arxiv.org/abs/2407.21783>`_, 2024
"""

import math

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
  """Angle per position of each pair of dimensions, in radians, [d/2] float32.

  ωᵢ = θ^(−2i/d), changed according to `rope.kind`
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  base = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
  if rope.kind == 'linear':
    base = base / rope.factor
  elif rope.kind == 'longrope':
    base = base / np.asarray(rope.short_factor, np.float32)
  elif rope.kind == 'llama3':
    base = _llama3(rope, base)
  elif rope.kind == 'yarn':
    base = _yarn(rope, base)
  return base.astype(np.float32)


def _llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
  """Divides slow dimensions by the factor and keeps fast ones."""
  periods = rope.original_length * base / (2 * math.pi)
  low, high = rope.low_frequency, rope.high_frequency
  kept = np.clip((periods - low) / (high - low), 0.0, 1.0)
  return (1 - kept) * base / rope.factor + kept * base


def _yarn(rope: Rope, base: np.ndarray) -> np.ndarray:
  """Blends as `_llama3`, but linearly in the dimension's index."""
  dim = 2 * base.size

  def dimension(rotations):
    ratio = rope.original_length / (rotations * 2 * math.pi)
    return dim * math.log(ratio) / (2 * math.log(rope.theta))

  low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001
  ramp = (np.arange(base.size, dtype=np.float32) - low) / (high - low)
  kept = 1 - np.clip(ramp, 0.0, 1.0)
  return (1 - kept) * base / rope.factor + kept * base


def rotation(rope: Rope, head_dim: int, positions) -> tuple:
  """Returns cosine and sine of every position, each [..., d/2] float32."""
  omega = jnp.asarray(frequencies(rope, head_dim))
  omega = omega.reshape((1,) * positions.ndim + omega.shape)
  angles = positions[..., None].astype(jnp.float32) * omega
  factor = rope.attention_factor
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x, cosine, sine):
  """Rotates dimensions (i, i + d/2) of [B, T, H, d] by [B, T, d/2] angles."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cosine, sine = cosine[:, :, None], sine[:, :, None]
  turned = [first * cosine - second * sine, second * cosine + first * sine]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
