"""Selects the groups of responses that a step trains on.

A group is all G responses to one prompt.  Without tools, a step trains on the
groups of its own prompts.  If all responses of a group fail, `hint` (GHPO)
samples the group again with the beginning of its reference solution.  `refill`
(DAPO) replaces groups without reward variance by groups of further prompts.

    groups = chain(hint(hints.encode, shares=(.25, .5)), refill(further, 4))

Hints come first; further prompts are not hinted.

References:
  Yu et al., `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025
  Liu et al., `GHPO <https://arxiv.org/abs/2507.10628>`_, 2025
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm import sharding
from jaxrl_llm.rewards import Scores
from jaxrl_llm.rewards.scoring import merge_failures
from jaxrl_llm.rollouts.responses import Responses
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks.hints import Hinted, has_solution


class Drawn(NamedTuple):
  """The groups that a step trains on.

  Attributes:
    responses: responses of P groups.  The 'prompt' of a row is the text that
      the model read, with its hint.
    batch: the same prompts as token ids, with the rows of the data set.
    tokens: number of tokens generated in groups that are not trained on.
    record: metrics for the log.
  """

  responses: Responses
  batch: prompts_lib.PromptBatch
  tokens: int = 0
  record: Mapping[str, float] = types.MappingProxyType({})


# (respond, prompts, keys, stop) → Drawn.  `respond` takes a batch and a key;
# `stop.check()` is called before sampling again.
Groups = Callable[..., Drawn]


def as_sampled(respond, prompts, keys, stop=None) -> Drawn:
  """Keeps the groups of the step's own prompts; reads no scores."""
  del stop
  return Drawn(respond(batch=prompts, key=keys.responses), prompts)


class Pending:
  """Everything that a step has sampled, and the group chosen for each prompt.

  A place is the index of one of the P prompts that the step trains on.

  Attributes:
    parts: batches of responses; the first belongs to the step's own prompts.
    chosen: (batch, group in it) for each of the P places.
    texts: hinted prompts, by place.
  """

  def __init__(self, first: Responses):
    self.parts = [first]
    self.chosen = [(0, group) for group in range(len(first.rows))]
    self.texts = {}

  def replace(self, place: int, group: int) -> None:
    """Puts a group of the newest batch at a place."""
    self.chosen[place] = (len(self.parts) - 1, group)

  def varying(self) -> np.ndarray:
    """Returns [P] bool: the group at each place has reward variance."""
    flags = [varying(part.scores, len(part.rows)) for part in self.parts]
    return np.array([flags[part][group] for part, group in self.chosen])


# Changes a `Pending` in place; returns metrics for the log.
Tool = Callable[..., dict[str, float]]


def chain(*tools: Tool) -> Groups:
  """Applies tools in reading order to the groups of the step's own prompts.

  The record adds these metrics of all samples to those of the tools:

  sampled/reward, sampled/frac_reward_zero_std: metrics of the step's own
    prompts without hints.  They are unbiased: they equal `reward` and
    `frac_reward_zero_std` of a step without tools.
  sampled/all_reward: mean over every response of the step.
  sampled/discarded_tokens: tokens generated in groups that are not trained on.
  """

  def draw(respond, prompts, keys, stop=None) -> Drawn:
    pending = Pending(respond(batch=prompts, key=keys.responses))
    record = {}
    for tool in tools:
      record |= tool(pending, respond, prompts, keys, stop)
    joined = join(pending.parts, pending.chosen)
    batch = prompts_lib.PromptBatch(
      *sharding.to_host((joined.prompts.tokens, joined.prompts.lengths)),
      joined.rows,
    )
    rows = [
      row | {'prompt': pending.texts[i]} if i in pending.texts else row
      for i, row in enumerate(joined.rows)
    ]
    tokens = sum(part.tokens for part in pending.parts) - joined.tokens
    record |= _sampled(pending.parts) | {'sampled/discarded_tokens': tokens}
    return Drawn(joined._replace(rows=rows), batch, tokens, record)

  return draw


def hint(
  encode: Callable[[dict, float], Hinted],
  encoded: prompts_lib.EncodedPrompts,
  shares: Sequence[float],
  threshold: float = 0.0,
) -> Tool:
  """Resamples failed groups with ever larger parts of the solution.

  The record:

  hints/failed: groups with at least one score and none above the threshold.
  hints/no_solution, hints/over_budget: failed groups without a solution, and
    those whose hinted prompt is too long.
  hints/groups_0.25, …: groups sampled with this share.
  hints/saved: groups in which a response succeeded with a hint.

  Args:
    encode: method `encode` of a `tasks.hints.Hints`.
    encoded: the training prompts, which define budget and padding.
    shares: increasing shares of a solution's tokens.
    threshold: a response succeeds if its reward is above this.
  """

  def apply(pending: Pending, respond, prompts, keys, stop) -> dict[str, int]:
    first, most = pending.parts[0], len(prompts.rows)
    scored = first.scores.valid.reshape(most, -1).any(axis=1)
    success = succeeding(first.scores, most, threshold)
    failed = np.flatnonzero(scored & ~success).tolist()
    left = [place for place in failed if has_solution(first.rows[place])]
    record = {
      'hints/failed': len(failed),
      'hints/no_solution': len(failed) - len(left),
      'hints/over_budget': 0,
    }
    for number, share in enumerate(shares):
      hinted = {place: encode(first.rows[place], share) for place in left}
      # A prompt that is too long now would also be with a larger share.
      budget = encoded.max_tokens
      fits = [place for place in left if len(hinted[place].ids) <= budget]
      record['hints/over_budget'] += len(left) - len(fits)
      record[f'hints/groups_{share:g}'] = len(fits)
      left = fits
      if not left:
        continue
      if stop is not None:
        stop.check()
      ids = [hinted[place].ids for place in left]
      batch = _batch(encoded, ids, [first.rows[place] for place in left], most)
      key = jax.random.fold_in(keys.hints, number)
      part = respond(batch=batch, key=key)
      pending.parts.append(part)
      helped = succeeding(part.scores, len(part.rows), threshold)
      for group, place in enumerate(left):
        if helped[group]:
          pending.replace(place, group)
          pending.texts[place] = hinted[place].text
      left = [place for place in left if place not in pending.texts]
    return record | {'hints/saved': len(pending.texts)}

  return apply


def refill(
  further: Callable[[int], prompts_lib.PromptBatch], rounds: int
) -> Tool:
  """Replaces groups without variance by groups of further prompts.

  The record:

  refill/rounds: rounds of sampling.
  refill/replaced, refill/unfilled: groups without variance that were, and
    were not, replaced.
  refill/discarded: sampled groups that are not trained on.

  Args:
    further: round of this step, from 0 → P further prompts.
    rounds: maximum number of rounds of sampling.
  """

  def apply(pending: Pending, respond, prompts, keys, stop) -> dict[str, int]:
    missing = np.flatnonzero(~pending.varying()).tolist()
    wanted, most = len(missing), len(prompts.rows)
    good, drawn, done = most - wanted, most, 0
    while missing and done < rounds:
      if stop is not None:
        stop.check()
      # Enough if the share of groups with variance stays the same.
      size = _usual(-(-len(missing) * drawn // max(good, 1)), most)
      batch = prompts_lib.PromptBatch(*(part[:size] for part in further(done)))
      part = respond(batch=batch, key=jax.random.fold_in(keys.refill, done))
      pending.parts.append(part)
      usable = np.flatnonzero(varying(part.scores, size)).tolist()
      for place, group in zip(missing, usable, strict=False):
        pending.replace(place, group)
        pending.texts.pop(place, None)
      missing = missing[len(usable) :]
      good, drawn, done = good + len(usable), drawn + size, done + 1
    return {
      'refill/rounds': done,
      'refill/replaced': wanted - len(missing),
      'refill/unfilled': len(missing),
      # Each replacement costs one group: the replaced one or a spare.
      'refill/discarded': drawn - most,
    }

  return apply


def varying(scores: Scores, groups: int) -> np.ndarray:
  """Marks groups with two valid rewards that differ, [P] bool.

  In other groups all advantages are 0 after subtracting the group's baseline.
  Rewards are compared as float32, the type that estimators receive.

  Args:
    scores: scores of P·G responses.
    groups: P.
  """
  valid = scores.valid.reshape(groups, -1)
  rewards = scores.total.reshape(groups, -1).astype(np.float32)
  greatest = np.where(valid, rewards, -np.inf).max(axis=1)
  return greatest > np.where(valid, rewards, np.inf).min(axis=1)


def succeeding(scores: Scores, groups: int, threshold: float) -> np.ndarray:
  """Marks groups with a valid reward above a threshold, [P] bool."""
  success = scores.valid & (scores.total > threshold)
  return success.reshape(groups, -1).any(axis=1)


def join(
  parts: Sequence[Responses], chosen: Sequence[tuple[int, int]]
) -> Responses:
  """Joins groups of several batches into one batch.

  Args:
    parts: batches with G responses of T tokens to each prompt; their caches
      are dropped.
    chosen: (batch, group in it) for each group of the result, in its order.

  Returns:
    Responses, with prompts padded to the widest batch that a group comes from.
    Failures cover all batches, including groups that were not chosen.
  """
  first = np.cumsum([0] + [len(part.rows) for part in parts])
  groups = np.asarray([first[part] + group for part, group in chosen])
  width = max(parts[i].prompts.tokens.shape[1] for i, _ in chosen)
  samples = parts[0].samples.finished.shape[1]
  rows = (groups[:, None] * samples + np.arange(samples)).reshape(-1)

  def take(*arrays: Any) -> jax.Array:
    # On the host: the number of groups varies by step, and on the device each
    # number would compile another program.
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


def _batch(encoded, ids: list[list[int]], rows: list[dict], most: int):
  """Builds a batch from token ids; repeats prompts up to a power of two."""
  size = _usual(len(ids), most)
  again = [i % len(ids) for i in range(size)]
  encoded = encoded._replace(
    tokens=[np.asarray(row, np.int32) for row in ids], rows=rows
  )
  return prompts_lib.gather(encoded, again)


def _usual(count: int, most: int) -> int:
  """Rounds up to a power of two, at most `most`, to compile few sizes."""
  return min(1 << (count - 1).bit_length(), most)


def _sampled(parts: list[Responses]) -> dict[str, float]:
  first = parts[0].scores
  groups = len(parts[0].rows)
  scored = first.valid.reshape(groups, -1).any(axis=1)
  equal = ~varying(first, groups)[scored]
  total = np.concatenate([part.scores.total for part in parts])
  valid = np.concatenate([part.scores.valid for part in parts])
  return {
    'sampled/reward': _mean(first.total[first.valid]),
    'sampled/frac_reward_zero_std': _mean(equal),
    'sampled/all_reward': _mean(total[valid]),
  }


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if values.size else np.nan


def _fit(tokens: Any, width: int) -> np.ndarray:
  """Pads or cuts prompts [P, S] to [P, width].

  The columns that are cut are padding in every chosen prompt.
  """
  tokens = sharding.to_host(tokens)[:, :width]
  return np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))


def _join_scores(scores: Sequence[Scores], rows: np.ndarray) -> Scores:
  take = lambda field: np.concatenate([field(part) for part in scores])[rows]
  names = scores[0].parts
  return Scores(
    total=take(lambda part: part.total),
    valid=take(lambda part: part.valid),
    parts={name: take(lambda part, n=name: part.parts[n]) for name in names},
    failed={name: take(lambda part, n=name: part.failed[n]) for name in names},
    failures=merge_failures(part.failures for part in scores),
  )
