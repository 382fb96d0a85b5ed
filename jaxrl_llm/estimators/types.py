"""The values that flow through an estimator.

Shapes: P prompts, G responses per prompt, T token positions.  `[P, G, 1]` is
constant over a response, `[P, G, T]` is per token.  Index t of any array refers
to token t: `log_probs[..., t]` is the log-probability, in nats, *of*
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
  """Sampled responses and their rewards; optional fields are None if unneeded.

  Attributes:
    tokens: [P, G, T] int32.
    mask: [P, G, T] bool, True where the policy chose the token, EOS included.
    log_probs: [P, G, T] under the trained policy at sampling time, nats.
    rewards: [P, G, 1] of whole responses.
    valid: [P, G, 1] bool, False for an absent row or a reward of None; group
      statistics cover valid responses only.  None if all are valid.
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
    parents: [P, G, 1] int32, index along axis 1 of the row that a row forked
      from, itself for whole responses.  None if all rows are whole responses.
    forked_at: [P, G, 1] int32, number of its parent's tokens that a row starts
      with; 0 for whole responses.
    node_weights: [P, G, T], weight of the node of a weighted prefix tree that
      each token is, inherited ones included; rows are then the tree's leaves,
      and `parents` and `forked_at` may be nested.
    running: {name: scalar}, numbers that outlive a batch: see `Running`.
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
  node_weights: Array | None = None
  running: dict[str, Array] | None = None


@chex.dataclass(frozen=True)
class Batch:
  """Inputs of a loss: `Rollouts` after `prepare`, without gradients.

  Attributes:
    tokens, log_probs: as in `Rollouts`.
    mask: [P, G, T] bool, as in `Rollouts`, but False where a branch repeats its
      parent's tokens, which are trained in the parent's row.
    valid: [P, G, 1] bool, the valid rows that the estimator keeps.
    advantages: [P, G, 1] or [P, G, T], 0 where not valid.
    weights: [P, G, T], 0 outside the mask; they include every normaliser, so
      the loss is a plain sum.
    sampler_log_probs, ref_log_probs, values, entropy: as in `Rollouts`.
    value_targets: [P, G, T], targets of a critic.
    whole: [P, G, 1] bool, True for whole responses, and for one row of each
      tree: N counts only these.  None if all rows are whole.
    shares: [P, G, T], factor of a token's weight for the trained forks before
      it, or the weight of its node; None without either.
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
  """The trained model's outputs for a batch, which the loss differentiates.

  Attributes:
    log_probs: [P, G, T] of the batch's tokens, nats.
    entropy: [P, G, T] of the next-token distributions, nats.
    values: [P, G, T] of a critic, or of a reward model, whose index t scores
      the state *after* token t.
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
      may only read values from earlier batches: otherwise it would contain the
      response that it weights.
  """

  name: str
  initial: float
  update: Callable[[Array, Rollouts], Array]


class Needs(NamedTuple):
  """Inputs that must be sampled or computed before an estimator is applied.

  Attributes:
    samples: minimum number of responses per prompt.
    greedy: the greedy response's reward.
    reference: the reference policy's log-probabilities.
    critic: values of a critic.
    entropy: entropy at sampling time.
    score_norms: squared score norms at sampling time.
    token_rewards: known rewards of tokens.
    branches: a `positions.Branches`, or None.
    tree: a `thresholds.Trees` in place of groups of responses, or None.
    running: numbers that outlive a batch.
    on_policy: the sampling policy must be the one that is updated: the loss has
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
  tree: Any = None
  running: tuple[Running, ...] = ()
  on_policy: bool = False


def merge_needs(*needs: Needs) -> Needs:
  """Returns the smallest `Needs` that satisfies all of `needs`.

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
  trees = {need.tree for need in needs} - {None}
  if len(trees) > 1 or trees and branches:
    raise ValueError('an estimator has one kind of tree, or branches')
  running = tuple(dict.fromkeys(r for need in needs for r in need.running))
  names = [r.name for r in running]
  if len(set(names)) < len(names):
    raise ValueError(
      f'two running numbers of an estimator share a name ({names}): build '
      'one and pass it to both, or rename one'
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
    tree=trees.pop() if trees else None,
    running=running,
    on_policy=any(need.on_policy for need in needs),
  )


def rollout_shapes(
  needs: Needs, prompts: int, samples: int, length: int
) -> Rollouts:
  """Returns the shapes of rollouts with everything that an estimator needs.

  `jax.eval_shape(estimator.prepare, rollout_shapes(…))` checks an estimator
  without data.

  Args:
    needs: needs of the estimator.
    prompts: P.
    samples: G, without the rows of branches that are trained on; not read
      where the estimator needs trees.
    length: T, in tokens.
  """
  wanted = needs.branches
  trained = wanted is not None and wanted.trained
  valued = wanted is not None and not trained
  if trained:
    samples *= 1 + min(wanted.count, max(length - 1, 1)) * wanted.samples
  if needs.tree is not None:
    samples = needs.tree.rows
  related = trained or needs.tree is not None
  array = jax.ShapeDtypeStruct
  shape, whole = (prompts, samples, length), (prompts, samples, 1)
  numbers, count = array(shape, 'float32'), array(whole, 'int32')
  optional = {
    'ref_log_probs': needs.reference,
    'values': needs.critic,
    'entropy': needs.entropy,
    'score_norms': needs.score_norms,
    'token_rewards': needs.token_rewards,
    'branch_values': valued,
    'branch_baselines': valued and wanted.score_weighted,
    'node_weights': needs.tree is not None,
  }
  greedy = array((prompts, 1, 1), 'float32')
  return Rollouts(
    tokens=array(shape, 'int32'),
    mask=array(shape, bool),
    log_probs=numbers,
    valid=array(whole, bool),
    rewards=array(whole, 'float32'),
    greedy_rewards=greedy if needs.greedy else None,
    branch_mask=array(shape, bool) if valued else None,
    parents=count if related else None,
    forked_at=count if related else None,
    running={part.name: array((), 'float32') for part in needs.running},
    **{name: numbers for name, used in optional.items() if used},
  )


class AdvantageTransform(NamedTuple):
  """Maps the flowing array, initially the rewards, to the next one.

  The array is [P, G, 1] or [P, G, T]; every transform receives whole rollouts.

  Attributes:
    apply: (array, rollouts) → array.
    needs: inputs it requires.
    takes, gives: 'response' for [P, G, 1]; 'token reward' or 'token advantage'
      for [P, G, T].  None takes any level and keeps it.
    centres: whether its output is no longer a reward.
    takes_reward: whether its input must be a reward.
  """

  apply: Callable[[Array, Rollouts], Array]
  needs: Needs = Needs()
  takes: str | None = None
  gives: str | None = None
  centres: bool = False
  takes_reward: bool = False


class TokenLoss(NamedTuple):
  """A loss per token; `apply` returns [P, G, T], still to be weighted."""

  apply: Callable[[Outputs, Batch], Array]
  needs: Needs = Needs()


# Maps (outputs, batch) to importance ratios, [P, G, T].
Ratio = Callable[[Outputs, Batch], Array]

# Selects the responses an estimator trains on: [P, G, 1] bool.
Filter = Callable[[Rollouts], Array]

# Maps the mask, [P, G, T] bool and already False where a response is not
# valid, and `valid`, [P, G, 1], True for the responses that count in N, to
# weights [P, G, T].  The mask includes the tokens of branches; N excludes them.
TokenWeights = Callable[[Array, Array], Array]


def valid_responses(rollouts: Rollouts) -> Array:
  """Returns `rollouts.valid`, [P, G, 1] bool, or all True if it is None.

  Branches of an invalid response are invalid.
  """
  if rollouts.valid is None:
    return jnp.ones(rollouts.mask.shape[:2] + (1,), bool)
  if rollouts.parents is None:
    return rollouts.valid
  of_parents = jnp.take_along_axis(rollouts.valid, rollouts.parents, axis=1)
  return rollouts.valid & of_parents


# Arrays of `Rollouts` that are [P, G, T] and meaningless outside the mask.
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
  'node_weights',
)


def blank(mask: Array, x: Array | None) -> Array | None:
  """Sets `x` to 0 where the mask is False, because 0 · NaN is NaN."""
  return None if x is None else jnp.where(mask, x, 0.0)


def blank_rollouts(rollouts: Rollouts) -> Rollouts:
  """Zeros all entries outside the mask, and makes `valid` an array.

  A weight of 0 alone would let garbage through.
  """
  valid = valid_responses(rollouts)
  kept = rollouts.mask & valid
  return rollouts.replace(
    valid=valid,
    rewards=blank(valid, rollouts.rewards),
    **{name: blank(kept, getattr(rollouts, name)) for name in PER_TOKEN},
  )
