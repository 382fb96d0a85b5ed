"""The precision in which estimators are compared with their formulas."""

import jax
import pytest


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield
