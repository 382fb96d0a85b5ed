"""Curves and batches that a run leaves."""

import os

import mistakes
import numpy as np

from experiments import stored_runs
from jaxrl_llm import rollouts, sampling
from jaxrl_llm.rewards import Scores
from jaxrl_llm.sampling import policy


def test_a_batch_that_cannot_be_kept_is_said(tmp_path, monkeypatch):
  numbers = np.arange(6.0).reshape(1, 2, 3)
  responses = rollouts.Responses(
    policy.Prompts(tokens=np.ones((1, 4), np.int32), lengths=np.array([4])),
    [{'prompt': 'a'}],
    sampling.Samples(
      tokens=np.ones((1, 2, 3), np.int32),
      mask=numbers > 1,
      log_probs=-numbers,
      finished=np.ones((1, 2, 1), bool),
    ),
    ['b', 'c'],
    lambda: Scores(np.ones(2), np.ones(2, bool), {}),
  )
  path = tmp_path / 'batch.npz'
  stored_runs.write_batch(path, responses, np.ones((1, 2)))
  with np.load(path, allow_pickle=False) as stored:
    np.testing.assert_array_equal(stored['log_probs'], -numbers)
    np.testing.assert_array_equal(stored['rewards'], np.ones((1, 2)))

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with mistakes.refused('to look at, cannot be ', ': No space'):
    stored_runs.write_batch(path, responses, np.ones((1, 2)))
  assert list(tmp_path.iterdir()) == [path]
