"""Tiny random models of every family, as `transformers` builds them."""

import contextlib

import numpy as np

VOCABULARY = 37
ROTARY = dict(
  vocab_size=VOCABULARY,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=12,
  max_position_embeddings=64,
  tie_word_embeddings=False,
  pad_token_id=None,
)
_SLIDING = ['sliding_attention', 'full_attention', 'sliding_attention']


def rope(kind, theta=100.0, **fields):
  """`rope_parameters` in the spelling of transformers 5."""
  return dict(rope_type=kind, rope_theta=theta, **fields)


_HALF_AGAIN = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
CASES = {
  'llama': dict(
    model_type='llama',
    attention_bias=True,
    mlp_bias=True,
    rope_parameters=rope(
      'llama3',
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=32,
    ),
  ),
  'llama_linear': dict(
    model_type='llama',
    tie_word_embeddings=True,
    rope_scaling=dict(type='linear', factor=4.0),
    rope_theta=100.0,
  ),
  'llama_yarn': dict(
    model_type='llama',
    rope_parameters=rope(
      'yarn', factor=4.0, original_max_position_embeddings=16
    ),
  ),
  'llama_yarn_exact': dict(
    model_type='llama',
    rope_parameters=rope(
      'yarn',
      factor=4.0,
      original_max_position_embeddings=16,
      truncate=False,
      beta_fast=4.0,
      beta_slow=0.5,
      mscale=0.7,
      mscale_all_dim=1.3,
    ),
  ),
  'llama_longrope': dict(
    model_type='llama',
    rope_parameters=rope(
      'longrope',
      factor=4.0,
      original_max_position_embeddings=64,
      short_factor=_HALF_AGAIN,
      long_factor=_HALF_AGAIN[::-1],
    ),
  ),
  'mistral': dict(model_type='mistral', sliding_window=5),
  'qwen2': dict(
    model_type='qwen2',
    use_sliding_window=True,
    sliding_window=5,
    max_window_layers=1,
  ),
  'qwen3': dict(model_type='qwen3', tie_word_embeddings=True),
  'gemma2': dict(
    model_type='gemma2',
    tie_word_embeddings=True,
    query_pre_attn_scalar=20,
    sliding_window=5,
    layer_types=_SLIDING,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=3.0,
  ),
  'gemma3_text': dict(
    model_type='gemma3_text',
    tie_word_embeddings=True,
    query_pre_attn_scalar=20,
    sliding_window=5,
    layer_types=_SLIDING,
    final_logit_softcapping=3.0,
    rope_parameters=dict(
      full_attention=rope('linear', 1000.0, factor=8.0),
      sliding_attention=rope('default', 10.0),
    ),
  ),
  'gpt2': dict(
    model_type='gpt2',
    vocab_size=VOCABULARY,
    n_embd=32,
    n_layer=3,
    n_head=4,
    n_positions=64,
  ),
  'gpt2_unscaled': dict(
    model_type='gpt2',
    vocab_size=VOCABULARY,
    n_embd=32,
    n_layer=2,
    n_head=2,
    n_inner=40,
    n_positions=64,
    scale_attn_weights=False,
    tie_word_embeddings=False,
  ),
}
# One of each structure: what the ways of using the cache are tried on.
STRUCTURES = ('llama', 'qwen2', 'qwen3', 'gemma3_text', 'gpt2')


def build(name, folder=None, **fields):
  """The torch model of a case: no parameter keeps its initial value.

  Args:
    name: of the case.
    folder: where it is saved, if anywhere.
    fields: further ones of its configuration; with `num_labels` it has a head
      of scores in place of one of tokens.
  """
  import torch
  import transformers

  fields = {**CASES[name], **fields}
  family = fields.pop('model_type')
  if family != 'gpt2':
    fields = {**ROTARY, **fields}
  make = transformers.AutoModelForCausalLM
  if 'num_labels' in fields:
    make = transformers.AutoModelForSequenceClassification
  with quiet():
    config = transformers.CONFIG_MAPPING[family].from_dict(fields)
    model = make.from_config(
      config, attn_implementation='eager', dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
      for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(scale * noise)
    if folder is not None:
      model.save_pretrained(folder)
  return model


def reopen(folder, head='CausalLM'):
  """The torch model of a folder, opened without one complaint."""
  import transformers

  opened = getattr(transformers, f'AutoModelFor{head}')
  model, report = opened.from_pretrained(
    folder, output_loading_info=True, attn_implementation='eager'
  )
  assert not any(report.values()), report
  return model.eval()


def torch_logits(model, tokens):
  """Logits [B, T, V] of the oracle, as NumPy."""
  import torch

  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens)).long()).logits.numpy()


@contextlib.contextmanager
def quiet():
  """Hides the warnings of `transformers` about unusual tiny configurations."""
  import transformers

  level = transformers.logging.get_verbosity()
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  yield
  transformers.logging.set_verbosity(level)
