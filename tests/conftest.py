"""What every test shares: strict JAX settings and the optional real data."""

import pathlib

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_platforms', 'cpu')
# Compiling takes most of the time of models as small as the tests'.  What is
# measured as users run it asks for `optimized`.
jax.config.update('jax_disable_most_optimizations', True)

SHARED = pathlib.Path(__file__).parents[2] / 'shared'


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
