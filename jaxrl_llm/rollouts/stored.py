"""Pools of stored responses to train on, from a data set or sampled earlier.

A pool holds groups: single responses for a likelihood, pairs for a preference.
It lives in host memory; sampled pools are also written to files.
"""

import io
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm import sharding
from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import Rollouts


class Pool(NamedTuple):
  """N groups of g responses, each to one prompt.

  Attributes:
    prompts: [N] int32, positions of the prompts in the data set.
    tokens: [N, g, T] int32; arbitrary after a response's end.
    lengths: [N, g] int32, number of tokens, the end token included.
    rewards: [N, g] float32.
    ref_log_probs: [N, g, T] float32, log-probabilities under the reference
      policy, nats; None if the estimator does not need them.
  """

  prompts: np.ndarray
  tokens: np.ndarray
  lengths: np.ndarray
  rewards: np.ndarray
  ref_log_probs: np.ndarray | None = None


def given(
  prompts: Sequence[int],
  responses: Sequence[Sequence[Sequence[int]]],
  rewards: Sequence[Sequence[float]],
  pad_id: int,
) -> Pool:
  """Builds a pool from token lists.

  Args:
    prompts: N positions in the data set.
    responses: N groups of g responses, lists of token ids.
    rewards: N groups of g numbers.
    pad_id: token that fills the positions after a response's end.
  """
  lengths = np.array([[len(ids) for ids in group] for group in responses])
  shape = (*lengths.shape, int(lengths.max(initial=1)))
  tokens = np.full(shape, pad_id, np.int32)
  for i, group in enumerate(responses):
    for j, ids in enumerate(group):
      tokens[i, j, : len(ids)] = ids
  return Pool(
    np.asarray(prompts, np.int32),
    tokens,
    lengths.astype(np.int32),
    np.asarray(rewards, np.float32),
  )


def singles(keep: np.ndarray) -> np.ndarray:
  """Returns a group of one response for each response that is kept.

  Args:
    keep: [P, G] bool.

  Returns:
    [N, 2] int: prompt and response of each group.
  """
  return np.stack(np.nonzero(keep), axis=1)


def ranked_pairs(rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """Pairs each prompt's best response with its worst, and so on inward.

  No response is in two pairs, and no pair has equal rewards.  Among equal
  rewards, the response sampled first counts as better.

  Args:
    rewards: [P, G].
    valid: [P, G] bool, False for responses to exclude.

  Returns:
    [N, 3] int: prompt, preferred and rejected response of each pair; pairs of
    one prompt are in decreasing order of their reward difference.
  """
  pairs = []
  for p, (row, known) in enumerate(zip(rewards, valid, strict=True)):
    order = [g for g in np.argsort(-row, kind='stable') if known[g]]
    for i in range(len(order) // 2):
      best, worst = order[i], order[-1 - i]
      if row[best] > row[worst]:
        pairs.append((p, best, worst))
  return np.array(pairs, np.int64).reshape(-1, 3)


def select(
  prompts: Sequence[int],
  groups: np.ndarray,
  tokens: np.ndarray,
  lengths: np.ndarray,
  rewards: np.ndarray,
) -> Pool:
  """Builds a pool from selected responses of a step.

  Args:
    prompts: P positions in the data set.
    groups: [N, 1 + g] int, as returned by `singles` and `ranked_pairs`.
    tokens: [P, G, T] int32.
    lengths, rewards: [P, G].
  """
  rows, members = groups[:, :1], groups[:, 1:]
  return Pool(
    np.asarray(prompts, np.int32)[groups[:, 0]],
    np.asarray(tokens, np.int32)[rows, members],
    np.asarray(lengths, np.int32)[rows, members],
    np.asarray(rewards, np.float32)[rows, members],
  )


def join(pools: Sequence[Pool]) -> Pool:
  """Concatenates pools, which must all have, or lack, the same arrays."""
  return Pool(
    *(
      None if arrays[0] is None else np.concatenate(arrays)
      for arrays in zip(*pools, strict=True)
    )
  )


def limit(pool: Pool, per_prompt: int) -> Pool:
  """Keeps the first `per_prompt` groups of every prompt, in order."""
  seen, kept = {}, []
  for i, prompt in enumerate(pool.prompts.tolist()):
    seen[prompt] = seen.get(prompt, 0) + 1
    if seen[prompt] <= per_prompt:
      kept.append(i)
  return take(pool, kept)


def take(pool: Pool, indices: Sequence[int]) -> Pool:
  """Returns the groups at `indices`, in that order."""
  chosen = np.asarray(indices, np.int64)
  return Pool(*(None if x is None else x[chosen] for x in pool))


def narrowed(pool: Pool, bucket: int = 32) -> Pool:
  """Cuts columns after the longest response, to a multiple of `bucket`.

  The multiples bound the number of shapes that are compiled.
  """
  longest = int(pool.lengths.max(initial=1))
  width = min(-(-longest // bucket) * bucket, pool.tokens.shape[2])
  ref = pool.ref_log_probs
  return pool._replace(
    tokens=pool.tokens[..., :width],
    ref_log_probs=None if ref is None else ref[..., :width],
  )


def to_rollouts(pool: Pool) -> Rollouts:
  """Returns the rollouts for an estimator's `prepare`: groups are prompts.

  The log-probabilities, [N, g, T], are those of the reference if known, and
  otherwise 0; no likelihood reads them.
  """
  mask = np.arange(pool.tokens.shape[2]) < pool.lengths[..., None]
  ref = pool.ref_log_probs
  known = np.zeros(mask.shape, np.float32) if ref is None else ref
  return sharding.place_rows(
    Rollouts(
      tokens=pool.tokens,
      mask=mask,
      log_probs=known,
      rewards=pool.rewards[..., None],
      ref_log_probs=ref,
    )
  )


def save_pool(path: pathlib.Path, pool: Pool) -> None:
  """Writes a pool as npz, atomically.

  Raises:
    UserError: the disk is full or the folder cannot be written.
  """
  arrays = {k: v for k, v in pool._asdict().items() if v is not None}
  memory = io.BytesIO()
  np.savez_compressed(memory, **arrays)
  try:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, memory.getvalue())
  except OSError as error:
    raise UserError(
      f'{path} cannot be written: {error.strerror}\n'
      'free some space or fix the disk, then resume'
    ) from error


def load_pool(path: pathlib.Path) -> Pool:
  """Reads a pool that `save_pool` wrote.

  Raises:
    UserError: the file is missing or damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as stored:
      return Pool(**{name: _array(stored, name) for name in Pool._fields})
  except Exception as error:  # A damaged file can raise any exception.
    raise UserError(
      f'{path} cannot be read: {" ".join(str(error).split())[:200]}\n'
      'restore it from a copy, or start in another --workdir'
    ) from error


def _array(stored: Any, name: str) -> np.ndarray | None:
  optional = name in Pool._field_defaults
  return None if optional and name not in stored else stored[name]
