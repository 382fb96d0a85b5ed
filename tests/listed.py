"""Languages whose responses are all listed, and estimators examined on them."""

import math

import numpy as np

from jaxrl_llm import estimators as est

enumeration = est.enumeration
TOY = enumeration.toy(seed=0, words=2, max_length=3)
BINARY = TOY._replace(rewards=(TOY.rewards > 1.0).astype(float))
TWO = enumeration.toy(seed=1, words=2, max_length=2, prompts=2)
TWO_BINARY = TWO._replace(rewards=(TWO.rewards > 1.0).astype(float))
SMALL = enumeration.toy(seed=0, words=1, max_length=3)
LONG = enumeration.toy(seed=0, words=1, max_length=4)


def compose(*advantages, loss=None, weights=None, **options):
  """The score function summed over tokens, unless told otherwise."""
  return est.estimator(
    est.chain(*advantages) if advantages else est.identity(),
    loss or est.score_function(),
    weights or est.sequence_sum(),
    **options,
  )


def close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def examine(estimator, toy=TOY, samples=2, **options):
  report = enumeration.examine(estimator, toy, samples, **options)
  assert report.exact and report.standard_error == 0.0
  return report


def assert_unbiased(estimator, toy=TOY, samples=2, **options):
  report = examine(estimator, toy, samples, **options)
  close(report.gradient, report.exact_gradient)
  return report


def penalized(toy, max_length, buffer):
  """The toy whose reward is that of a response with its overlong penalty."""
  over = toy.mask.sum(axis=1) - (max_length - buffer)
  return toy._replace(rewards=toy.rewards - np.clip(over / buffer, 0, 1))


def success(toy):
  """[P], the probability of a reward of 1."""
  p = enumeration.response_probabilities(toy)
  return (p * toy.rewards).sum(axis=1)


def counts(samples, p):
  """{successes among `samples`: probability}."""
  return {
    k: math.comb(samples, k) * p**k * (1 - p) ** (samples - k)
    for k in range(samples + 1)
  }
