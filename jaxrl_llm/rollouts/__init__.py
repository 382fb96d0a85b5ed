"""Turns prompts into the rollouts that an estimator needs."""

from jaxrl_llm.rollouts.collect import (
  Collected,
  Keys,
  Setting,
  complete,
  reward_metrics,
)
from jaxrl_llm.rollouts.responses import (
  Generation,
  Responses,
  generate,
  greedy,
  respond,
  score_responses,
  score_tokens,
  to_prompts,
  with_statistics,
)

__all__ = [
  'Collected',
  'Generation',
  'Keys',
  'Responses',
  'Setting',
  'complete',
  'generate',
  'greedy',
  'respond',
  'reward_metrics',
  'score_responses',
  'score_tokens',
  'to_prompts',
  'with_statistics',
]
