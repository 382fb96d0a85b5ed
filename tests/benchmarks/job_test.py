"""The benchmarks' model, tokenizer and prompts, as other libraries see them."""

import json

import pytest

from benchmarks import job
from jaxrl_llm.models.huggingface import folders


@pytest.mark.parametrize('size', [512, 32_000])
def test_prompts_have_their_length_in_every_tokenizer(size):
  tokenizer = job.tokenizer(size)
  assert len(tokenizer) == size
  assert sorted(tokenizer.get_vocab().values()) == list(range(size))
  texts = job.prompts(20, 64)
  assert len(set(texts)) == 20
  for text, ids in zip(texts, tokenizer(texts)['input_ids'], strict=True):
    assert len(ids) == 64
    assert tokenizer.decode(ids) == text


def test_the_folder_is_a_model_that_nothing_ends(tmp_path):
  shape = job.Shape(hidden=16, intermediate=24, layers=1, heads=2, kv_heads=1)
  folder = job.folder(shape, tmp_path)
  config, params = folders.load(folder)
  assert config == job.config(shape)
  assert params['embed']['embedding'].shape == (512, 16)
  tokenizer = folders.load_tokenizer(folder)
  (end,) = folders.eos_token_ids(folder, tokenizer)
  assert end == job.end_id(shape) >= config.vocab_size
  weights = (folder / 'model.safetensors').read_bytes()
  assert job.folder(shape, tmp_path) == folder
  assert (folder / 'model.safetensors').read_bytes() == weights
  fields = json.loads((folder / 'config.json').read_text())
  assert fields['architectures'] == ['Qwen3ForCausalLM']
