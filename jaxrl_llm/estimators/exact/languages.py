"""Toy languages whose every response is listed, so means are finite sums.

Shapes: P prompts, N responses, S prefixes (states), T the length limit in
tokens, V words and EOS.  The N responses are the same for every prompt; their
probabilities and rewards are not.  Everything is computed in float64.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.estimators.types import Array

_MOST_RESPONSES = 1000


class Toy(NamedTuple):
  """A language, a policy for it and a reward.

  Attributes:
    responses: N tuples of tokens; the last token id is EOS.
    prefixes: S tuples of tokens, the states in which a token is chosen.
    tokens, mask: [N, T] of the responses.
    states: [N, T], the index in `prefixes` of the state before each token.
    params: of the policy, any tree; the gradient is taken at these.
    rewards: [P, N].
    reference: [P, S, V] logits of the reference policy.
    values: [P, S] of a critic.
    logits: params → [P, S, V]; the parameters themselves if tabular.
    old_params: of the policy that sampled; None for `params`.
    sampler: [P, S, V] logits of the program that sampled, where it differs.
    token_rewards: [P, S, V], for estimators that need known rewards of tokens.
      They are not part of `rewards` by themselves: see `discounted`.
    branch_rewards: [P, N], if branches are not scored by `rewards`, a mistake
      whose bias can be studied.
  """

  responses: tuple[tuple[int, ...], ...]
  prefixes: tuple[tuple[int, ...], ...]
  tokens: np.ndarray
  mask: np.ndarray
  states: np.ndarray
  params: Any
  rewards: np.ndarray
  reference: np.ndarray
  values: np.ndarray
  logits: Callable[[Any], Array] = lambda params: params
  old_params: Any = None
  sampler: np.ndarray | None = None
  token_rewards: np.ndarray | None = None
  branch_rewards: np.ndarray | None = None


def in_float64(function):
  """Runs a function in float64 on the CPU, whatever the caller's setting."""

  @functools.wraps(function)
  def wrapped(*args, **kwargs):
    cpu = jax.local_devices(backend='cpu')[0]
    with jax.enable_x64(True), jax.default_device(cpu):
      return function(*args, **kwargs)

  return wrapped


def toy(
  seed: int = 0,
  *,
  words: int = 2,
  max_length: int = 3,
  prompts: int = 1,
  gamma: float | None = None,
) -> Toy:
  """Builds a language with a random policy, reward, reference and critic.

  Args:
    seed: of all random numbers.
    words: tokens besides EOS.
    max_length: T, tokens; a response ends with EOS or here.
    prompts: P.
    gamma: if given, token rewards are drawn, and their sum discounted by γ
      is the reward; else rewards are drawn, with mean 1 and deviation 1.

  Raises:
    ValueError: there would be too many responses to list.
  """
  if words < 1 or max_length < 1 or prompts < 1:
    raise ValueError(f'{words=}, {max_length=} and {prompts=} must be positive')
  count = sum(words**t for t in range(max_length)) + words**max_length
  if count > _MOST_RESPONSES:
    raise ValueError(
      f'{words=} and {max_length=} make {count} responses, too many to list; '
      f'at most {_MOST_RESPONSES}: use fewer words or a shorter limit'
    )
  responses = tuple(_grow((), words, max_length))
  prefixes = tuple(sorted({r[:t] for r in responses for t in range(len(r))}))
  row = {prefix: i for i, prefix in enumerate(prefixes)}
  pad = lambda x: [*x] + [0] * (max_length - len(x))
  states = [pad([row[r[:t]] for t in range(len(r))]) for r in responses]
  random = np.random.default_rng(seed)
  shape = (prompts, len(prefixes), words + 1)
  made = Toy(
    responses=responses,
    prefixes=prefixes,
    tokens=np.array([pad(r) for r in responses], np.int32),
    mask=np.array([pad([1] * len(r)) for r in responses], bool),
    states=np.array(states),
    params=random.normal(size=shape),
    rewards=random.normal(1.0, 1.0, (prompts, count)),
    reference=random.normal(size=shape),
    values=random.normal(1.0, 1.0, shape[:2]),
  )
  if gamma is None:
    return made
  token_rewards = random.normal(size=shape)
  return made._replace(
    token_rewards=token_rewards,
    rewards=discounted(made, token_rewards, gamma),
  )


def discounted(
  toy: Toy, token_rewards: np.ndarray, gamma: float = 1.0
) -> np.ndarray:
  """Returns rewards of responses, [P, N], Σₜ γ^{t−1} rₜ, from token rewards.

  Args:
    toy: the language.
    token_rewards: [P, S, V] of each token in each state.
    gamma: γ.
  """
  powers = gamma ** np.arange(toy.mask.shape[1]) * toy.mask
  return (token_rewards[:, toy.states, toy.tokens] * powers).sum(axis=2)


@in_float64
def response_probabilities(toy: Toy) -> np.ndarray:
  """Returns the probabilities of all responses under `params`, [P, N]."""
  return _of_responses(toy, toy.logits(floats(toy.params)))


@in_float64
def exact_values(toy: Toy) -> np.ndarray:
  """Returns U, [P, S]: the mean reward of the responses through a state."""
  p = response_probabilities(toy)
  passing = through(toy)
  return (p * toy.rewards) @ passing / (p @ passing)


@in_float64
def exact_gradient(toy: Toy, kl: float = 0.0) -> Any:
  """Returns ∇ of E[R] − β KL(π‖π_ref), averaged over prompts, like `params`.

  It is a sum over all responses, by definition; no estimator is involved.

  Args:
    toy: language, policy and reward.
    kl: β, in units of the reward per nat.
  """
  check_toy(toy)

  gradient = _gradient(
    toy.logits,
    floats(toy.params),
    (toy.tokens, toy.mask, toy.states),
    floats((toy.reference, toy.rewards, kl)),
  )
  return jax.tree.map(np.asarray, gradient)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(logits, params, language, others):
  reference, rewards, kl = others

  def objective(params):
    p = _probabilities(*language, logits(params))
    ratio = jnp.log(p) - jnp.log(_probabilities(*language, reference))
    return jnp.mean((p * (rewards - kl * ratio)).sum(axis=1))

  return jax.grad(objective)(params)


def _grow(prefix, words, max_length) -> list[tuple[int, ...]]:
  if len(prefix) == max_length or prefix[-1:] == (words,):
    return [prefix]
  longer = ((*prefix, token) for token in range(words + 1))
  return [r for x in longer for r in _grow(x, words, max_length)]


def through(toy: Toy) -> np.ndarray:
  """Returns 1 where a response passes through a state, [N, S]."""
  passing = np.zeros((len(toy.responses), len(toy.prefixes)))
  n, t = np.nonzero(toy.mask)
  passing[n, toy.states[n, t]] = 1.0
  return passing


@jax.jit
def _probabilities(tokens, mask, states, logits: Array) -> Array:
  rows = jax.nn.log_softmax(logits, axis=-1)
  log_probs = rows[:, states, tokens]
  return jnp.exp(jnp.where(mask[None], log_probs, 0.0).sum(axis=2))


def _of_responses(toy: Toy, logits: Array) -> np.ndarray:
  language = toy.tokens, toy.mask, toy.states
  return np.asarray(_probabilities(*language, floats(logits)))


def old_logits(toy: Toy) -> Array:
  """Returns the logits of the trained policy at sampling time, [P, S, V]."""
  old = toy.params if toy.old_params is None else toy.old_params
  return toy.logits(floats(old))


def sampling_probabilities(toy: Toy) -> np.ndarray:
  """Returns the probabilities of drawing each response or branch, [P, N]."""
  logits = old_logits(toy) if toy.sampler is None else toy.sampler
  return _of_responses(toy, logits)


def greedy_responses(toy: Toy) -> list[int]:
  """Returns the index of each prompt's greedy response."""
  row = {prefix: i for i, prefix in enumerate(toy.prefixes)}
  indices = []
  for best in np.asarray(old_logits(toy)).argmax(axis=-1):
    response = ()
    while response in row:
      response = (*response, int(best[row[response]]))
    indices.append(toy.responses.index(response))
  return indices


def floats(tree: Any) -> Any:
  """Converts a tree to float64 arrays that are not tied to a device."""
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)


def check_toy(toy: Toy) -> None:
  """Raises ValueError if an array of the toy has the wrong shape."""
  prompts, states = np.shape(toy.rewards)[0], len(toy.prefixes)
  tokens = max(map(max, toy.responses)) + 1
  logits = jax.eval_shape(toy.logits, floats(toy.params))
  shapes = {
    'logits(params)': (logits, (prompts, states, tokens)),
    'rewards': (toy.rewards, (prompts, len(toy.responses))),
    'branch_rewards': (toy.branch_rewards, (prompts, len(toy.responses))),
    'reference': (toy.reference, (prompts, states, tokens)),
    'sampler': (toy.sampler, (prompts, states, tokens)),
    'token_rewards': (toy.token_rewards, (prompts, states, tokens)),
    'values': (toy.values, (prompts, states)),
  }
  for name, (array, shape) in shapes.items():
    if array is not None and np.shape(array) != shape:
      raise ValueError(f'toy: {name} has to be {shape}, not {np.shape(array)}')
