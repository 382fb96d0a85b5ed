"""Hugging Face folders are data: what is damaged or hostile runs nothing."""

import json
import os
import pickle
import shutil

import jax
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import folders, reading
from jaxrl_llm.tasks import vocabulary

CONFIG = ModelConfig(
  vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2
)
NAME = 'model.norm.weight'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder as it should be, with a tokenizer."""
  path = tmp_path_factory.mktemp('saved') / 'model'
  params = transformer.init(CONFIG, jax.random.key(0))
  tokenizer = vocabulary.character_tokenizer('abcdef')
  folders.save(path, CONFIG, params, tokenizer)
  return path


@pytest.fixture
def folder(saved, tmp_path):
  """A copy to spoil."""
  return shutil.copytree(saved, tmp_path / 'model')


def refused(call, *arguments) -> str:
  with pytest.raises(UserError) as caught:
    call(*arguments)
  message = str(caught.value)
  assert len(message.splitlines()) <= 3, message
  assert len(message) < 1500
  return message


def parts(path):
  """(header, data) of a safetensors file."""
  content = path.read_bytes()
  size = int.from_bytes(content[:8], 'little')
  return json.loads(content[8 : 8 + size]), content[8 + size :]


def file_of(header, data, size=None) -> bytes:
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  size = len(header) if size is None else size
  return size.to_bytes(8, 'little') + header + data


def with_entry(**changes):
  """A file with one tensor's entry changed."""
  return lambda header, data: file_of(
    {**header, NAME: {**header[NAME], **changes}}, data
  )


def whole(header):
  return json.dumps(header).encode()


DAMAGED = {
  'empty': lambda header, data: b'',
  'three bytes': lambda header, data: b'\x01\x02\x03',
  'no header': lambda header, data: file_of(b'', data),
  'huge header': lambda header, data: file_of(header, data, 2**63),
  'header of all': lambda header, data: file_of(header, data, 2**64 - 1),
  'header of 90 MB': lambda header, data: file_of(header, data, 90_000_000),
  'truncated header': lambda header, data: file_of(header, data)[:40],
  'truncated data': lambda header, data: file_of(header, data[:-4]),
  'more data': lambda header, data: file_of(header, data + b'0000'),
  'not UTF-8': lambda header, data: file_of(
    whole(header).replace(b'norm', b'n\xff\xfem', 1), data
  ),
  'not JSON': lambda header, data: file_of(whole(header)[:-1] + b',', data),
  'a list': lambda header, data: file_of(b'[1, 2]', data),
  'deep': lambda header, data: file_of(b'{"a":' + b'[' * 100_000, data),
  'overlapping': lambda header, data: file_of(
    header | {'twice': header[NAME]}, data
  ),
  'no offsets': lambda header, data: file_of(
    header | {NAME: {'dtype': 'F32', 'shape': [8]}}, data
  ),
  'reversed offsets': with_entry(data_offsets=[64, 32]),
  'offsets beyond': with_entry(data_offsets=[2**40, 2**40 + 32]),
  'negative offsets': with_entry(data_offsets=[-32, 0]),
  'negative shape': with_entry(shape=[-8]),
  'overflowing shape': with_entry(shape=[2**62, 2**62]),
  'another shape': with_entry(shape=[2, 4]),
  'fractional shape': with_entry(shape=[8.5]),
  'unknown dtype': with_entry(dtype='F33'),
  'integers': with_entry(dtype='I32'),
  'wider dtype': with_entry(dtype='F64'),
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_damaged_safetensors_are_refused(kind, folder):
  path = folder / reading.SINGLE
  path.write_bytes(DAMAGED[kind](*parts(path)))
  message = refused(folders.load, folder)
  assert str(folder) in message and '\x1b' not in message


def test_the_undamaged_file_is_read(folder):
  """What the cases above change is not wrong before."""
  path = folder / reading.SINGLE
  path.write_bytes(file_of(*parts(path)))
  _, params = folders.load(folder)
  np.testing.assert_array_equal(params['norm']['scale'], np.ones(8))


def test_a_name_with_line_ends_is_shown_in_one(folder):
  path = folder / reading.SINGLE
  header, data = parts(path)
  size = len(data)
  entry = {'dtype': 'F32', 'shape': [1], 'data_offsets': [size, size + 4]}
  header |= {'a\nb\nc\nd\x1b[31m' + 'x' * 5000: entry}
  path.write_bytes(file_of(header, data + b'0000'))
  message = refused(folders.load, folder)
  assert 'a\\nb\\nc\\nd' in message and '\x1b' not in message


@pytest.mark.parametrize(
  'index',
  [
    *('[]', '5', '"text"', 'null', '{', '{}', '\ud800', '[' * 100_000),
    *('{"weight_map": 5}', '{"weight_map": ["ab", "cd"]}'),
    *(
      json.dumps({'weight_map': {NAME: file}})
      for file in ['../x', '/etc/passwd', 'a/b', 'a\\b', '..', '.', '', 'a\0b']
      + [5, None, ['x'], {}, 'x' * 5000, 'a\nb\nc\nd']
    ),
  ],
)
def test_a_hostile_index_is_refused(index, folder):
  (folder / reading.SINGLE).unlink()
  path = folder / reading.INDEX
  path.write_text(index, encoding='utf-8', errors='surrogatepass')
  refused(folders.load, folder)


def test_a_link_out_of_the_folder_is_read_as_data(folder, tmp_path):
  """The hub's cache is made of links; what they lead to is only parsed."""
  expected = folders.load(folder)[1]
  path = folder / reading.SINGLE
  path.rename(tmp_path / 'blob')
  path.symlink_to(tmp_path / 'blob')
  jax.tree.map(np.testing.assert_array_equal, folders.load(folder)[1], expected)
  secret = tmp_path / 'secret'
  secret.write_text('root:hunter2:0:0\n' * 10)
  path.unlink()
  path.symlink_to(secret)
  assert 'hunter2' not in refused(folders.load, folder)
  for other in (folders.CONFIG, 'tokenizer.json'):
    (folder / other).unlink()
    (folder / other).symlink_to(secret)
  assert 'hunter2' not in refused(folders.load_config, folder)
  assert 'hunter2' not in refused(folders.load_tokenizer, folder)
  path.unlink()
  path.symlink_to(path)  # of itself
  refused(folders.load, folder)


# Leaves a file if it is imported, unpickled or run.
EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
class Config: pass
class Model: pass
class Tokenizer: pass
"""


class Payload:
  """Unpickles to the creation of a file."""

  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return os.mkdir, (str(self.marker),)


def plant(folder, marker):
  """Code in every place where some tool would run it."""
  (folder / 'evil.py').write_text(EVIL.format(marker=str(marker)))
  config = json.loads((folder / 'config.json').read_text())
  config['auto_map'] = {
    'AutoConfig': 'evil.Config',
    'AutoModelForCausalLM': 'evil.Model',
  }
  (folder / 'config.json').write_text(json.dumps(config))
  path = folder / 'tokenizer_config.json'
  settings = json.loads(path.read_text())
  settings['auto_map'] = {'AutoTokenizer': ['evil.Tokenizer', 'evil.Tokenizer']}
  path.write_text(json.dumps(settings))
  for name in ('pytorch_model.bin', 'training_args.bin', 'optimizer.pt'):
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))


@pytest.mark.parametrize('known', [True, False])
def test_code_in_a_folder_does_not_run(known, folder, tmp_path, monkeypatch):
  """With a tokenizer class that transformers has, and with one of its own."""
  marker, expected = tmp_path / 'marker', folders.load(folder)[1]
  plant(folder, marker)
  monkeypatch.chdir(folder)  # Where `import evil` would find it.
  config, params = folders.load(folder)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert config == CONFIG
  if known:
    assert folders.load_tokenizer(folder)('ab').input_ids == [3, 4]
  else:
    path = folder / 'tokenizer_config.json'
    settings = json.loads(path.read_text())
    settings['tokenizer_class'] = 'Tokenizer'
    path.write_text(json.dumps(settings))
    assert 'no usable tokenizer' in refused(folders.load_tokenizer, folder)
  folders.save(tmp_path / 'copy', config, params, source=folder)
  assert not list((tmp_path / 'copy').glob('*.py'))
  (folder / reading.SINGLE).unlink()
  assert 'pickled' in refused(folders.load, folder)
  assert not marker.exists()
  # The markers do work.
  with pytest.raises(FileExistsError):
    marker.mkdir()
    pickle.loads((folder / 'optimizer.pt').read_bytes())


@pytest.mark.parametrize(
  'change',
  [
    *({'model_type': value} for value in (None, [], {}, 5, 'evil', 'x' * 5000)),
    *({'num_attention_heads': value} for value in (0, -1, '2', None, 2.5, [])),
    *({'hidden_size': value} for value in (0, -8, 'a', None, 10**30)),
    *({'num_hidden_layers': value} for value in (0, -1, '1', None)),
    *({'rope_parameters': value} for value in ('x', [], {'rope_type': 'evil'})),
    *(
      {'rope_parameters': {'rope_type': 'yarn', 'factor': v}} for v in (0, 'x')
    ),
    *({'hidden_act': value} for value in ('evil', None, [], 5)),
    *({'head_dim': value} for value in (0, -4, 'a', 3)),
    *({'layer_types': value} for value in ('x', [5], ['full_attention'] * 3)),
    {'vocab_size': 0},
    {'max_position_embeddings': 'many'},
    {'rms_norm_eps': 'small'},
    {'quantization_config': {'quant_method': 'evil'}},
  ],
)
def test_a_wrong_config_is_refused(change, folder):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  refused(folders.load, folder)


@pytest.mark.parametrize(
  'text', ['', '[]', '5', 'null', '{', '\udcff', '[' * 100_000, '1' * 5000]
)
@pytest.mark.parametrize(
  'name', ['config.json', 'tokenizer.json', 'tokenizer_config.json']
)
def test_files_that_are_no_json_object_are_refused(name, text, folder):
  (folder / name).write_text(text, errors='surrogateescape')
  call = folders.load_config if name[0] == 'c' else folders.load_tokenizer
  refused(call, folder)


@pytest.mark.parametrize('ids', ['1', {}, [None, 'a'], 1.5, True, [[1]]])
def test_special_ids_that_are_none_are_refused(ids, folder):
  for key, call in (
    ('eos_token_id', folders.eos_token_ids),
    ('pad_token_id', folders.pad_token_id),
  ):
    path = folder / 'config.json'
    (folder / folders.GENERATION).unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: ids}))
    assert key in refused(call, folder)
