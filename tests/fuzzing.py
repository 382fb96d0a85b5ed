"""Properties of random inputs: few by default, thousands in the slow run."""

import inspect

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrl_llm.errors import UserError

# All of Unicode, halves of surrogate pairs among it, as JSON can hold.
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-(10**30), 10**30)
  | st.floats()
  | ANY_TEXT,
  lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4)
  ),
  max_leaves=8,
)


def fuzz(few: int, many: int, **strategies):
  """Makes a test of a property; the examples are the same in every run."""

  def decorate(function):
    taken = inspect.signature(function).parameters
    fixtures = [name for name in taken if name not in strategies]

    def test(count, **given_fixtures):
      def holds(**drawn):
        function(**given_fixtures, **drawn)

      settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
      )(given(**strategies)(holds))()

    # pytest and hypothesis read names and signatures.
    test.__name__, test.__doc__ = function.__name__, function.__doc__
    test.__module__ = function.__module__
    kind = inspect.Parameter.KEYWORD_ONLY
    test.__signature__ = inspect.Signature(
      [inspect.Parameter(name, kind) for name in ('count', *fixtures)]
    )
    slow = pytest.param(many, marks=pytest.mark.slow)
    return pytest.mark.parametrize('count', [few, slow])(test)

  return decorate


def result_or_refusal(function, *arguments, **keywords):
  """What a call gives; None for a UserError, which is then a short one."""
  try:
    return function(*arguments, **keywords)
  except UserError as error:
    assert 1 <= len(str(error).splitlines()) <= 3, str(error)
    assert str(error).isprintable() or '\n' in str(error), str(error)
    return None
