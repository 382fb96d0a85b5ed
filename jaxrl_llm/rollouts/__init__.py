"""Turns prompts into the rollouts that an estimator needs."""

from jaxrl_llm.rollouts.responses import (
  Generation,
  Responses,
  generate,
  greedy,
  judge,
  respond,
  score_tokens,
  to_prompts,
  to_rollouts,
  with_statistics,
)

__all__ = [
  'Generation',
  'Responses',
  'generate',
  'greedy',
  'judge',
  'respond',
  'score_tokens',
  'to_prompts',
  'to_rollouts',
  'with_statistics',
]
