"""What every test shares: strict JAX settings and the optional real data."""

import gc
import os
import pathlib
import shutil
import signal
import tempfile
import uuid

import jax
import pytest
import scripts

from jaxrl_llm import compilation
from jaxrl_llm.rewards import Workers, containment

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_platforms', 'cpu')
# Compiling takes most of the time of models as small as the tests'.  What is
# measured as users run it asks for `optimized`.
jax.config.update('jax_disable_most_optimizations', True)
# XLA reads it when the first program is compiled.  Small programs in one piece
# instead of up to 32 take three quarters of the time, and without optimisation
# the older emitters of fused loops, which jax 0.12 lacks, a quarter of that.
_XLA = ['--xla_cpu_parallel_codegen_split_count=1']
if jax.__version_info__ < (0, 11):
  _XLA.append('--xla_cpu_use_fusion_emitters=false')
  compilation.quiet_loader()
  # Of processes that are started, some use no cache of the user's.
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_XLA])

# As scripts do: tests trace even more programs.
gc.set_threshold(50_000, 10, 10)

SHARED = pathlib.Path(__file__).parents[2] / 'shared'


def pytest_configure(config):
  """Makes the session's folder, unless this is a worker, which inherits it.

  What a worker's tests compile, in their processes too, is compiled once.
  """
  if not hasattr(config, 'workerinput'):
    folder = tempfile.TemporaryDirectory(prefix='jaxrl_llm_tests_')
    config.add_cleanup(folder.cleanup)
    os.environ[scripts.FOLDER] = folder.name
  # Processes that are started inherit the variables; JAX has read its own.
  settings = {
    'jax_compilation_cache_dir': str(scripts.cache()),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  for name, value in settings.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture
def optimized():
  """Programs as XLA compiles them by default."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session')
def shared():
  """Folder of real checkpoints and data sets beside the repository."""
  if not SHARED.is_dir():
    pytest.skip('needs the folder ../shared with real checkpoints and data')
  return SHARED


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
  """The file of the tiny run's configuration."""
  return scripts.write_config(tmp_path_factory.mktemp('config'))


@pytest.fixture
def workdir(tmp_path):
  """A copy of the tiny run, in which all may be changed."""
  return shutil.copytree(scripts.undisturbed(), tmp_path / 'run')


@pytest.fixture
def marked(monkeypatch):
  """Gives the numbers of the processes that come of this test and still run.

  Those that are left at its end are killed.
  """
  if not pathlib.Path('/proc/self/environ').exists():
    pytest.skip('finds processes by their environment in /proc')
  # A name that reward workers keep.
  mark = f'JAX_TESTS_MARK={uuid.uuid4()}'
  monkeypatch.setenv(*mark.split('='))

  def find() -> list[int]:
    found = []
    for entry in pathlib.Path('/proc').iterdir():
      try:
        if mark.encode() in (entry / 'environ').read_bytes().split(b'\0'):
          found.append(int(entry.name))
      except (OSError, ValueError):
        pass  # It has ended, or is no process.
    return found

  yield find
  for pid in find():
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope='session')
def allowed_kinds():
  """Kinds of containment that work here."""
  with Workers('exact_match', workers=1) as workers:
    strongest = containment.KINDS.index(workers.containment)
  return containment.KINDS[strongest:]
