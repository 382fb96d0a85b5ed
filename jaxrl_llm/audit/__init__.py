"""Errors of gradient estimators, and of state values, on a real model."""

from jaxrl_llm.audit.estimates import Estimate, root
from jaxrl_llm.audit.gradients import (
  Gradients,
  Report,
  Share,
  compare,
  draw_gradients,
  relative_error,
  share,
  sketch,
)
from jaxrl_llm.audit.values import Doob, Value, doob, value_errors

__all__ = [
  'Doob',
  'Estimate',
  'Gradients',
  'Report',
  'Share',
  'Value',
  'compare',
  'doob',
  'draw_gradients',
  'relative_error',
  'root',
  'share',
  'sketch',
  'value_errors',
]
