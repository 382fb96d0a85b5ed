"""Samples responses: the distribution, decoding, forked caches."""

from jaxrl_llm.sampling.sampler import (
  Samples,
  Work,
  fork,
  sample,
  sample_and_keep,
)
from jaxrl_llm.sampling.trees import Grown, grow

__all__ = [
  'Grown',
  'Samples',
  'Work',
  'fork',
  'grow',
  'sample',
  'sample_and_keep',
]
