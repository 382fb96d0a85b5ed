"""What every test shares: strict JAX settings and the optional real data."""

import pathlib

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_platforms', 'cpu')

SHARED = pathlib.Path(__file__).parents[2] / 'shared'


@pytest.fixture(scope='session')
def shared():
  """Folder of real checkpoints and data sets beside the repository."""
  if not SHARED.is_dir():
    pytest.skip('needs the folder ../shared with real checkpoints and data')
  return SHARED
