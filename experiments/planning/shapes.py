"""Shapes of published models by name, for plans that need no checkpoint."""

import dataclasses
import difflib

from jaxrl_llm.errors import UserError
from jaxrl_llm.models.config import ModelConfig, Rope

_QWEN = dict(
  family='qwen2',
  max_length=32_768,
  vocab_size=151_936,
  query_bias=True,
  rope=Rope(theta=1e6),
)
_LLAMA = dict(
  family='llama',
  max_length=131_072,
  vocab_size=128_256,
  norm_epsilon=1e-5,
  rope=Rope(
    theta=500_000.0,
    kind='llama3',
    factor=8.0,
    original_length=8192,
    low_frequency=1.0,
    high_frequency=4.0,
  ),
)


def _gemma(layers: int, hidden_size: int, query_scale: int, **shape):
  """Gemma 3's text model: every sixth layer sees all, the others 1,024."""
  return ModelConfig(
    family='gemma3_text',
    max_length=131_072,
    vocab_size=262_208,
    tied=True,
    num_layers=layers,
    hidden_size=hidden_size,
    rope=Rope(theta=1e6, kind='linear', factor=8.0),
    local_rope=Rope(theta=10_000.0),
    window=1024,
    sliding=tuple((i + 1) % 6 != 0 for i in range(layers)),
    norm_offset=1.0,
    post_norms=True,
    query_key_norm=True,
    activation='gelu_tanh',
    embedding_scale=hidden_size**0.5,
    query_scale=query_scale**-0.5,
    **shape,
  )


# Of the config.json of each: https://huggingface.co/Qwen/Qwen2.5-7B,
# meta-llama/Llama-3.1-8B, google/gemma-3-4b-pt (its text_config) and so on.
SHAPES = {
  'qwen2.5-0.5b': ModelConfig(
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    tied=True,
    **_QWEN,
  ),
  'qwen2.5-1.5b': ModelConfig(
    hidden_size=1536,
    intermediate_size=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    tied=True,
    **_QWEN,
  ),
  'qwen2.5-7b': ModelConfig(
    hidden_size=3584,
    intermediate_size=18_944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    **_QWEN | dict(vocab_size=152_064),
  ),
  'llama3-8b': ModelConfig(
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    **_LLAMA,
  ),
  'llama3-70b': ModelConfig(
    hidden_size=8192,
    intermediate_size=28_672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    **_LLAMA,
  ),
  'gemma3-4b': _gemma(
    34,
    2560,
    query_scale=256,
    intermediate_size=10_240,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
  ),
  'gemma3-27b': _gemma(
    62,
    5376,
    query_scale=168,
    intermediate_size=21_504,
    num_heads=32,
    num_kv_heads=16,
    head_dim=128,
  ),
}


def named(name: str, **overrides) -> ModelConfig:
  """The shape of a published model.

  Args:
    name: a key of `SHAPES`.
    **overrides: fields of `ModelConfig` to replace, such as dtype.

  Raises:
    UserError: no such name.
  """
  if name not in SHAPES:
    near = difflib.get_close_matches(name, SHAPES, 1)
    hint = f'did you mean {near[0]}?' if near else f'known: {", ".join(SHAPES)}'
    raise UserError(f'there is no model shape {name!r}\n{hint}')
  return dataclasses.replace(SHAPES[name], **overrides)
