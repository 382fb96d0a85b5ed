"""Which groups of responses have something to learn from, and new batches of
groups that were sampled apart.

A group is all G responses to one prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_llm import sharding
from jaxrl_llm.rewards import Scores
from jaxrl_llm.rewards.workers import Failures
from jaxrl_llm.rollouts.responses import Responses
from jaxrl_llm.sampling import policy


def varying(scores: Scores, groups: int) -> np.ndarray:
  """Which groups have two valid rewards that differ: [P] bool.

  Without them a group's baseline leaves nothing to learn from.  Rewards are
  compared as float32, which is what estimators are given.

  Args:
    scores: of P·G responses.
    groups: P.
  """
  valid = scores.valid.reshape(groups, -1)
  rewards = scores.total.reshape(groups, -1).astype(np.float32)
  greatest = np.where(valid, rewards, -np.inf).max(axis=1)
  return greatest > np.where(valid, rewards, np.inf).min(axis=1)


def succeeding(scores: Scores, groups: int, threshold: float) -> np.ndarray:
  """Which groups have a valid reward above a threshold: [P] bool."""
  success = scores.valid & (scores.total > threshold)
  return success.reshape(groups, -1).any(axis=1)


def join(
  parts: Sequence[Responses], chosen: Sequence[tuple[int, int]]
) -> Responses:
  """A batch of groups out of several.

  Args:
    parts: batches with G responses of T tokens to each prompt; their caches
      are not taken over.
    chosen: (batch, group in it) for each group of the result, in its order.

  Returns:
    Responses, their prompts padded to the widest batch that a group is of.
    Failures are those of all batches, whether or not they were chosen.
  """
  first = np.cumsum([0] + [len(part.rows) for part in parts])
  groups = np.asarray([first[part] + group for part, group in chosen])
  width = max(parts[i].prompts.tokens.shape[1] for i, _ in chosen)
  samples = parts[0].samples.finished.shape[1]
  rows = (groups[:, None] * samples + np.arange(samples)).reshape(-1)

  def take(*arrays: Any) -> jax.Array:
    # On the host: the number of groups differs from step to step, and each
    # would compile anew.
    return sharding.place_rows(np.concatenate(sharding.to_host(arrays))[groups])

  texts = [text for part in parts for text in part.completions]
  known = [row for part in parts for row in part.rows]
  scores = _join_scores([part.scores for part in parts], rows)
  return Responses(
    prompts=policy.Prompts(
      tokens=take(*(_fit(part.prompts.tokens, width) for part in parts)),
      lengths=take(*(part.prompts.lengths for part in parts)),
    ),
    rows=[known[group] for group in groups],
    samples=jax.tree.map(take, *(part.samples for part in parts)),
    completions=[texts[row] for row in rows],
    scoring=lambda: scores,
  )


def _fit(tokens: Any, width: int) -> np.ndarray:
  """Prompts [P, S] as [P, width]; what is cut off belongs to none chosen."""
  tokens = sharding.to_host(tokens)[:, :width]
  return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))


def _join_scores(scores: Sequence[Scores], rows: np.ndarray) -> Scores:
  return Scores(
    total=np.concatenate([part.total for part in scores])[rows],
    valid=np.concatenate([part.valid for part in scores])[rows],
    parts={
      name: np.concatenate([part.parts[name] for part in scores])[rows]
      for name in scores[0].parts
    },
    failures={
      name: _add_failures([part.failures for part in scores], name)
      for name in scores[0].failures
    },
  )


def _add_failures(
  failures: Sequence[Mapping[str, Failures]], name: str
) -> Failures:
  """Counts of all batches, and the first message of each kind."""
  counts, messages = {}, {}
  for part in failures:
    for kind, count in part[name].counts.items():
      counts[kind] = counts.get(kind, 0) + count
    messages = dict(part[name].messages) | messages
  return Failures(counts, messages)
