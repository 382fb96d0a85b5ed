"""Errors of gradient estimators, and of state values, on a real model."""

from jaxrl_llm.audit.estimates import Estimate, root
from jaxrl_llm.audit.gradients import (
  Gradients,
  Report,
  Share,
  between_prompts,
  compare,
  draw_gradients,
  relative_error,
  share,
  sketch,
)
from jaxrl_llm.audit.trees import (
  Profile,
  advice,
  best_samples,
  cap,
  distinct_tokens,
  profile,
)
from jaxrl_llm.audit.values import Doob, Value, doob, value_errors

__all__ = [
  'Doob',
  'Estimate',
  'Gradients',
  'Profile',
  'Report',
  'Share',
  'Value',
  'advice',
  'best_samples',
  'between_prompts',
  'cap',
  'compare',
  'distinct_tokens',
  'doob',
  'draw_gradients',
  'profile',
  'relative_error',
  'root',
  'share',
  'sketch',
  'value_errors',
]
