"""Bias and variance of gradient estimators on a model of any size.

An estimator's gradient g is drawn repeatedly and independently, and so is a
reference whose mean is taken for the true gradient G = ∇J.  Reports are built
from means of inner products ⟨gᵢ, gⱼ⟩ over *different* draws, which estimate
‖E g‖², ⟨E g, G⟩ and ‖G‖² without bias, however noisy the draws.

  draws = audit.draw_gradients(lambda i: ({'all': gradient(i)}, tokens), …)
  report = audit.compare(draws['all'], reference)

Only inner products are needed: for a large model, sketches of the gradients
are kept, which preserve them.

Shapes: n draws of an estimator, m of the reference, D parameters, d numbers
kept per draw.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.audit.estimates import Estimate, jackknife

Array = jax.Array

_COLUMNS = 2**16  # of the draws, converted to float64 at a time


class Gradients(NamedTuple):
  """Independent draws of a gradient.

  Attributes:
    vectors: [n, d] float32, the gradients or their sketches.
    squared_norms: [n] float64, of the gradients themselves.
    tokens: [n], generated for each draw.
  """

  vectors: np.ndarray
  squared_norms: np.ndarray
  tokens: np.ndarray


class Report(NamedTuple):
  """An estimator's gradient g compared with the true gradient G.

  Attributes:
    draws: n.
    tokens: generated for one g, on average.
    squared_bias: ‖E g − G‖² / ‖G‖².  An unbiased estimate: may be negative.
    scale: ⟨E g, G⟩ / ‖G‖², the multiple of G that is nearest to E g.
    cosine: of the angle between E g and G.
    squared_tilt: 1 − cos², the squared bias that remains at the best scale:
      ‖s E g − G‖² / ‖G‖², whatever the step size.  May be negative.
    variance: tr Cov g / ‖G‖².
    signal: to noise per 1,000 generated tokens,
      1000 / tokens · ‖E g‖² cos² / tr Cov g.  The scale of g does not matter;
      unbiased estimators have cos = 1.
  """

  draws: int
  tokens: float
  squared_bias: Estimate
  scale: Estimate
  cosine: Estimate
  squared_tilt: Estimate
  variance: Estimate
  signal: Estimate


class Share(NamedTuple):
  """Contribution of a part h to an estimator's gradient g = h + ….

  Attributes:
    squared_norm: ‖E h‖² / ‖E g‖².
    progress: ⟨E h, G⟩ / ⟨E g, G⟩, of the step along the true gradient.
    cosine: of the angle between E h and G; NaN for a part that is 0.
    variance: tr Cov h / tr Cov g.
  """

  squared_norm: Estimate
  progress: Estimate
  cosine: Estimate
  variance: Estimate


def sketch(tree: Any, dimension: int, seed: int = 0) -> Array:
  """Sums parameters, with random signs, in random buckets: a count sketch.

    E⟨Sx, Sy⟩ = ⟨x, y⟩,   Var⟨Sx, Sy⟩ ≤ (‖x‖² ‖y‖² + ⟨x, y⟩²) / d

  S is linear and the same for all: the squared norm of any combination of
  gradients is preserved within a factor 1 ± √(2 / d).

  Args:
    tree: arrays, D numbers in all.
    dimension: d, a power of two.
    seed: of S.

  Returns:
    [d] float32.

  Raises:
    ValueError: `dimension` is not a power of two.
  """
  if dimension < 1 or dimension & (dimension - 1):
    raise ValueError(f'{dimension=} has to be a power of two')
  sums = jnp.zeros(dimension, jnp.float32)
  for i, leaf in enumerate(jax.tree.leaves(tree)):
    key = jax.random.fold_in(jax.random.key(seed), i)
    bits = jax.random.bits(key, (leaf.size,), jnp.uint32)
    sign = 1.0 - 2.0 * (bits >> 31).astype(jnp.float32)
    bucket = (bits & jnp.uint32(dimension - 1)).astype(jnp.int32)
    sums = sums.at[bucket].add(sign * leaf.reshape(-1).astype(jnp.float32))
  return sums


@functools.partial(jax.jit, static_argnames='dimension')
def _kept(tree: Any, dimension: int | None) -> tuple[Array, list[Array]]:
  """Returns the numbers kept of a gradient, [d], and its leaves' squares."""
  leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
  squares = [jnp.square(leaf).sum() for leaf in leaves]
  if dimension is None:
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), squares
  return sketch(leaves, dimension), squares


def draw_gradients(
  draw: Callable[[int], tuple[Mapping[str, Any], int]],
  *,
  tokens: int,
  least: int = 16,
  dimension: int | None = None,
) -> dict[str, Gradients]:
  """Draws gradients until they have cost a budget of generated tokens.

  Args:
    draw: i → ({name: gradient, any tree}, tokens generated).  Independent
      for different i.  Several names are parts of one gradient, or several
      estimators on the same responses.
    tokens: the budget.
    least: minimum number of draws, at least 4.
    dimension: d of `sketch`; None keeps whole gradients, n · D numbers.
      Gradients to be compared must share it.

  Raises:
    ValueError: `least` is too small, or a gradient is not finite.
  """
  if least < 4:
    raise ValueError(f'{least=}: standard errors need at least 4 draws')
  draws, spent = {}, []
  while len(spent) < least or sum(spent) < tokens:
    parts, cost = draw(len(spent))
    spent.append(cost)
    for name, tree in parts.items():
      vector, squares = jax.device_get(_kept(tree, dimension))
      square = math.fsum(squares)
      if not math.isfinite(square):
        raise ValueError(f'{name}: gradient {len(spent) - 1} is not finite')
      draws.setdefault(name, []).append((vector, square))
  return {
    name: Gradients(
      vectors=np.stack([vector for vector, _ in kept]),
      squared_norms=np.array([square for _, square in kept]),
      tokens=np.array(spent),
    )
    for name, kept in draws.items()
  }


def compare(gradients: Gradients, reference: Gradients) -> Report:
  """Estimates bias, variance and signal of an estimator's gradient.

  Args:
    gradients: n ≥ 4 draws of the estimator's gradient.
    reference: m ≥ 4 draws, independent of these, whose mean is G.

  Raises:
    ValueError: too few draws, or sketches of different sizes.
  """
  of = _moments(gradients, reference)
  estimate = functools.partial(jackknife, len(gradients.vectors))
  with np.errstate(invalid='ignore', divide='ignore'):
    return Report(
      draws=len(gradients.vectors),
      tokens=float(gradients.tokens.mean()),
      squared_bias=estimate((of.squared - 2 * of.cross + of.true) / of.true),
      scale=estimate(of.cross / of.true),
      cosine=estimate(of.cross / np.sqrt(of.squared * of.true)),
      squared_tilt=estimate(1.0 - of.squared_cross / (of.squared * of.true)),
      variance=estimate(of.variance / of.true),
      signal=estimate(
        1000 / of.tokens * of.squared_cross / (of.true * of.variance)
      ),
    )


def relative_error(reference: Gradients) -> float:
  """Returns √(tr Cov g / n) / ‖G‖, the error of the mean of n ≥ 4 draws."""
  n = len(reference.vectors)
  true = _squared_mean(_products(reference.vectors, reference.vectors))[0]
  variance = max(reference.squared_norms.mean() - true, 0.0)
  return math.sqrt(variance / n / true) if true > 0 else math.nan


def between_prompts(
  fresh: Gradients, fixed: Gradients, prompts: int
) -> Estimate:
  """Returns the variance of one prompt's true gradient, in ‖E g‖².

    P (tr Cov g_fresh − tr Cov g_fixed) / ‖E g_fresh‖²

  Args:
    fresh: n ≥ 4 draws, each on other prompts.
    fixed: m ≥ 4 draws of the same estimator on the same prompts.
    prompts: P of each draw.
  """
  of, same = _moments(fresh, fixed), _moments(fixed, fresh).variance
  n, m = len(fresh.vectors), len(fixed.vectors)
  # In the order of `of`: all, without one of fresh, without one of fixed.
  same = np.concatenate([same[:1], same[1 + m :], same[1 : 1 + m]])
  return jackknife(n, prompts * (of.variance - same) / of.squared)


def share(part: Gradients, whole: Gradients, reference: Gradients) -> Share:
  """Estimates the contribution of a part of each gradient to the whole.

  Args:
    part, whole: n ≥ 4 draws, the i-th of one is a part of the other's i-th.
    reference: m ≥ 4 draws, independent of these, whose mean is G.

  Raises:
    ValueError: as `compare`, or unequal numbers of draws.
  """
  n = len(whole.vectors)
  if len(part.vectors) != n:
    raise ValueError(f'{len(part.vectors)} draws of a part, {n} of the whole')
  of, all_ = _moments(part, reference), _moments(whole, reference)
  estimate = functools.partial(jackknife, n)
  with np.errstate(invalid='ignore', divide='ignore'):
    return Share(
      squared_norm=estimate(of.squared / all_.squared),
      progress=estimate(of.cross / all_.cross),
      cosine=estimate(of.cross / np.sqrt(of.squared * of.true)),
      variance=estimate(of.variance / all_.variance),
    )


class _Moments(NamedTuple):
  """Moments of an estimator g and a reference with mean G.

  Each is [1 + n + m]: of all draws, with each of g's left out, with each of the
  reference's left out.
  """

  squared: np.ndarray  # ‖E g‖²
  variance: np.ndarray  # tr Cov g
  tokens: np.ndarray
  true: np.ndarray  # ‖G‖²
  cross: np.ndarray  # ⟨E g, G⟩
  squared_cross: np.ndarray  # ⟨E g, G⟩²


def _moments(gradients: Gradients, reference: Gradients) -> _Moments:
  (n, size), (m, others) = gradients.vectors.shape, reference.vectors.shape
  if min(n, m) < 4:
    raise ValueError(f'{min(n, m)} draws: standard errors need at least 4')
  if size != others:
    raise ValueError(
      f'vectors of {size} and {others} numbers: draw both with one dimension'
    )
  squared = _squared_mean(_products(gradients.vectors, gradients.vectors))
  squared = np.concatenate([squared, np.full(m, squared[0])])
  true = _squared_mean(_products(reference.vectors, reference.vectors))
  true = np.concatenate([true[:1], np.full(n, true[0]), true[1:]])
  products = _products(gradients.vectors, reference.vectors)
  cross = (
    np.concatenate([x, y[1:]])
    for x, y in zip(_cross_sums(products), _cross_sums(products.T), strict=True)
  )
  variance = _mean(gradients.squared_norms, m) - squared
  tokens = _mean(gradients.tokens, m)
  return _Moments(squared, variance, tokens, true, *cross)


def _products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the inner products of rows, [n, m] float64."""
  products = np.zeros((len(x), len(y)))
  for start in range(0, x.shape[1], _COLUMNS):
    part = slice(start, start + _COLUMNS)
    products += x[:, part].astype(float) @ y[:, part].astype(float).T
  return products


def _mean(x: np.ndarray, m: int) -> np.ndarray:
  """Returns [1 + n + m] means: of all, of all but each, and m times of all."""
  n = len(x)
  left_out = (x.sum() - x) / (n - 1)
  return np.concatenate([[x.mean()], left_out, np.full(m, x.mean())])


def _squared_mean(products: np.ndarray) -> np.ndarray:
  """Returns [1 + n] means over pairs of different rows: all, all but each."""
  n, diagonal = len(products), np.diagonal(products)
  total = products.sum() - diagonal.sum()
  without = total - 2 * (products.sum(axis=1) - diagonal)
  return np.concatenate(
    [[total / (n * (n - 1))], without / ((n - 1) * (n - 2))]
  )


def _cross_sums(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns ⟨E g, G⟩ and its square, [1 + n] each: all rows, all but each.

  The square is the mean of K[i, j] K[i', j'] over i ≠ i' and j ≠ j'.
  """
  n, m = products.shape
  rows, columns = products.sum(axis=1), products.sum(axis=0)
  squares = np.square(products).sum(axis=1)
  total = rows.sum() - np.array([0.0, *rows])
  by_rows = np.square(rows).sum() - np.array([0.0, *np.square(rows)])
  change = squares - 2 * products @ columns
  by_columns = np.square(columns).sum() + np.array([0.0, *change])
  entries = squares.sum() - np.array([0.0, *squares])
  count = np.array([n] + [n - 1] * n)
  distinct = np.square(total) - by_rows - by_columns + entries
  pairs = count * (count - 1) * m * (m - 1)
  return total / (count * m), distinct / pairs
