"""Monte Carlo branches: fresh continuations from inside finished responses.

A branch is a response that keeps the first tokens of another one.  It uses the
same settings and the remaining token budget, and is scored as a whole.
`branch_values` turns branches into state values or training rows.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import sampling, sharding
from jaxrl_llm.estimators import Branches
from jaxrl_llm.estimators.positions import mark
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.rollouts.responses import Generation, Responses, score_rows

Array = jax.Array


class ForkPoints(NamedTuple):
  """Fork points of branches: M per response, K branches each, R = G·M·K.

  Attributes:
    fork_positions: [P, G, M] int32, number of tokens before each fork; 0 for
      no fork.
    shared_with: [P, G, M] int32, index g·M + m of the fork point whose branches
      serve this one: responses with the same prefix share a state.
    parents: [P, R, 1] int32, the response that a branch forks from.
    forked_at: [P, R, 1] int32, number of its tokens that the branch keeps; 0
      for no branch.
    key: PRNG key of the rule: response i of [P·G] draws its state from split i.
  """

  fork_positions: Array
  shared_with: Array
  parents: Array
  forked_at: Array
  key: Array


class Branched(NamedTuple):
  """Branches of P prompts' responses.

  Attributes:
    responses: the branches as whole responses, prefix and continuation: R rows
      per prompt in the order of responses, fork points, branches.  A row
      without a branch has no tokens and is not valid.
    forks: the fork points.
    work: cost of decoding.
  """

  responses: Responses
  forks: ForkPoints
  work: sampling.Work

  @property
  def tokens(self) -> int:
    """Number of generated tokens: those of the continuations alone."""
    return int(self.work.tokens)

  @property
  def statistics(self) -> dict[str, float]:
    """Sampling statistics for the record.

    branches/forks: number of states that branches were drawn from.
    branches/shared: fraction of fork points served by another one's branches.
    branches/utilization: useful tokens / (rows × steps) of the decoding.
    branches/copied_bytes: bytes of keys and values, which every row copies
      once and whenever it takes over a response.
    """
    fork_positions, shared_with = sharding.to_host(
      (self.forks.fork_positions, self.forks.shared_with)
    )
    is_first = shared_with == _slots(fork_positions.shape)
    forks = int(((fork_positions > 0) & is_first).sum())
    shared = int((~is_first).sum())
    share = lambda part, whole: float(part) / max(float(whole), 1.0)
    return {
      'branches/forks': forks,
      'branches/shared': share(shared, forks + shared),
      'branches/utilization': share(self.work.tokens, self.work.row_steps),
      'branches/copied_bytes': float(self.work.copied),
    }


def branch(
  config: ModelConfig,
  params: Any,
  responses: Responses,
  generation: Generation,
  wanted: Branches,
  tokenizer: Any,
  rewards: Sequence[RewardPart],
  key: Array,
) -> Branched:
  """Samples and scores branches of responses.

  Each state is sampled from once: if responses to a prompt agree up to a fork
  point, the branches of the first response serve them all.  If the branches
  themselves are trained on, the other responses do not fork there.

  Args:
    config, params: the model that sampled the responses.
    responses: responses with their cache, and with entropies if the rule reads
      them.
    generation: settings that the responses were generated with.
    wanted: number and positions of the branches.
    tokenizer, rewards: as for the responses.
    key: PRNG key.

  Raises:
    UserError: as in `score_responses` and `sampling.fork`.
  """
  samples = responses.samples
  rule_key, sample_key = jax.random.split(key)
  fork_positions = draw_fork_positions(
    wanted, samples.tokens, samples.mask, samples.entropy, rule_key
  )
  host_positions, host_tokens = sharding.to_host(
    (fork_positions, samples.tokens)
  )
  shared_with = find_shared(host_positions, host_tokens)
  sampled = np.where(
    shared_with == _slots(shared_with.shape), host_positions, 0
  )
  sampled, fork_positions, shared_with = sharding.place_rows(
    (sampled, sampled if wanted.trained else host_positions, shared_with)
  )
  forked, work = sampling.fork(
    config,
    params,
    responses.cache,
    samples,
    sampled,
    sample_key,
    branches=wanted.samples,
    decoding=generation.decoding,
    eos_ids=generation.eos_ids,
    pad_id=generation.pad_id,
    statistics=generation.statistics,
  )
  whole, parents, forked_at = _as_rows(samples, forked, sampled)
  completions, scoring = score_rows(tokenizer, rewards, responses.rows, whole)
  rows = Responses(
    responses.prompts, responses.rows, whole, completions, scoring
  )
  forks = ForkPoints(fork_positions, shared_with, parents, forked_at, rule_key)
  return Branched(rows, forks, work)


@functools.partial(jax.jit, static_argnames='wanted')
def draw_fork_positions(
  wanted: Branches,
  tokens: Array,
  mask: Array,
  entropy: Array | None,
  key: Array,
) -> Array:
  """Returns the number of tokens before each fork, [P, G, M]; 0 for no fork.

  Every response draws its own state of the rule.
  """
  shape = mask.shape
  count = min(wanted.count, max(shape[2] - 1, 1))
  forks = mark_rows(wanted, tokens, mask, entropy, key)
  time = jnp.broadcast_to(jnp.arange(shape[2]), shape)
  first = jnp.sort(jnp.where(forks, time, shape[2]), axis=2)[..., :count]
  return jnp.where(first < shape[2], first, 0).astype(jnp.int32)


def mark_rows(
  wanted: Branches,
  tokens: Array,
  mask: Array,
  entropy: Array | None,
  key: Array,
) -> Array:
  """Applies `mark` to [P, G, ..., T]; rows of a response share its state."""
  length = mask.shape[-1]
  responses = mask.shape[0] * mask.shape[1]
  if entropy is None:
    if wanted.positions.reads_entropy:
      raise ValueError("these positions need the sampler's 'entropy'")
    entropy = jnp.zeros(mask.shape)

  def of_response(key, *rows):
    state = wanted.positions.init(key, wanted.count, length)
    return jax.vmap(functools.partial(mark, wanted, state))(*rows)

  rows = [x.reshape(responses, -1, length) for x in (tokens, mask, entropy)]
  forks = jax.vmap(of_response)(jax.random.split(key, responses), *rows)
  return forks.reshape(mask.shape)


def find_shared(fork_positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """Finds the prompt's first fork point g·M + m with the same state, [P, G, M].

  Args:
    fork_positions: [P, G, M], from `draw_fork_positions`.
    tokens: [P, G, T].
  """
  shared_with = _slots(fork_positions.shape).copy()
  first: dict[tuple, int] = {}
  for p, g, m in zip(*np.nonzero(fork_positions), strict=True):
    state = (p, tokens[p, g, : fork_positions[p, g, m]].tobytes())
    shared_with[p, g, m] = first.setdefault(state, shared_with[p, g, m])
  return shared_with


def _slots(shape: tuple[int, ...]) -> np.ndarray:
  """Returns the index g·M + m of each fork point, [P, G, M] int32."""
  numbers = np.arange(shape[1] * shape[2], dtype=np.int32)
  return np.broadcast_to(numbers.reshape(1, *shape[1:]), shape)


@jax.jit
def _as_rows(samples, forked, fork_positions):
  """Joins prefixes and continuations into whole responses.

  Args:
    samples: [P, G, T].
    forked: [P, G, M, K, T − 1].
    fork_positions: [P, G, M], 0 without branches.

  Returns:
    `Samples` [P, R, T], parents [P, R, 1] and forked_at [P, R, 1].
  """
  num_prompts, groups, length = samples.tokens.shape
  count, branches = forked.tokens.shape[2:4]
  rows = groups * count * branches
  time = jnp.arange(length)[None, None, None, None]
  start = fork_positions[..., None, None]
  later = jnp.maximum(time - start, 0)
  later = jnp.broadcast_to(later, (*forked.tokens.shape[:4], length))
  # One position more than the longest continuation; it is never read.
  pad = [(0, 0)] * 4 + [(0, 1)]

  def join(prefix, continuation):
    if prefix is None:
      return None
    suffix = jnp.take_along_axis(jnp.pad(continuation, pad), later, axis=4)
    whole = jnp.where(time < start, prefix[:, :, None, None], suffix)
    return whole.reshape(num_prompts, rows, length)

  present = jnp.broadcast_to(start > 0, (*forked.tokens.shape[:4], 1))
  present = present.reshape(num_prompts, rows, 1)
  whole = jax.tree.map(
    join,
    samples.replace(finished=None),
    forked.replace(finished=None),
    is_leaf=lambda x: x is None,
  )
  whole = whole.replace(
    mask=whole.mask & present,
    finished=forked.finished.reshape(num_prompts, rows, 1) & present,
  )
  each = count * branches
  parents = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), each)
  parents = jnp.broadcast_to(parents[None, :, None], (num_prompts, rows, 1))
  forked_at = jnp.repeat(
    fork_positions.reshape(num_prompts, -1), branches, axis=1
  )
  return whole, parents, forked_at[..., None]
