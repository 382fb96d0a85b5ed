"""Scores of whole responses and their weighted sum."""

import importlib

from jaxrl_llm.rewards import functions

__all__ = [
  'RewardPart',
  'Scores',
  'Workers',
  'functions',
  'score',
  'start',
]

_MODULES = {
  'RewardPart': 'scoring',
  'Scores': 'scoring',
  'Workers': 'workers',
  'score': 'scoring',
  'start': 'scoring',
}


def __getattr__(name: str):
  # Imported lazily: worker processes need only `functions`, and start in half
  # the time without NumPy.
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
