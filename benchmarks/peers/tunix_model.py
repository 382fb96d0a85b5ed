"""A Hugging Face folder of a Qwen3 model, as Tunix loads it."""

import json
import pathlib

import jax
import jax.numpy as jnp
from tunix.models.qwen3 import model as model_lib
from tunix.models.qwen3 import params as params_lib


def mesh() -> jax.sharding.Mesh:
  """Returns a mesh of one device, with the axes that Tunix names."""
  return jax.make_mesh(
    (1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


def load(folder: str):
  """Loads the model's configuration and the model, on `mesh`."""
  fields = json.loads(pathlib.Path(folder, 'config.json').read_text())
  dtype = jnp.dtype(fields['dtype'])
  config = model_lib.ModelConfig(
    num_layers=fields['num_hidden_layers'],
    vocab_size=fields['vocab_size'],
    embed_dim=fields['hidden_size'],
    hidden_dim=fields['intermediate_size'],
    num_heads=fields['num_attention_heads'],
    head_dim=fields['head_dim'],
    num_kv_heads=fields['num_key_value_heads'],
    rope_theta=1_000_000,
    norm_eps=fields['rms_norm_eps'],
    use_tied_embedding=True,
    dtype=dtype,
    param_dtype=dtype,
  )
  model = params_lib.create_model_from_safe_tensors(
    folder, config, mesh(), dtype=dtype
  )
  return config, model
