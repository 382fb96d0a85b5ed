"""Scores of whole responses and their weighted sum."""

import importlib

__all__ = [
  'RewardPart',
  'Scores',
  'Workers',
  'functions',
  'isolated',
  'score',
]

_MODULES = {
  'RewardPart': 'scoring',
  'Scores': 'scoring',
  'Workers': 'workers',
  'isolated': 'workers',
  'score': 'scoring',
}


def __getattr__(name: str):
  # Imported when asked for: worker processes need `functions` alone, and start
  # four times as fast without NumPy.
  if name == 'functions':
    return importlib.import_module(f'{__name__}.functions')
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
