"""Shapes of published models against their published sizes."""

import jax
import pytest

from experiments.planning import shapes
from jaxrl_llm.models import transformer
from jaxrl_llm.models.huggingface import families

# From the models' own pages; Gemma 3 without the vision tower.
PARAMETERS = {
  'qwen2.5-0.5b': 494_032_768,
  'qwen2.5-1.5b': 1_543_714_304,
  'qwen2.5-7b': 7_615_616_512,
  'llama3-8b': 8_030_261_248,
  'llama3-70b': 70_553_706_496,
  'gemma3-4b': 3_880_263_168,
  'gemma3-27b': 27_009_346_304,
}


@pytest.mark.parametrize('name', shapes.SHAPES)
def test_number_of_parameters(name):
  config = shapes.named(name)
  params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]


def test_gemma_as_transformers_builds_it():
  """The order of layers, windows and norms that are its defaults there."""
  from transformers import Gemma3TextConfig

  config = shapes.named('gemma3-27b')
  theirs = Gemma3TextConfig(
    hidden_size=config.hidden_size,
    intermediate_size=config.intermediate_size,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    query_pre_attn_scalar=round(config.query_scale**-2),
    sliding_window=1024,
    rope_scaling=dict(rope_type='linear', factor=8.0),
  )
  assert families.read_config(theirs.to_dict()) == config
