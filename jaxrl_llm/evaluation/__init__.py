"""Measures a model: held-out rewards, pass@k and maj@k, calibration."""

from jaxrl_llm.evaluation.estimates import (
  Interval,
  best_of_n,
  bootstrap,
  bootstrap_few,
  distinct_bigrams,
  maj_at_k,
  pass_at_k,
  votes,
)
from jaxrl_llm.evaluation.held_out import Answers, HeldOut, answer, summary

__all__ = [
  'Answers',
  'HeldOut',
  'Interval',
  'answer',
  'best_of_n',
  'bootstrap',
  'bootstrap_few',
  'distinct_bigrams',
  'maj_at_k',
  'pass_at_k',
  'summary',
  'votes',
]
