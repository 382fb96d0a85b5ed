"""config.json to ModelConfig and back."""

import mistakes
import pytest
import tiny_models

from jaxrl_llm.errors import UserError
from jaxrl_llm.models.config import ModelConfig, Rope
from jaxrl_llm.models.huggingface import families

# The published config.json of Llama-3.2-1B, less what does not matter here.
LLAMA = dict(
  model_type='llama',
  hidden_act='silu',
  hidden_size=2048,
  intermediate_size=8192,
  head_dim=64,
  num_attention_heads=32,
  num_hidden_layers=16,
  num_key_value_heads=8,
  max_position_embeddings=131072,
  rms_norm_eps=1e-05,
  rope_theta=500000.0,
  rope_scaling=dict(
    factor=32.0,
    high_freq_factor=4.0,
    low_freq_factor=1.0,
    original_max_position_embeddings=8192,
    rope_type='llama3',
  ),
  tie_word_embeddings=True,
  torch_dtype='bfloat16',
  vocab_size=128256,
)


def test_reads_the_older_spelling():
  config = families.read_config(LLAMA, dtype='bfloat16')
  assert config == ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_length=131072,
    tied=True,
    dtype='bfloat16',
    norm_epsilon=1e-5,
    rope=Rope(theta=500000.0, kind='llama3', factor=32.0, original_length=8192),
  )


@pytest.mark.parametrize('name', tiny_models.CASES)
def test_write_inverts_read(name):
  raw = {**tiny_models.ROTARY, **tiny_models.CASES[name]}
  with tiny_models.quiet():
    config = families.read_config(raw)
    if name == 'llama_longrope':
      with pytest.raises(UserError, match='pass source'):
        families.write_config(config)
    else:
      assert families.read_config(families.write_config(config)) == config


def test_what_a_family_cannot_express_is_refused():
  config = families.read_config(LLAMA)
  fields = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1)
  for changed in (
    ModelConfig(**fields, num_heads=2, query_bias=True),
    ModelConfig(**fields, num_heads=2, window=3),
    ModelConfig(**fields, num_heads=2, norm='layer'),
    ModelConfig(**fields, num_heads=2, family='gpt2'),
  ):
    with pytest.raises(UserError, match='cannot express'):
      families.write_config(changed)
  assert families.differences(config, {**LLAMA, 'vocab_size': 3}) == [
    'vocab_size'
  ]


UNSUPPORTED = """
model_type='bert' | 'bert' is not supported
hidden_act='relu' | 'relu'
rope_scaling=dict(rope_type='dynamic', factor=2.0) | 'dynamic' is not known; \
known are default, linear
rope_scaling=dict(rope_type='llama3') | factor
partial_rotary_factor=0.5 | partial_rotary_factor
hidden_size='wide' | hidden_size
quantization_config=dict(bits=4) | quantization_config
model_type='gemma3_text', attn_logit_softcapping=50.0 | attn_logit_softcapping
model_type='gpt2', scale_attn_by_inverse_layer_idx=True | scale_attn_by_inverse
"""


@pytest.mark.parametrize('change, texts', mistakes.table(UNSUPPORTED))
def test_unsupported_settings_are_named(change, texts):
  with tiny_models.quiet(), mistakes.refused(*texts):
    families.read_config({**LLAMA, **eval(f'dict({change})')})
