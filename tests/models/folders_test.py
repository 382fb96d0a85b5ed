"""Folders in and out: round trips, transformers as oracle, damaged files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
from trees import assert_same

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import folders, reading, writing

FAMILIES = (
  'llama_yarn',
  'mistral',
  'qwen2',
  'qwen3',
  'gemma2',
  'gemma3_text',
  'gpt2',
  'gpt2_unscaled',
)
CONFIG = ModelConfig(
  vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2
)


@pytest.fixture(scope='module')
def params():
  return transformer.init(CONFIG, jax.random.key(0))


@pytest.fixture
def folder(tmp_path, params):
  folders.save(tmp_path / 'model', CONFIG, params)
  return tmp_path / 'model'


@pytest.mark.parametrize('name', FAMILIES)
def test_export_opens_in_transformers(name, tmp_path):
  """Logits of the exported folder equal the original's to the last bit."""
  pytest.importorskip('torch')
  tokens = np.arange(40).reshape(2, 20) % tiny_models.VOCABULARY
  with tiny_models.quiet():
    original = tiny_models.build(name, tmp_path / 'original')
    config, params = folders.load(tmp_path / 'original')
    folders.save(tmp_path / 'copy', config, params)
    copy = tiny_models.reopen(tmp_path / 'copy')
    again, params_again = folders.load(tmp_path / 'copy')
  np.testing.assert_array_equal(
    tiny_models.torch_logits(copy, tokens),
    tiny_models.torch_logits(original, tokens),
  )
  assert again == config
  assert_same(params, params_again)


def test_real_model_with_tokenizer(shared, tmp_path):
  torch = pytest.importorskip('torch')
  source = shared / 'models' / 'stories260k'
  config, params = folders.load(source, remat=True)
  tokenizer = folders.load_tokenizer(source)
  folders.save(tmp_path / 'copy', config, params, tokenizer, source)
  reference = np.load(source / 'reference_logits.npz')
  tokens = reference['ids_0']
  with tiny_models.quiet():
    model = tiny_models.reopen(tmp_path / 'copy')
    theirs = tiny_models.torch_logits(model, tokens[None])[0]
    start = torch.tensor(reference['prompt_ids_0']).long()[None]
    greedy = model.generate(start, max_length=len(tokens), do_sample=False)
  np.testing.assert_allclose(theirs, reference['logits_0'], rtol=0, atol=1e-4)
  np.testing.assert_array_equal(greedy[0].numpy(), tokens)
  copied = folders.load_tokenizer(tmp_path / 'copy')
  text = 'Once upon a time, Lily — aged 5 — said "hi".\n'
  assert copied(text).input_ids == tokenizer(text).input_ids
  assert copied.eos_token_id == tokenizer.eos_token_id
  for name in ('config.json', 'generation_config.json'):
    kept = json.loads((source / name).read_text())
    assert json.loads((tmp_path / 'copy' / name).read_text()) == kept


def test_bfloat16_round_trip(shared, tmp_path):
  """bfloat16 files stay bfloat16, or become float32 exactly."""
  source = shared / 'models' / 'arithmetic-sequence-init'
  config, params = folders.load(source, param_dtype='bfloat16')
  folders.save(tmp_path / 'copy', config, params, source=source)
  again, params_again = folders.load(tmp_path / 'copy', 'bfloat16')
  assert again == config
  assert_same(params, params_again)
  raw = json.loads((tmp_path / 'copy' / 'config.json').read_text())
  assert raw['dtype'] == 'bfloat16' and 'torch_dtype' not in raw
  assert (tmp_path / 'copy' / 'tokenizer.json').is_file()
  _, wide = folders.load(source)
  assert_same(jax.tree.map(lambda x: x.astype('bfloat16'), wide), params)


def test_shards(folder, params, monkeypatch, tmp_path):
  monkeypatch.setattr(writing, 'SHARD_BYTES', 1000)
  folders.save(tmp_path / 'shards', CONFIG, params)
  index = json.loads((tmp_path / 'shards' / reading.INDEX).read_text())
  files = set(index['weight_map'].values())
  assert len(files) > 2
  stored = 0
  for file in files:
    arrays = safetensors.numpy.load_file(tmp_path / 'shards' / file)
    assert sum(a.nbytes for a in arrays.values()) <= 1000
    assert {index['weight_map'][name] for name in arrays} == {file}
    stored += sum(array.nbytes for array in arrays.values())
  assert stored == index['metadata']['total_size']
  assert_same(folders.load(tmp_path / 'shards')[1], params)

  folders.save(tmp_path / 'shards', CONFIG, params)  # replaces
  lost = sorted((tmp_path / 'shards').glob('*.safetensors'))[1]
  lost.unlink()
  with pytest.raises(UserError, match=f'{lost.name} is missing'):
    folders.load(tmp_path / 'shards')


def edit(folder, change):
  """Applies `change` to the dictionary of stored tensors."""
  path = folder / reading.SINGLE
  arrays = safetensors.numpy.load_file(path)
  arrays = change(arrays) or arrays
  safetensors.numpy.save_file(arrays, path)


@pytest.mark.parametrize(
  'change, words',
  [
    (
      lambda a: {k: v for k, v in a.items() if '1.mlp.up' not in k},
      'lacks tensor model.layers.1.mlp.up_proj.weight',
    ),
    (
      lambda a: a.update({'model.layers.0.bonus': np.zeros(3)}),
      'has tensor model.layers.0.bonus',
    ),
    (
      lambda a: a.update({'model.norm.weight': np.zeros(9, np.float32)}),
      r'model.norm.weight.* F32 \[9\].*float tensor \[8\]',
    ),
    (
      lambda a: a.update({'model.norm.weight': np.zeros(8, np.int32)}),
      r'I32 \[8\]',
    ),
    (
      lambda a: a.update({'norm.weight': np.zeros(8, np.float32)}),
      "'norm.weight' twice",
    ),
  ],
)
def test_wrong_tensors_are_named(folder, change, words):
  edit(folder, change)
  with pytest.raises(UserError, match=words) as caught:
    folders.load(folder)
  assert len(str(caught.value).splitlines()) <= 3


def test_prefix_and_known_buffers_do_not_matter(folder, params):
  edit(
    folder,
    lambda arrays: {
      **{name.removeprefix('model.'): a for name, a in arrays.items()},
      'layers.0.self_attn.rotary_emb.inv_freq': np.zeros(2, np.float32),
    },
  )
  assert_same(folders.load(folder)[1], params)


def test_a_tied_head_in_the_file(folder, params):
  """Equal to the embedding it is superfluous; else somebody is wrong."""
  raw = json.loads((folder / 'config.json').read_text())
  raw['tie_word_embeddings'] = True
  (folder / 'config.json').write_text(json.dumps(raw))
  with pytest.raises(UserError, match='Pass tied=False'):
    folders.load(folder)
  untied, both = folders.load(folder, tied=False)
  assert_same(both, params)
  folders.save(folder.parent / 'untied', untied, both, source=folder)
  assert_same(folders.load(folder.parent / 'untied')[1], params)
  edit(
    folder, lambda a: {**a, 'lm_head.weight': a['model.embed_tokens.weight']}
  )
  assert 'head' not in folders.load(folder)[1]


def test_damaged_and_missing_files(folder, tmp_path):
  with pytest.raises(UserError, match='no model folder'):
    folders.load(tmp_path / 'nowhere')
  for name in ('x' * 5000, 'a\n\n\nb\x1b[31m'):
    with pytest.raises(UserError, match='no model folder') as caught:
      folders.load(name)
    said, remedy = str(caught.value).split('\n')
    assert said.isprintable() and len(said) < 350 and 'hub' in remedy
  path = folder / reading.SINGLE
  path.rename(folder / 'pytorch_model.bin')
  with pytest.raises(UserError, match='pickled.*\n.*save_pretrained'):
    folders.load(folder)
  (folder / 'config.json').unlink()
  with pytest.raises(UserError, match='config.json is missing'):
    folders.load(folder)
  with pytest.raises(UserError, match='no usable tokenizer'):
    folders.load_tokenizer(folder)


def test_nothing_else_is_overwritten(folder, params):
  (folder / 'notes.txt').write_text('mine')
  with pytest.raises(UserError, match='notes.txt'):
    folders.save(folder, CONFIG, params)
  assert (folder / 'notes.txt').read_text() == 'mine'
  assert_same(folders.load(folder)[1], params)
  assert [path.name for path in folder.parent.iterdir()] == ['model']


def test_save_checks_what_it_is_given(folder, params, tmp_path):
  fewer = {key: leaf for key, leaf in params.items() if key != 'head'}
  with pytest.raises(UserError, match='head/embedding is absent'):
    folders.save(tmp_path / 'other', CONFIG, fewer)
  wrong = {**params, 'norm': {'scale': jnp.zeros(9)}}
  with pytest.raises(UserError, match=r'norm/scale is \(9,\)'):
    folders.save(tmp_path / 'other', CONFIG, wrong)
  raw = json.loads((folder / 'config.json').read_text())
  raw['rms_norm_eps'] = 0.1
  (folder / 'config.json').write_text(json.dumps(raw))
  with pytest.raises(UserError, match='another model.*norm_epsilon'):
    folders.save(tmp_path / 'other', CONFIG, params, source=folder)
  assert not (tmp_path / 'other').exists()


def test_vocabulary(shared):
  config, _ = folders.load(shared / 'models' / 'gpt-nano-sort')
  tokenizer = folders.load_tokenizer(shared / 'models' / 'gpt2-tokenizer')
  with pytest.raises(UserError, match='ids up to 50256.* 3 rows'):
    folders.check_vocabulary(config, tokenizer)
  own = folders.load_tokenizer(shared / 'models' / 'gpt-nano-sort')
  folders.check_vocabulary(config, own)


def test_end_of_sequence_ids(shared, tmp_path):
  tokenizer = folders.load_tokenizer(shared / 'models' / 'stories260k')
  write = lambda name, ids: (tmp_path / name).write_text(
    json.dumps({'eos_token_id': ids})
  )
  assert folders.eos_token_ids() == ()
  assert folders.eos_token_ids(tokenizer=tokenizer) == (1,)
  write('config.json', 5)
  assert folders.eos_token_ids(tmp_path) == (5,)
  write('generation_config.json', [7, 1, 7])
  assert folders.eos_token_ids(tmp_path, tokenizer) == (7, 1)
  write('generation_config.json', None)
  assert folders.eos_token_ids(tmp_path, tokenizer) == (5, 1)


def test_export_from_scratch_states_the_special_tokens(
  shared, params, tmp_path
):
  name = 'arithmetic-sequence-init'
  tokenizer = folders.load_tokenizer(shared / 'models' / name)
  folders.save(tmp_path / 'new', CONFIG, params, tokenizer)
  raw = json.loads((tmp_path / 'new' / 'generation_config.json').read_text())
  assert raw == {'eos_token_id': 1, 'pad_token_id': 2}
  assert folders.load_tokenizer(tmp_path / 'new')('1S').input_ids
