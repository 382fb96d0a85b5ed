"""Converts between config.json of Hugging Face families and `ModelConfig`."""

import copy
import dataclasses
import math
import re

from jaxrl_llm.errors import UserError
from jaxrl_llm.models.config import FAMILIES, ModelConfig, Rope

ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'mistral': 'MistralForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
  'gemma2': 'Gemma2ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
  'gpt2': 'GPT2LMHeadModel',
}
# With one score of a whole text instead of logits.
SCORING_ARCHITECTURES = {
  family: re.sub(
    '(ForCausalLM|LMHeadModel)$', 'ForSequenceClassification', name
  )
  for family, name in ARCHITECTURES.items()
} | {'gemma3_text': 'Gemma3TextForSequenceClassification'}
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
# Fields of ModelConfig by their names in config.json.
_COMMON = {'vocab_size': 'vocab_size', 'tied': 'tie_word_embeddings'}
_ROTARY = {
  'hidden_size': 'hidden_size',
  'intermediate_size': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'max_length': 'max_position_embeddings',
  'norm_epsilon': 'rms_norm_eps',
}
_GPT2 = {
  'hidden_size': 'n_embd',
  'intermediate_size': 'n_inner',
  'num_layers': 'n_layer',
  'num_heads': 'n_head',
  'max_length': 'n_positions',
  'norm_epsilon': 'layer_norm_epsilon',
}
# Settings that change the function in ways the decoder does not support, and
# their harmless values.
UNSUPPORTED = {
  'use_bidirectional_attention': (None, False),
  'add_cross_attention': (None, False),
  'scale_attn_by_inverse_layer_idx': (None, False),
  'quantization_config': (None,),
  'partial_rotary_factor': (None, 1.0),
}
# Fields that may differ between a checkpoint and a run: they change neither
# a parameter nor the function computed from them.
RUN_FIELDS = 'dtype', 'remat', 'unroll', 'attention', 'max_length'


def read_config(raw: dict, **overrides) -> ModelConfig:
  """Converts the contents of a config.json to a ModelConfig.

  `transformers` fills in defaults and translates older spellings
  (`rope_scaling`, `rope_theta`, `torch_dtype`).

  Args:
    raw: the parsed file.
    **overrides: replace fields of the result.

  Raises:
    UserError: the family or a setting is not supported, or a field is invalid.
  """
  from transformers import CONFIG_MAPPING  # seconds to import

  family = raw.get('model_type')
  if family not in FAMILIES:
    raise UserError(
      f'model_type {family!r:.100} is not supported; '
      f'supported are {", ".join(FAMILIES)}.'
    )
  try:
    source = CONFIG_MAPPING[family].from_dict(copy.deepcopy(raw))
    for name, harmless in UNSUPPORTED.items():
      value = getattr(source, name, None)
      if value not in harmless:
        raise UserError(f'{name} = {value!r} of config.json is not supported.')
    fields = _gpt2(source) if family == 'gpt2' else _rotary(source)
  except UserError:
    raise
  except Exception as error:  # its validators have no narrower common class
    reason = ' '.join(str(error).split())[:300]
    raise UserError(
      f'config.json is not valid: {type(error).__name__}: {reason}'
    ) from error
  return ModelConfig(**{**fields, 'family': family, **overrides})


def _read(source, names: dict[str, str]) -> dict:
  return {
    name: getattr(source, theirs, None)
    for name, theirs in (_COMMON | names).items()
  }


def _activation(name: str) -> str:
  if name not in ACTIVATIONS:
    raise UserError(
      f'Activation {name!r} of config.json is not supported; '
      f'supported are {", ".join(ACTIVATIONS)}.'
    )
  return ACTIVATIONS[name]


def _gpt2(source) -> dict:
  return _read(source, _GPT2) | dict(
    intermediate_size=source.n_inner or 4 * source.n_embd,
    rope=None,
    norm='layer',
    query_bias=True,
    output_bias=True,
    mlp_bias=True,
    activation=_activation(source.activation_function),
    gated=False,
    query_scale=None if source.scale_attn_weights else 1.0,
  )


def _rotary(source) -> dict:
  """Returns the fields of every family except GPT-2."""
  family = source.model_type
  layers = source.num_hidden_layers
  types = getattr(source, 'layer_types', None)
  window = getattr(source, 'sliding_window', None)
  if family == 'mistral':
    sliding = (window is not None,) * layers
  else:
    sliding = tuple(kind == 'sliding_attention' for kind in types or ())
    sliding = sliding or (False,) * layers
  bias = getattr(source, 'attention_bias', False)
  activation = getattr(source, 'hidden_activation', None)
  activation = activation or getattr(source, 'hidden_act', None)
  fields = _read(source, _ROTARY) | dict(
    window=window if any(sliding) else None,
    sliding=sliding,
    query_key_norm=family in ('qwen3', 'gemma3_text'),
    query_bias=bias or family == 'qwen2',
    output_bias=bias,
    mlp_bias=getattr(source, 'mlp_bias', False),
    activation=_activation(activation),
  )
  ropes = source.rope_parameters
  if family == 'gemma3_text':
    fields['rope'] = _read_rope(ropes['full_attention'], source)
    fields['local_rope'] = _read_rope(ropes['sliding_attention'], source)
  else:
    fields['rope'] = _read_rope(ropes, source)
  if family in ('gemma2', 'gemma3_text'):
    fields |= _gemma(source)
  return fields


def _gemma(source) -> dict:
  cap = source.attn_logit_softcapping
  if source.model_type == 'gemma3_text' and cap is not None:
    raise UserError(
      f'attn_logit_softcapping = {cap} of config.json is not part of Gemma 3.'
    )
  return dict(
    norm_offset=1.0,
    post_norms=True,
    embedding_scale=math.sqrt(source.hidden_size),
    query_scale=source.query_pre_attn_scalar**-0.5,
    attention_softcap=cap,
    logit_softcap=source.final_logit_softcapping,
  )


def _read_rope(raw: dict, source) -> Rope:
  kind = raw.get('rope_type', 'default')
  if raw.get('partial_rotary_factor', 1.0) != 1.0:
    raise UserError('partial_rotary_factor of config.json is not supported.')
  fields = dict(theta=float(raw['rope_theta']), kind=kind)
  longest = source.max_position_embeddings
  original = raw.get('original_max_position_embeddings') or longest
  factor = raw.get('factor')
  if kind in ('yarn', 'longrope') and factor is None:
    factor = longest / original
  if kind in ('linear', 'llama3', 'yarn', 'longrope'):
    fields['factor'] = float(factor)
  if kind == 'llama3':
    fields |= dict(
      original_length=original,
      low_frequency=float(raw['low_freq_factor']),
      high_frequency=float(raw['high_freq_factor']),
    )
  elif kind == 'yarn':
    fields |= dict(
      original_length=original,
      beta_fast=float(raw.get('beta_fast') or 32),
      beta_slow=float(raw.get('beta_slow') or 1),
      truncate=raw.get('truncate', True),
      attention_factor=_yarn_attention(raw, factor),
    )
  elif kind == 'longrope':
    attention = raw.get('attention_factor')
    grown = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    fields |= dict(
      original_length=original,
      attention_factor=attention if attention is not None else grown,
      short_factor=tuple(float(x) for x in raw['short_factor']),
    )
  return Rope(**fields)


def _yarn_attention(raw: dict, factor: float) -> float:
  """Returns YaRN's temperature as a factor of cosine and sine (equation 22)."""
  if raw.get('attention_factor') is not None:
    return float(raw['attention_factor'])
  grow = lambda scale: 0.1 * scale * math.log(max(factor, 1)) + 1.0
  scale, scale_all = raw.get('mscale'), raw.get('mscale_all_dim')
  if scale and scale_all:
    return grow(scale) / grow(scale_all)
  return grow(1.0)


def write_config(config: ModelConfig) -> dict:
  """Returns a config.json's contents; `read_config` is the inverse.

  Raises:
    UserError: the config's family cannot express one of its fields.
  """
  gpt2 = config.family == 'gpt2'
  raw = dict(
    architectures=[ARCHITECTURES[config.family]],
    model_type=config.family,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
  )
  names = _COMMON | (_GPT2 if gpt2 else _ROTARY)
  raw |= {theirs: getattr(config, name) for name, theirs in names.items()}
  raw |= _write_gpt2(config) if gpt2 else _write_rotary(config)
  differing = differences(config, raw)
  if differing:
    raise UserError(
      f'A {config.family} checkpoint cannot express '
      f'{", ".join(differing)} of this ModelConfig; choose another family.'
    )
  return raw


def differences(config: ModelConfig, raw: dict) -> list[str]:
  """Lists fields, besides RUN_FIELDS, in which `config` and `raw` differ."""
  run = {name: getattr(config, name) for name in RUN_FIELDS}
  other = read_config(raw, **run)
  return [
    field.name
    for field in dataclasses.fields(ModelConfig)
    if getattr(config, field.name) != getattr(other, field.name)
  ]


def _name_of_activation(config, preferred: str) -> str:
  return {'gelu_tanh': preferred}.get(config.activation, config.activation)


def _write_gpt2(config) -> dict:
  return dict(
    activation_function=_name_of_activation(config, 'gelu_new'),
    scale_attn_weights=config.query_scale != 1.0,
  )


def _write_rotary(config) -> dict:
  family, raw = config.family, {}
  activation = _name_of_activation(config, 'gelu_pytorch_tanh')
  if family != 'llama':
    raw['sliding_window'] = config.window
  if family in ('qwen2', 'qwen3'):
    raw['use_sliding_window'] = config.window is not None
  if family not in ('llama', 'mistral'):
    names = {True: 'sliding_attention', False: 'full_attention'}
    raw['layer_types'] = [names[sliding] for sliding in config.sliding]
  if family in ('llama', 'qwen3', 'gemma2', 'gemma3_text'):
    raw['attention_bias'] = config.output_bias
  if family == 'llama':
    raw['mlp_bias'] = config.mlp_bias
  if family in ('gemma2', 'gemma3_text'):
    raw |= dict(
      hidden_activation=activation,
      query_pre_attn_scalar=round(config.query_scale**-2),
      attn_logit_softcapping=config.attention_softcap,
      final_logit_softcapping=config.logit_softcap,
    )
  else:
    raw['hidden_act'] = activation
  rope = _write_rope(config.rope or Rope())
  if family == 'gemma3_text':
    local = _write_rope(config.local_rope or config.rope or Rope())
    rope = {'full_attention': rope, 'sliding_attention': local}
  raw['rope_parameters'] = rope
  return raw


def _write_rope(rope: Rope) -> dict:
  raw = dict(rope_theta=rope.theta, rope_type=rope.kind)
  if rope.kind == 'longrope':
    raise UserError(
      'longrope cannot be written without the folder the model came from; '
      'pass source.'
    )
  if rope.kind != 'default':
    raw['factor'] = rope.factor
  if rope.kind in ('llama3', 'yarn'):
    raw['original_max_position_embeddings'] = rope.original_length
  if rope.kind == 'llama3':
    raw['low_freq_factor'] = rope.low_frequency
    raw['high_freq_factor'] = rope.high_frequency
  elif rope.kind == 'yarn':
    raw |= dict(
      beta_fast=rope.beta_fast,
      beta_slow=rope.beta_slow,
      truncate=rope.truncate,
      attention_factor=rope.attention_factor,
    )
  return raw
