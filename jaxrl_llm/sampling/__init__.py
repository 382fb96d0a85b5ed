"""Samples responses: the distribution, decoding, forked caches."""

from jaxrl_llm.sampling.sampler import (
  Samples,
  Work,
  fork,
  sample,
  sample_and_keep,
)

__all__ = ['Samples', 'Work', 'fork', 'sample', 'sample_and_keep']
