"""Programs that one process has compiled and the next one finds."""

import json
import os
import pathlib
import subprocess
import sys
import zlib

import jax
import pytest

from jaxrl_llm import compilation

PROGRAM = """
import json
import jax
from jaxrl_llm import compilation

found = {'hits': 0, 'misses': 0, 'told': compilation.use()}

def listen(event, **kwargs):
  name = event.removeprefix('/jax/compilation_cache/cache_')
  if name in found:
    found[name] += 1

jax.monitoring.register_event_listener(listen)
x = jax.random.normal(jax.random.key(0), (37, 19))
y = jax.jit(lambda x: jax.nn.softmax(x @ x.T).sum(axis=0) + x[:, 0])(x)
print(json.dumps(dict(found, bits=jax.device_get(y).tobytes().hex())))
"""


def start(home, **variables):
  ours = 'JAX_', 'TF_CPP_'
  taken = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
  return subprocess.Popen(
    [sys.executable, '-c', PROGRAM],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=taken
    | {'XDG_CACHE_HOME': str(home), 'JAX_PLATFORMS': 'cpu'}
    | variables,
  )


def ended(process):
  out, err = process.communicate()
  assert process.returncode == 0
  assert err == b'', 'such as jaxlib 0.10 logs for each program that it reads'
  return json.loads(out)


def programs(folder):
  return sorted(pathlib.Path(folder).rglob('*-cache'))


def test_the_next_process_compiles_nothing(tmp_path):
  # Two at a time write the same programs.
  first = [ended(each) for each in [start(tmp_path), start(tmp_path)]]
  written = {path: path.read_bytes() for path in programs(tmp_path)}
  assert all(found['told'] is None for found in first)
  assert len(written) > 2, 'small programs are to be kept, too'
  (folder,) = {path.parent for path in written}
  assert folder.stat().st_mode & 0o777 == 0o700
  found = ended(start(tmp_path))
  assert found['hits'] == len(written) and found['misses'] == 0
  assert {path: path.read_bytes() for path in programs(tmp_path)} == written
  assert len({each['bits'] for each in [*first, found]}) == 1


def test_users_choices_hold(tmp_path):
  own, home = tmp_path / 'own', tmp_path / 'home'
  off = start(home, JAX_COMPILATION_CACHE_DIR='')
  elsewhere = start(home, JAX_COMPILATION_CACHE_DIR=str(own))
  off, elsewhere = ended(off), ended(elsewhere)
  assert not home.exists()
  assert off['hits'] == off['misses'] == 0 and off['told'] is None
  assert len(programs(own)) == elsewhere['misses'] > 2


@pytest.fixture
def unset():
  """A JAX whose user has chosen no folder."""
  names = ['compilation_cache_dir', 'compilation_cache_max_size']
  names += ['enable_compilation_cache']
  names += ['persistent_cache_min_compile_time_secs']
  names += ['persistent_cache_min_entry_size_bytes']
  before = {f'jax_{n}': getattr(jax.config, f'jax_{n}') for n in names}
  jax.config.update('jax_compilation_cache_dir', None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize('why', ['a file is there', 'others may write'])
def test_a_folder_that_cannot_be_used_is_told(
  why, monkeypatch, tmp_path, unset
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  folder = compilation.default_folder()
  folder.parent.mkdir(parents=True)
  if why == 'others may write':
    folder.mkdir()
    folder.chmod(0o777)
  else:
    folder.touch()
  told = compilation.use()
  assert told.startswith('no compilation cache') and str(folder) in told
  assert '\n' not in told
  assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize(
  'name', ['enable_compilation_cache', 'compilation_cache_max_size']
)
def test_switches(name, monkeypatch, tmp_path, unset):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  jax.config.update(f'jax_{name}', 0)
  assert compilation.use() is None
  assert jax.config.jax_compilation_cache_dir is None
  assert not list(tmp_path.iterdir())


def test_without_a_home(monkeypatch, unset):
  monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  told = compilation.use()
  assert told.endswith('the home folder is not known')


def test_several_processes_leave_it(monkeypatch, tmp_path, unset):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert compilation.use() is None
  folder = str(compilation.default_folder())
  assert jax.config.jax_compilation_cache_dir == folder
  compilation.leave()
  assert jax.config.jax_compilation_cache_dir is None
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'own'))
  compilation.leave()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'own')


def test_folder_of_the_user(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  first = compilation.default_folder()
  assert first.is_relative_to(tmp_path / 'jaxrl_llm')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  second = compilation.default_folder()
  assert second.is_relative_to(tmp_path / 'home' / '.cache' / 'jaxrl_llm')
  assert first.name == second.name, 'the machine is the same'


def entry(folder, name, content, used):
  path = folder / f'{name}-cache'
  path.write_bytes(content)
  os.utime(path, (used, used))
  return path


def test_programs_cut_short_go(tmp_path):
  content = zlib.compress(os.urandom(2000))
  whole = entry(tmp_path, 'whole', content, 1000)
  for i, cut in enumerate([content[:-1], content[:100], b'']):
    entry(tmp_path, f'cut{i}', cut, 1000)
  compilation.tidy(tmp_path, 1 << 20)
  assert programs(tmp_path) == [whole]
  # Zstandard's frames, which JAX writes where it can, are left alone.
  other = entry(tmp_path, 'zstd', b'\x28\xb5\x2f\xfd' + content, 4e9)
  compilation.tidy(tmp_path, 1 << 20)
  assert programs(tmp_path) == [whole, other]
  # What was looked at before is not read again.
  old = entry(tmp_path, 'old', content[:-1], 1000)
  compilation.tidy(tmp_path, 1 << 20)
  assert old.exists()


def test_what_was_not_used_for_longest_goes_first(tmp_path):
  content = zlib.compress(os.urandom(1000))
  paths = [
    entry(tmp_path, f'{name}', content, used)
    for name, used in [('a', 3000), ('b', 1000), ('c', 2000), ('d', 4000)]
  ]
  other = tmp_path / 'xla_gpu_per_fusion_autotune_cache_dir'
  other.mkdir()
  compilation.tidy(tmp_path, 2 * len(content) + 1)
  assert programs(tmp_path) == [paths[0], paths[3]]
  assert other.exists()
  compilation.tidy(tmp_path, 0)
  assert not programs(tmp_path)
