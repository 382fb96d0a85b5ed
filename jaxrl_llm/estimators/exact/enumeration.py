"""Exact bias and variance of an estimator on a toy language.

Every response is listed, so the gradient of E[R] is a finite sum, and so is the
expected gradient of an estimator over everything random: groups, greedy
responses, branches, random positions.  To test a new estimator in ten lines:

  from jaxrl_llm import estimators as est

  mine = est.estimator(
    est.chain(est.subtract_group_mean(), est.at_every_token()),
    est.clipped(0.2),
    est.sequence_mean(),
  )
  toy = est.enumeration.toy(seed=0, words=2, max_length=3)
  report = est.enumeration.examine(mine, toy, samples=3)
  print(f'{report.bias:.0%} off, cosine {report.cosine:.3f}')

Vary a toy with `toy._replace(rewards=…)`.  Everything is computed in float64.

Shapes: P prompts, N responses, S prefixes (states), T the length limit in
tokens, V words and EOS.  The N responses are the same for every prompt; their
probabilities and rewards are not.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxrl_llm.estimators.compose import Estimator
from jaxrl_llm.estimators.exact.growth import Leaves, as_rows, list_trees
from jaxrl_llm.estimators.exact.languages import (
  Toy,
  check_toy,
  discounted,
  exact_gradient,
  exact_values,
  floats,
  greedy_responses,
  in_float64,
  old_logits,
  response_probabilities,
  sampling_probabilities,
  toy,
)
from jaxrl_llm.estimators.exact.outcomes import (
  Forest,
  Slots,
  combine,
  draw,
  draw_listed,
  list_slots,
)
from jaxrl_llm.estimators.types import Array, Outputs, Rollouts

__all__ = [
  'Report',
  'Toy',
  'discounted',
  'exact_gradient',
  'exact_values',
  'examine',
  'expected_gradient',
  'response_probabilities',
  'toy',
]

_CHUNK = 2**12  # combinations at a time, and fewer where
_FLOATS = 2**23  # they would need more memory than this


class Report(NamedTuple):
  """Mean and variance of an estimator's gradient.

  Attributes:
    gradient: E[g], g = −∇ loss, a tree like `Toy.params`.
    exact_gradient: ∇J, likewise.
    bias: ‖E[g] − ∇J‖ / ‖∇J‖.
    cosine: of the angle between E[g] and ∇J; 1 where only the scale differs.
    scale: the multiple of ∇J that is nearest to E[g].
    variance: E‖g‖² − ‖E[g]‖², the trace of the covariance.
    standard_error: of E[g], relative to ‖∇J‖; 0 for a sum of all combinations.
    tokens: expected number of tokens that one g costs: responses, greedy
      responses and branches.
    draws: number of combinations that were summed, or drawn.
    exact: True if these are all combinations, weighted by probability.
  """

  gradient: Any
  exact_gradient: Any
  bias: float
  cosine: float
  scale: float
  variance: float
  standard_error: float
  tokens: float
  draws: int
  exact: bool


@in_float64
def examine(
  estimator: Estimator,
  toy: Toy,
  samples: int = 2,
  *,
  exact: Any = None,
  running: dict[str, float] | None = None,
  limit: int = 200_000,
  draws: int = 20_000,
  seed: int = 0,
) -> Report:
  """Computes the mean and variance of an estimator's gradient g = −∇ loss.

  The mean is over groups of `samples` responses to every prompt, their
  branches and random positions (each response draws its own).  All
  combinations are summed if there are at most `limit`; else `draws` of them
  are drawn, and `standard_error` is that of the mean.

  Args:
    estimator: any; a critic's own gradient is excluded.
    toy: language, policy and reward.
    samples: G; not read where the estimator needs trees.
    exact: the gradient to compare with; `exact_gradient(toy)` if None.
    running: values of the estimator's running numbers; their initial ones if
      None.
    limit: maximum number of combinations to sum.
    draws: number of combinations to draw otherwise.
    seed: of the draws.

  Raises:
    ValueError: too few samples, an array of the toy of a wrong shape, or an
      exact gradient of 0.
  """
  exact = exact_gradient(toy) if exact is None else exact
  flat = np.asarray(ravel_pytree(floats(exact))[0])
  norm = math.sqrt(flat @ flat)
  if norm <= 1e-13 * np.abs(toy.rewards).max():
    raise ValueError(
      'the exact gradient is 0, so a relative bias has no meaning: use '
      'different rewards, or pass the gradient to compare with as `exact`'
    )
  mean, square, tokens, count, whole = _moments(
    estimator, toy, samples, running, limit, draws, seed
  )
  variance = max(square - mean @ mean, 0.0)
  size = math.sqrt(mean @ mean)
  return Report(
    gradient=_like_params(toy, mean),
    exact_gradient=exact,
    bias=math.sqrt(np.square(mean - flat).sum()) / norm,
    cosine=float(mean @ flat / (size * norm)) if size else 0.0,
    scale=float(mean @ flat / norm**2),
    variance=float(variance),
    standard_error=0.0 if whole else math.sqrt(variance / count) / norm,
    tokens=float(tokens),
    draws=count,
    exact=whole,
  )


@in_float64
def expected_gradient(
  estimator: Estimator,
  toy: Toy,
  samples: int = 2,
  *,
  running: dict[str, float] | None = None,
  limit: int = 200_000,
  draws: int = 20_000,
  seed: int = 0,
) -> Any:
  """Returns E[−∇ loss], a tree like `Toy.params`; arguments as in `examine`."""
  mean, *_ = _moments(estimator, toy, samples, running, limit, draws, seed)
  return _like_params(toy, mean)


def _moments(estimator, toy, samples, running, limit, draws, seed):
  """Returns (E g [D], E‖g‖², tokens of one g, combinations, `exact`)."""
  check_toy(toy)
  needs = estimator.needs
  if samples < needs.samples:
    raise ValueError(
      f'this estimator needs at least {needs.samples} responses per prompt: '
      f'{samples=} is too few'
    )
  if needs.token_rewards and toy.token_rewards is None:
    raise ValueError(
      'this estimator needs rewards of tokens: use toy(gamma=…) or '
      'toy._replace(token_rewards=…)'
    )
  tables = _tabulate(toy)
  p = sampling_probabilities(toy)
  if running is None:
    running = {part.name: part.initial for part in needs.running}
  running = floats(running)
  forest = needs.branches and _plant(toy, tables, p, needs.branches, running)
  if needs.tree:
    trees, samples = _trees(toy, needs.tree, limit), needs.tree.count
    rows = needs.tree.rule.at_most
    total = math.prod(len(leaves.weight) for leaves in trees) ** samples
    lists = trees if total <= limit else None
  else:
    lists = list_slots(p, forest, samples, limit)
    rows = 1 + forest.most * forest.samples if forest and forest.trained else 1
  shape = (len(p), samples)
  size = math.prod(shape) * rows * toy.mask.shape[1] * tables.scores.shape[-1]
  size = min(_CHUNK, 2 ** int(math.log2(max(_FLOATS / size, 1))))
  if lists is None:
    random = np.random.default_rng(seed)
    if needs.tree:
      chunks = draw_listed(trees, shape, draws, size, random)
    else:
      chunks = draw(p, forest, shape, draws, size, random)
  else:
    chunks = combine(lists, shape, size)
    draws = math.prod(len(slots.weight) for slots in lists) ** samples
  mean, square = 0.0, 0.0
  summed = _summed(estimator.prepare, estimator.loss)
  for weights, slots in chunks:
    add = summed(tables, running, weights, slots)
    mean, square = mean + np.asarray(add[0]), square + float(add[1])
  lengths = toy.mask.sum(axis=1)
  tokens = samples * (p @ lengths).sum()
  if needs.tree:
    tokens = samples * sum(x.weight @ x.nodes for x in trees)
  if needs.greedy:
    tokens += lengths[greedy_responses(toy)].sum()
  if forest:
    tokens += samples * forest.tokens(p)
  return mean, square, tokens, draws, lists is not None


def _trees(toy: Toy, wanted, limit) -> list[Leaves]:
  """Lists the trees that the sampling policy grows."""
  logits = old_logits(toy) if toy.sampler is None else floats(toy.sampler)
  return list_trees(toy, logits, wanted, limit)


def _plant(toy: Toy, tables, p, branches, running) -> Forest:
  """Builds the branches of all responses, scored by the toy's rewards."""
  rewards = toy.rewards if toy.branch_rewards is None else toy.branch_rewards
  every = np.broadcast_to(np.arange(p.shape[1]), p.shape)
  # NumPy arrays, so that nothing is compiled op by op.
  tables = jax.tree.map(np.asarray, tables)
  rows = _rollouts(tables, every, running=running)
  rows = rows.replace(rewards=floats(rewards)[..., None])
  return Forest(toy, rows, p, branches)


class _Tables(NamedTuple):
  """Arrays of each response to each prompt, [P, N, T] unless noted."""

  tokens: Array  # [N, T]
  mask: Array  # [N, T]
  log_probs: Array  # of the policy that is trained
  next_entropy: Array  # of the same
  scores: Array  # [P, N, T, D], gradients of `log_probs`
  entropy_scores: Array  # [P, N, T, D], of `next_entropy`
  old_log_probs: Array  # of the policy that sampled
  entropy: Array  # of the same, as `score_norms`
  score_norms: Array
  sampler_log_probs: Array | None
  ref_log_probs: Array
  values: Array
  token_rewards: Array | None
  rewards: Array  # [P, N, 1]
  greedy_rewards: Array  # [P, 1, 1]


def _tabulate(toy: Toy) -> _Tables:
  optional = {'sampler': toy.sampler, 'token_rewards': toy.token_rewards}
  optional = {k: floats(x) for k, x in optional.items() if x is not None}
  greedy = np.array(greedy_responses(toy))[:, None]
  return _tabulated(
    toy.logits,
    floats(toy.params),
    floats(old_logits(toy)),
    floats((toy.reference, toy.values)),
    optional,
    toy.tokens,
    toy.mask,
    toy.states,
    floats(toy.rewards)[..., None],
    floats(np.take_along_axis(toy.rewards, greedy, axis=1))[..., None],
  )


@functools.partial(jax.jit, static_argnums=0)
def _tabulated(
  logits, params, old, others, optional, tokens, mask, states, rewards, greedy
) -> _Tables:
  flat, unravel = ravel_pytree(params)
  log = lambda x: jax.nn.log_softmax(x, axis=-1)
  rows = lambda flat: log(logits(unravel(flat)))
  entropy = lambda rows: -(jnp.exp(rows) * rows).sum(axis=-1)
  here = lambda x: x[:, states, tokens]
  before = lambda x: x[:, states]
  known = dict(optional)
  if 'sampler' in known:
    known['sampler'] = log(known['sampler'])
  known = {name: here(x) for name, x in known.items()}
  old = log(old)
  norms = 1 - 2 * jnp.exp(old) + jnp.exp(2 * old).sum(axis=-1, keepdims=True)
  return _Tables(
    tokens=tokens,
    mask=mask,
    log_probs=here(rows(flat)),
    next_entropy=before(entropy(rows(flat))),
    scores=here(jax.jacrev(rows)(flat)),
    entropy_scores=before(jax.jacrev(lambda x: entropy(rows(x)))(flat)),
    old_log_probs=here(old),
    entropy=before(entropy(old)),
    score_norms=here(norms),
    sampler_log_probs=known.get('sampler'),
    ref_log_probs=here(log(others[0])),
    values=before(others[1]),
    token_rewards=known.get('token_rewards'),
    rewards=rewards,
    greedy_rewards=greedy,
  )


def _rollouts(tables: _Tables, response: Array, **fields) -> Rollouts:
  """Builds rollouts of the responses numbered `response`, [P, G]."""
  pick = functools.partial(_at, response)
  return Rollouts(
    tokens=tables.tokens[response],
    mask=tables.mask[response],
    log_probs=pick(tables.old_log_probs),
    rewards=pick(tables.rewards),
    sampler_log_probs=pick(tables.sampler_log_probs),
    token_rewards=pick(tables.token_rewards),
    greedy_rewards=tables.greedy_rewards,
    ref_log_probs=pick(tables.ref_log_probs),
    values=pick(tables.values),
    entropy=pick(tables.entropy),
    score_norms=pick(tables.score_norms),
    **fields,
  )


def _at(response: Array, table: Array | None) -> Array | None:
  """Selects responses, [P, G], from a table: [P, N, ...] → [P, G, ...]."""
  prompts = np.arange(response.shape[0])[:, None]
  return None if table is None else table[prompts, response]


def _branch_rows(slots: Slots) -> tuple[Array, dict[str, Array]]:
  """Returns response numbers of all rows, and the relations of the rows."""
  prompts, samples, most, branches = slots.ends.shape
  flat = lambda x: x.reshape(prompts, -1)
  index = jnp.broadcast_to(jnp.arange(samples), (prompts, samples))
  join = lambda *x: jnp.concatenate(x, axis=1)
  parents = jnp.repeat(index, most * branches, axis=1)
  forked_at = jnp.repeat(flat(slots.fork_positions), branches, axis=1)
  fields = {
    'parents': join(index, parents),
    'forked_at': join(jnp.zeros_like(index), forked_at),
    'valid': join(jnp.ones_like(index, bool), forked_at > 0),
  }
  fields = {name: x[..., None] for name, x in fields.items()}
  return join(slots.response, flat(slots.ends)), fields


@functools.lru_cache(maxsize=256)
def _summed(prepare, loss):
  """(tables, running, weights [b], slots [b, P, G]) → Σ w g [D], Σ w ‖g‖²."""

  def gradient(tables, running, slots):
    response, fields = slots.response, {}
    if isinstance(slots, Leaves):
      response, fields = as_rows(slots)
    elif slots.ends is not None:
      response, fields = _branch_rows(slots)
    elif slots.forks is not None:
      fields = {
        'branch_values': slots.values,
        'branch_baselines': slots.baselines,
        'branch_mask': slots.forks,
      }
    pick = functools.partial(_at, response)
    rollouts = _rollouts(tables, response, running=running, **fields)
    if isinstance(slots, Leaves):
      rollouts = rollouts.replace(mask=rollouts.mask & rollouts.valid)
    batch = prepare(rollouts)

    def objective(log_probs, entropy):
      outputs = Outputs(
        log_probs=log_probs, entropy=entropy, values=pick(tables.values)
      )
      return -loss(outputs, batch)

    by_log_probs, by_entropy = jax.grad(objective, argnums=(0, 1))(
      pick(tables.log_probs), pick(tables.next_entropy)
    )
    return jnp.einsum(
      'pgt,pgtd->d', by_log_probs, pick(tables.scores)
    ) + jnp.einsum('pgt,pgtd->d', by_entropy, pick(tables.entropy_scores))

  def total(tables, running, weights, slots):
    g = jax.vmap(gradient, (None, None, 0))(tables, running, slots)
    return weights @ g, weights @ jnp.square(g).sum(axis=1)

  # Compilation takes longer than the run, so it does not optimise.
  return jax.jit(total, compiler_options={'xla_backend_optimization_level': 0})


def _like_params(toy: Toy, flat: np.ndarray) -> Any:
  _, unravel = ravel_pytree(floats(toy.params))
  return jax.tree.map(np.asarray, unravel(jnp.asarray(flat)))
