"""Scores of whole responses and their weighted sum."""

from jaxrl_llm.rewards import functions
from jaxrl_llm.rewards.scoring import RewardPart, Scores, score
from jaxrl_llm.rewards.workers import Workers, isolated

__all__ = [
  'RewardPart',
  'Scores',
  'Workers',
  'functions',
  'isolated',
  'score',
]
