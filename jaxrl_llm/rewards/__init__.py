"""Scores of whole responses and their weighted sum."""

from jaxrl_llm.rewards import code, functions
from jaxrl_llm.rewards.scoring import RewardPart, Scores, score

__all__ = ['RewardPart', 'Scores', 'code', 'functions', 'score']
