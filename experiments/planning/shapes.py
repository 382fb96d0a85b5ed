"""Shapes of published models, for plans without a checkpoint."""

import dataclasses
import difflib

from jaxrl_llm.errors import UserError
from jaxrl_llm.models.config import ModelConfig, Rope

_QWEN = dict(
  family='qwen2', max_length=32_768, query_bias=True, rope=Rope(theta=1e6)
)
_LLAMA = dict(
  family='llama',
  max_length=131_072,
  norm_epsilon=1e-5,
  rope=Rope(theta=5e5, kind='llama3', factor=8.0, original_length=8192),
)


def _gemma(*sizes: int, query_scale: int, head_dim: int) -> ModelConfig:
  """Gemma 3's text model: 5 of 6 layers attend to 1,024 tokens only."""
  hidden, _, layers, *_ = sizes
  return ModelConfig(
    262_208,
    *sizes,
    head_dim=head_dim,
    family='gemma3_text',
    max_length=131_072,
    tied=True,
    rope=Rope(theta=1e6, kind='linear', factor=8.0),
    local_rope=Rope(theta=10_000.0),
    window=1024,
    sliding=tuple((i + 1) % 6 != 0 for i in range(layers)),
    norm_offset=1.0,
    post_norms=True,
    query_key_norm=True,
    activation='gelu_tanh',
    embedding_scale=hidden**0.5,
    query_scale=query_scale**-0.5,
  )


# From each config.json: https://huggingface.co/Qwen/Qwen2.5-7B,
# meta-llama/Llama-3.1-8B, google/gemma-3-4b-pt (its text_config) and so on:
# vocabulary, hidden and MLP width, layers, heads, key and value heads.
SHAPES = {
  'qwen2.5-0.5b': ModelConfig(
    151_936, 896, 4864, 24, 14, 2, tied=True, **_QWEN
  ),
  'qwen2.5-1.5b': ModelConfig(
    151_936, 1536, 8960, 28, 12, 2, tied=True, **_QWEN
  ),
  'qwen2.5-7b': ModelConfig(152_064, 3584, 18_944, 28, 28, 4, **_QWEN),
  'llama3-8b': ModelConfig(128_256, 4096, 14_336, 32, 32, 8, **_LLAMA),
  'llama3-70b': ModelConfig(128_256, 8192, 28_672, 80, 64, 8, **_LLAMA),
  'gemma3-4b': _gemma(2560, 10_240, 34, 8, 4, query_scale=256, head_dim=256),
  'gemma3-27b': _gemma(5376, 21_504, 62, 32, 16, query_scale=168, head_dim=128),
}


def named(name: str, **overrides) -> ModelConfig:
  """Returns a published shape with some fields replaced, such as dtype."""
  if name not in SHAPES:
    near = difflib.get_close_matches(name, SHAPES, 1)
    hint = f'did you mean {near[0]}?' if near else f'known: {", ".join(SHAPES)}'
    raise UserError(f'there is no model shape {name!r}\n{hint}')
  return dataclasses.replace(SHAPES[name], **overrides)
