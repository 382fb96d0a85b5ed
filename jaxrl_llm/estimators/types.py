"""The values that flow through an estimator.

Shapes: P prompts, G responses per prompt, T token positions.  `[P, G, 1]` is
constant over a response, `[P, G, T]` is per token.  Index t of any array is
about token t: `log_probs[..., t]` is the log-probability, in nats, *of*
`tokens[..., t]`, and `values[..., t]` is the value of the state *before* it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


@chex.dataclass(frozen=True)
class Rollouts:
  """What the policy wrote and what it earned.  None unless needed.

  Attributes:
    tokens: [P, G, T] int32.
    mask: [P, G, T] bool, True where the policy chose the token, EOS included.
    log_probs: [P, G, T] of the policy that is trained, when it sampled, nats.
    rewards: [P, G, 1] of whole responses.
    valid: [P, G, 1] bool, False for an absent row or a reward of None; group
      statistics are taken where valid.  None means that all are.
    sampler_log_probs: [P, G, T], where the sampler's differ from `log_probs`.
    token_rewards: [P, G, T], known per-token rewards.
    greedy_rewards: [P, 1, 1] of the greedy response to each prompt.
    ref_log_probs: [P, G, T] of the reference policy, nats.
    values: [P, G, T] of a critic.
    entropy: [P, G, T] of the policy's next-token distribution, nats.
    score_norms: [P, G, T] squared norm of the score at the logits.
    branch_values: [P, G, T] Monte Carlo value of the state before token t.
    branch_baselines: [P, G, T] score-weighted value of the same state.
    branch_mask: [P, G, T] bool, where the two above are known.
    parents: [P, G, 1] int32, the row along axis 1 that a row forked from, its
      own for whole responses.  None where all rows are whole responses.
    forked_at: [P, G, 1] int32, how many of its parent's tokens a row kept: it
      begins with them.  0 for whole responses.
    running: {name: scalar}, what outlives a batch: see `Running`.
  """

  tokens: Array
  mask: Array
  log_probs: Array
  rewards: Array
  valid: Array | None = None
  sampler_log_probs: Array | None = None
  token_rewards: Array | None = None
  greedy_rewards: Array | None = None
  ref_log_probs: Array | None = None
  values: Array | None = None
  entropy: Array | None = None
  score_norms: Array | None = None
  branch_values: Array | None = None
  branch_baselines: Array | None = None
  branch_mask: Array | None = None
  parents: Array | None = None
  forked_at: Array | None = None
  running: dict[str, Array] | None = None


@chex.dataclass(frozen=True)
class Batch:
  """What a loss sees: `Rollouts` after `prepare`, without gradients.

  Attributes:
    tokens, log_probs: as in `Rollouts`.
    mask: [P, G, T] bool, as in `Rollouts`, but False where a branch keeps its
      parent's tokens: these are trained in the parent's row.
    valid: [P, G, 1] bool, the valid rows that the estimator keeps.
    advantages: [P, G, 1] or [P, G, T], 0 where not valid.
    weights: [P, G, T], 0 outside the mask; they carry every normaliser, so
      the loss is a plain sum.
    sampler_log_probs, ref_log_probs, values, entropy: as in `Rollouts`.
    value_targets: [P, G, T], what a critic should predict.
    whole: [P, G, 1] bool, True for whole responses: N counts only these.  None
      where all rows are.
    shares: [P, G, T], the factor that a token's weight has for standing behind
      forks that are trained on; None without.
  """

  tokens: Array
  mask: Array
  log_probs: Array
  valid: Array
  advantages: Array
  weights: Array
  sampler_log_probs: Array | None = None
  ref_log_probs: Array | None = None
  values: Array | None = None
  value_targets: Array | None = None
  entropy: Array | None = None
  whole: Array | None = None
  shares: Array | None = None


@chex.dataclass(frozen=True)
class Outputs:
  """What the trained model says of a batch; the loss differentiates these.

  Attributes:
    log_probs: [P, G, T] of the batch's tokens, nats.
    entropy: [P, G, T] of the next-token distributions, nats.
    values: [P, G, T] of the critic; of a reward model, whose index t is the
      score of the state *after* token t.
  """

  log_probs: Array
  entropy: Array | None = None
  values: Array | None = None


class Running(NamedTuple):
  """A number that outlives a batch; part of a run's checkpoint.

  Attributes:
    name: its key in `Rollouts.running`.
    initial: its value before the first batch.
    update: (value, rollouts) → the value for the next batch.  An advantage
      may read the value of earlier batches only: else it would contain the
      response that it weighs.
  """

  name: str
  initial: float
  update: Callable[[Array, Rollouts], Array]


class Needs(NamedTuple):
  """What must be sampled or computed before an estimator can be applied.

  Attributes:
    samples: the fewest responses per prompt that make sense.
    greedy: the greedy response's reward.
    reference: the reference policy's log-probabilities.
    critic: values of a critic.
    entropy: entropy at sampling time.
    score_norms: squared score norms at sampling time.
    token_rewards: known rewards of tokens.
    branches: a `positions.Branches`, None without.
    running: numbers that outlive a batch.
    on_policy: that the very policy which is updated has sampled: the loss has
      no importance ratio, so responses serve for one update.
  """

  samples: int = 1
  greedy: bool = False
  reference: bool = False
  critic: bool = False
  entropy: bool = False
  score_norms: bool = False
  token_rewards: bool = False
  branches: Any = None
  running: tuple[Running, ...] = ()
  on_policy: bool = False


def merge_needs(*needs: Needs) -> Needs:
  """The smallest `Needs` that satisfies all of `needs`.

  Raises:
    ValueError: two parts ask for different branches, or for different running
      numbers of the same name.
  """
  branches = {need.branches for need in needs} - {None}
  if len(branches) > 1:
    raise ValueError(
      'two parts of an estimator ask for branches of their own: build one '
      '`branches(…)` and pass it to both'
    )
  running = tuple(dict.fromkeys(r for need in needs for r in need.running))
  names = [r.name for r in running]
  if len(set(names)) < len(names):
    raise ValueError(
      f'two running numbers of an estimator share a name, of {names}: build '
      'one and pass it to both, or name them'
    )
  return Needs(
    samples=max((need.samples for need in needs), default=1),
    greedy=any(need.greedy for need in needs),
    reference=any(need.reference for need in needs),
    critic=any(need.critic for need in needs),
    entropy=any(need.entropy for need in needs),
    score_norms=any(need.score_norms for need in needs),
    token_rewards=any(need.token_rewards for need in needs),
    branches=branches.pop() if branches else None,
    running=running,
    on_policy=any(need.on_policy for need in needs),
  )


class AdvantageTransform(NamedTuple):
  """`apply` maps the flowing array, at first the rewards, to the next one.

  The array is [P, G, 1] or [P, G, T]; every transform gets whole rollouts.

  Attributes:
    apply: (array, rollouts) → array.
    needs: what must be sampled for it.
    takes, gives: 'response' for [P, G, 1]; 'token reward' or 'token advantage'
      for [P, G, T].  None takes any, and gives what was taken.
    centres: whether what it gives is no reward any more.
    takes_reward: whether it has to be given rewards.
  """

  apply: Callable[[Array, Rollouts], Array]
  needs: Needs = Needs()
  takes: str | None = None
  gives: str | None = None
  centres: bool = False
  takes_reward: bool = False


class TokenLoss(NamedTuple):
  """`apply` gives the loss of every token, [P, G, T], to be weighted."""

  apply: Callable[[Outputs, Batch], Array]
  needs: Needs = Needs()


# Maps (outputs, batch) to importance ratios, [P, G, T].
Ratio = Callable[[Outputs, Batch], Array]

# Which responses an estimator trains on: [P, G, 1] bool.
Keep = Callable[[Rollouts], Array]

# Maps the mask, [P, G, T] bool and already False where a response is not
# valid, and `valid`, [P, G, 1], True for the responses that count in N, to
# weights [P, G, T].  Of branches the mask has the tokens, and N does not.
TokenWeights = Callable[[Array, Array], Array]


def valid_responses(rollouts: Rollouts) -> Array:
  """[P, G, 1] bool: `rollouts.valid`, all True where it is None.

  Branches of a response that is not valid are not valid either.
  """
  if rollouts.valid is None:
    return jnp.ones(rollouts.mask.shape[:2] + (1,), bool)
  if rollouts.parents is None:
    return rollouts.valid
  of_parents = jnp.take_along_axis(rollouts.valid, rollouts.parents, axis=1)
  return rollouts.valid & of_parents


# Arrays of `Rollouts` that are [P, G, T] and mean nothing outside the mask.
PER_TOKEN = (
  'log_probs',
  'sampler_log_probs',
  'token_rewards',
  'ref_log_probs',
  'values',
  'entropy',
  'score_norms',
  'branch_values',
  'branch_baselines',
)


def blank(mask: Array, x: Array | None) -> Array | None:
  """`x` with 0 where the mask is False: 0 · NaN is NaN."""
  return None if x is None else jnp.where(mask, x, 0.0)


def blank_rollouts(rollouts: Rollouts) -> Rollouts:
  """Zeros what stands outside the mask; `valid` is an array afterwards.

  A weight of 0 alone would not keep garbage out.
  """
  valid = valid_responses(rollouts)
  kept = rollouts.mask & valid
  return rollouts.replace(
    valid=valid,
    rewards=blank(valid, rollouts.rewards),
    **{name: blank(kept, getattr(rollouts, name)) for name in PER_TOKEN},
  )
