"""Which module may import which, and that importing does nothing else."""

import ast
import json
import pathlib
import subprocess
import sys

import foreign_code
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('jaxrl_llm', 'experiments')


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {
  module_name(path): path
  for package in PACKAGES
  for path in sorted((ROOT / package).rglob('*.py'))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(name):
  """Modules that `name` imports, anywhere in the file."""
  found = set()
  for node in ast.walk(TREES[name]):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{name}: relative import'
      for alias in node.names:
        member = f'{node.module}.{alias.name}'
        found.add(member if member in FILES else node.module)
  return found


GRAPH = {name: imports(name) for name in FILES}


def within(name, *packages):
  return any(name == p or name.startswith(p + '.') for p in packages)


def own(name):
  """The project's modules that `name` imports."""
  return {other for other in GRAPH[name] if within(other, *PACKAGES)}


def test_the_walk_sees_the_package():
  assert 'jaxrl_llm.estimators' in GRAPH['jaxrl_llm.training.online']
  assert 'jaxrl_llm.sampling.policy' in GRAPH['jaxrl_llm.sampling.sampler']
  assert 'jax.numpy' in GRAPH['jaxrl_llm.estimators.weights']
  assert len(FILES) > 40


# A room imports from the layers above it in this list, and within its own layer
# only where it stands alone.
LAYERS = [
  'errors',
  'estimators sharding processes signals atomic minibatches compilation '
  'naming tasks',
  'models',
  'sampling rewards',
  'rollouts',
  'training',
  'evaluation audit',
]
LEVEL = {room: i for i, rooms in enumerate(LAYERS) for room in rooms.split()}
BESIDE = {('signals', 'processes')}
CORE = ('estimators', 'models', 'sampling', 'rollouts', 'training')


def room(name):
  return name.split('.')[1] if '.' in name else ''


@pytest.mark.parametrize('name', [n for n in FILES if within(n, 'jaxrl_llm')])
def test_arrows(name):
  here = room(name)
  if not here:
    return
  for there in {room(other) for other in own(name)} - {here}:
    if here == 'runs':
      assert there in ('errors', 'processes', 'sharding', 'atomic'), there
    else:
      lower = LEVEL[there] < LEVEL[here]
      assert lower or (here, there) in BESIDE, f'{name} imports {there}'


@pytest.mark.parametrize('name', [n for n in FILES if room(n) in CORE])
def test_the_core_needs_five_packages(name):
  if within(name, 'jaxrl_llm.models.huggingface'):
    return
  known = {*sys.stdlib_module_names, *PACKAGES}
  known |= {'jax', 'jaxlib', 'flax', 'optax', 'chex', 'numpy'}
  if room(name) == 'estimators':
    known -= {'flax', 'optax'}
  assert {other.split('.')[0] for other in GRAPH[name]} <= known


def executed(name):
  """Modules whose code an import by `name` runs: packages come along."""
  modules = own(name)
  for other in own(name):
    parts = other.split('.')
    around = {'.'.join(parts[:i]) for i in range(1, len(parts))}
    modules |= {package for package in around if not within(name, package)}
  return modules


def test_no_cycles():
  """Not even through the names that a package re-exports."""
  done, path = set(), []

  def visit(name):
    assert name not in path, ' → '.join([*path[path.index(name) :], name])
    if name in done:
      return
    path.append(name)
    for other in executed(name):
      visit(other if other in FILES else other.rpartition('.')[0])
    done.add(path.pop())

  for name in FILES:
    visit(name)


@pytest.mark.parametrize('name', FILES)
def test_what_a_package_exports_is_for_others(name):
  """Its own modules import the one that defines a name."""
  around = {other for other in own(name) if within(name, other)}
  assert not around, f'{name} imports from {around}'


# Programs that a model has written are run by these alone, in interpreters of
# their own, where they import each other by their last names.
SANDBOXED = tuple(
  f'jaxrl_llm.rewards.sandbox_{name}'
  for name in ('child', 'harness', 'values', 'landlock')
)


def test_foreign_code_runs_in_a_process_of_its_own():
  for name in FILES:
    assert not own(name) & set(SANDBOXED), name
  for name in SANDBOXED:
    beside = {other.rpartition('.')[2] for other in SANDBOXED}
    assert GRAPH[name] <= {*sys.stdlib_module_names, *beside}, GRAPH[name]
  harness = TREES[SANDBOXED[1]]
  calls = [node for node in ast.walk(harness) if isinstance(node, ast.Call)]
  names = [getattr(node.func, 'id', None) for node in calls]
  assert 'exec' in names and 'eval' not in names


# Files beside the packages, by path.
SCRIPTS = {
  str(path.relative_to(ROOT)): path
  for folder in ('benchmarks', 'docs')
  for path in sorted((ROOT / folder).rglob('*.py'))
}
# What a file may use all the same, and why.
ALLOWED = {
  # Functions of the user's, by the name that the user gives.
  'jaxrl_llm.naming': {
    *('importlib.util.spec_from_file_location', 'exec_module'),
    'importlib.import_module',
  },
  # Names of a table of its own.
  'jaxrl_llm.rewards': {'importlib.import_module'},
  # Run within the sandbox.
  SANDBOXED[1]: {'exec', 'compile', '__import__', 'builtins'},
  SANDBOXED[2]: {'__import__', 'builtins'},
  # Measures another system, which computes with it.
  'benchmarks/peers/transformers_generate.py': {'torch'},
}


@pytest.mark.parametrize('name', [*FILES, *SCRIPTS])
def test_nothing_that_runs_foreign_code(name):
  tree = TREES.get(name) or ast.parse(SCRIPTS[name].read_text())
  found = foreign_code.find(tree)
  # As many as are needed: what is no longer used is no longer allowed.
  assert {what for _, what in found} == ALLOWED.get(name, set()), found


FOREIGN = {
  'import pickle': 'pickle',
  'def f():\n  from shelve import open': 'shelve',
  'import torch.nn as nn': 'torch',
  'import marshal, json': 'marshal',
  'from multiprocessing import Pool': 'multiprocessing',
  'import builtins': 'builtins',
  'eval("1")': 'eval',
  'run = exec': 'exec',
  'list(map(eval, texts))': 'eval',
  'compile(text, "f", "exec")': 'compile',
  '__import__(name)': '__import__',
  '__builtins__["eval"]': '__builtins__',
  'import os\nos.system(text)': 'os.system',
  'from os import popen': 'os.popen',
  'import os as o\no.execvp(name, [])': 'os.execvp',
  'import subprocess\nsubprocess.run(text, shell=True)': 'shell',
  'import subprocess\nsubprocess.run(text, shell=flag)': 'shell',
  'import subprocess\nsubprocess.getoutput(text)': 'subprocess.getoutput',
  'import importlib\nimportlib.import_module(name)': (
    'importlib.import_module'
  ),
  'from importlib import import_module as load\nload(f"a.{b}")': (
    'importlib.import_module'
  ),
  'spec.loader.exec_module(module)': 'exec_module',
  'import yaml\nyaml.load(text, yaml.Loader)': 'yaml.load',
  'import yaml\nyaml.unsafe_load(text)': 'yaml.unsafe_load',
  'import pandas as pd\npd.read_pickle(path)': 'pandas.read_pickle',
  'from pandas import read_hdf': 'pandas.read_hdf',
  'import numpy as np\nnp.load(path)': 'numpy.load',
  'import numpy as np\nnp.load(path, allow_pickle=True)': 'allow_pickle',
  'from numpy import load\nload(path)': 'numpy.load',
  'AutoModel.from_pretrained(path, trust_remote_code=True)': (
    'trust_remote_code'
  ),
  'f(**{}, trust_remote_code=given)': 'trust_remote_code',
  'import jinja2\njinja2.Template(text)': 'jinja2.Template',
  'from sympy import parse_expr': 'sympy.parse_expr',
}
HARMLESS = """
import ast, importlib, importlib.metadata, json, os, re, subprocess
import numpy as np
import yaml
re.compile('a'), model.eval(), program.compile(), jax.eval_shape(f)
np.load(path, allow_pickle=False), json.load(file), ast.literal_eval('1')
importlib.import_module('json'), importlib.metadata.version('jax')
subprocess.run(['ls'], shell=False), yaml.safe_load(text)
AutoTokenizer.from_pretrained(path, trust_remote_code=False)
executor.exec, 'eval("1")'
"""


@pytest.mark.parametrize('code', FOREIGN)
def test_what_runs_foreign_code_is_found(code):
  line = code.count('\n') + 1
  assert (line, FOREIGN[code]) in foreign_code.find(ast.parse(code))


def test_what_runs_no_foreign_code_is_not_found():
  assert foreign_code.find(ast.parse(HARMLESS)) == []


def run(code):
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def test_import_is_quick():
  code = (
    'import time; start = time.perf_counter(); import jaxrl_llm; '
    'print(time.perf_counter() - start)'
  )
  assert min(run(code) for _ in range(3)) < 1.5


def test_importing_starts_no_device_and_asks_no_network():
  """All modules of the library at once, watched by an audit hook."""
  names = [n for n in FILES if within(n, 'jaxrl_llm') and n not in SANDBOXED]
  code = f"""
import importlib, json, sys
calls = []
events = ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname')
watch = lambda event, args: event in events and calls.append(event)
sys.addaudithook(watch)
for name in {names!r}:
  importlib.import_module(name)
from jax._src import xla_bridge
print(json.dumps(dict(
  calls=calls,
  backends=xla_bridge.backends_are_initialized(),
  torch='torch' in sys.modules,
)))
"""
  assert run(code) == {'calls': [], 'backends': False, 'torch': False}


def test_worker_processes_start_without_jax():
  """Although they can name rewards that a model gives."""
  code = """
import json, sys
from jaxrl_llm.rewards import worker
heavy = ['jax', 'numpy', 'transformers', 'safetensors']
print(json.dumps(dict(
  known='jaxrl_llm.rewards.learned' in sys.modules,
  loaded=[name for name in heavy if name in sys.modules],
)))
"""
  assert run(code) == {'known': True, 'loaded': []}


def test_estimators_need_jax_and_chex_alone():
  """The other dependencies cannot be imported, and nobody notices."""
  others = ['flax', 'optax', 'orbax', 'transformers', 'ml_collections']
  others += ['safetensors', 'tokenizers', 'torch', 'matplotlib', 'rich']
  code = f"""
import json, sys
class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in {others!r}:
      raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from jaxrl_llm import estimators as est
toy = est.enumeration.toy(max_length=2)
report = est.enumeration.examine(est.rloo(), toy)
print(json.dumps(dict(
  bias=report.bias < 1e-10,
  loaded=[name for name in {others!r} if name in sys.modules],
)))
"""
  assert run(code) == {'bias': True, 'loaded': []}
