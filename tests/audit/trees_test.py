"""The limits of trees, against closed forms and brute force."""

import itertools

import numpy as np
import pytest

from jaxrl_llm import audit


def even(length, last=None):
  """One cluster twice: rewards that are decided evenly, or in the last tokens.

  R = Σ of fair signs; the value before token t is the sum of those before.
  """
  signs = np.array(list(itertools.product([-1.0, 1.0], repeat=length)))
  if last is not None:
    signs[:, : length - last] = 0
  values = np.concatenate([np.zeros((len(signs), 1)), signs.cumsum(1)], 1)
  profile = audit.profile(
    values[:, :-1],
    np.zeros((len(signs), length)),
    values[:, -1],
    np.ones(signs.shape),
    np.full(len(signs), length),
    np.arange(length),
    np.arange(len(signs)) % 2,
  )
  return profile


def test_an_even_profile_is_capped_at_nine_quarters():
  short, long = (audit.cap(even(n)).value for n in (4, 12))
  exact = lambda n: n**3 / np.square(np.sqrt(np.arange(1, n + 1)).sum())
  np.testing.assert_allclose([short, long], [exact(4), exact(12)], rtol=1e-9)
  assert short < long < 9 / 4 < exact(10_000) + 0.001


def test_late_decisions_pay_up_to_their_share_of_the_length():
  cap = audit.cap(even(12, last=2)).value
  # n = 1 up to token 10 costs nothing in variance: only two tokens count.
  late = np.square(np.sqrt([11, 12]).sum())
  np.testing.assert_allclose(cap, 2 * 12 * 12 / late, rtol=1e-9)
  assert 5 < cap < 12 / 2 + 1


def test_no_even_tree_beats_the_cap():
  """All trees of few sizes, by the theorem's own formula."""
  profile = even(5, last=3)
  squares, scores, tokens = (x[:, 0] for x in profile)
  best = min(
    (squares * scores / sizes).sum() * (tokens * sizes).sum()
    for sizes in itertools.combinations_with_replacement(range(1, 9), 5)
  )
  rloo = squares.sum() * scores[-1] * tokens.sum()
  assert 0.9 * audit.cap(profile).value < rloo / best
  assert rloo / best <= audit.cap(profile).value


def test_noise_of_values_is_taken_out():
  rng = np.random.default_rng(0)
  true = even(4)
  signs = rng.choice([-1.0, 1.0], (4000, 4))
  values = np.concatenate([np.zeros((4000, 1)), signs.cumsum(1)], 1)
  rewards = values[:, -1]
  noisy = values[:, :-1] + rng.normal(size=(4000, 4)) * 0.7
  # Half of the responses end after two tokens, with what they have then.
  early = np.arange(4000) < 2000
  rewards = np.where(early, values[:, 2], rewards)
  noisy[early, 2:] = np.nan
  lengths = np.where(early, 2, 4)
  norms = np.where(np.arange(4) < lengths[:, None], 1.0, 0.0)
  found = audit.profile(
    noisy,
    np.full((4000, 4), 0.49),
    rewards,
    norms,
    lengths,
    np.arange(4),
    np.arange(4000) % 40,
  )
  wanted = true.squares[:, 0] * [1, 1, 0.5, 0.5]
  np.testing.assert_allclose(found.squares[:, 0], wanted, atol=0.1)
  np.testing.assert_allclose(found.tokens[:, 0], [1, 1, 0.5, 0.5])
  np.testing.assert_allclose(found.scores[:, 0], [1, 2, 2.5, 3])


def test_distinct_tokens_are_the_nodes_of_a_trie():
  tokens = np.array([[[1, 2, 3], [1, 2, 9], [1, 5, 9]], [[4, 4, 4]] * 3])
  mask = np.ones((2, 3, 3), bool)
  mask[0, 1, 2] = mask[0, 2, 2] = False
  np.testing.assert_allclose(
    audit.distinct_tokens(tokens, mask), [3, 3, (4 + 3) / 2]
  )


@pytest.mark.parametrize(
  'between, within, own, wanted',
  # The arithmetic task of THEORY: G − 1 = √(47.6 · 7 / 55.7).
  [(55.7, 47.6, True, 3), (0.01, 47.6, True, 16), (55.7, 22.4, False, 1)],
)
def test_the_best_number_of_samples(between, within, own, wanted):
  found = audit.best_samples(between, within, 8, 20.0 * np.arange(1, 17), own)
  assert found == wanted


def test_variance_between_prompts():
  """Gradients whose mean depends on the prompt, by a known amount."""
  rng = np.random.default_rng(1)
  prompts, size, n = 4, 64, 400
  mean = np.ones(size) / np.sqrt(size)

  def draws(of_prompts):
    noise = rng.normal(size=(n, prompts, size)) / np.sqrt(size)
    vectors = (of_prompts + 2 * noise).mean(axis=1)
    squares = np.square(vectors).sum(axis=1)
    return audit.Gradients(vectors.astype(np.float32), squares, np.ones(n))

  own = lambda n: mean + 3 * rng.normal(size=(n, prompts, size)) / np.sqrt(size)
  found = audit.between_prompts(draws(own(n)), draws(own(1)), prompts)
  assert abs(found.value - 9) < 3 * found.error < 6


def test_the_rule():
  assert audit.advice(0.25, 9, 9) == 'weighted tree'
  assert audit.advice(0.9, 4, 9).startswith('late forks')
  assert audit.advice(0.9, 2, 1.6).startswith('critic')
  assert audit.advice(0.9, 2, 1.2) == 'none'


def draw_trees(rng, sizes, count):
  """Squared norms of ĝ of a balanced tree with exact baselines, [count].

  A node at depth u earns a sign; its score is one of its own sign.  Rewards and
  scores are uncorrelated, so that ĝ is noise alone.
  """
  total = np.zeros(count)
  below = 0.0
  gradient = []
  for n, more in zip(sizes[::-1], [None, *sizes[::-1]], strict=False):
    if more is not None:
      below = below.reshape(count, n, more // n).mean(axis=2)
    below = below + rng.choice([-1.0, 1.0], (count, n))
    # The mean of the leaves below, less the value before the node.
    gradient.append((n, below, rng.choice([-1.0, 1.0], (count, n))))
  for n, advantage, score in gradient:
    total += np.square(advantage * score / n).sum(axis=1)
  return total


@pytest.mark.parametrize('sizes', [(1, 1, 1), (4, 4, 4), (1, 2, 4), (1, 1, 8)])
def test_the_tree_theorem(sizes):
  """Var = Σ δᵤ Sᵤ / nᵤ with δ = 1 and Sᵤ = u."""
  drawn = draw_trees(np.random.default_rng(0), sizes, 40_000)
  expected = sum(u / n for u, n in enumerate(sizes, 1))
  error = drawn.std() / 200
  assert abs(drawn.mean() - expected) < 4 * error + 1e-12
  # RLOO with an exact baseline: Var R · S_T / n.
  if len(set(sizes)) == 1:
    assert expected == sum((1, 2, 3)) / sizes[0]


def test_fresh_branches_never_pay_where_uncertainty_is_even():
  """Noise of `hold` times its cost is at least that of RLOO, 1."""
  rng = np.random.default_rng(0)
  products = []
  for _ in range(5000):
    knots = rng.integers(1, 6)
    q = np.sort(rng.random(knots))[::-1]  # what remains at each knot
    branches = rng.integers(1, 20)
    lengths = -np.diff([1.0, *q, 0.0])
    # E A² of a segment: its own share, and the noise of the values at its ends.
    ends = np.array([0.0, *q / branches, 0.0])
    squares = lengths + ends[:-1] + ends[1:]
    noise = (lengths * squares).sum()
    np.testing.assert_allclose(noise, (lengths**2).sum() + q[0] / branches)
    products.append(noise * (1 + branches * q.sum()))
  assert min(products) >= 1
  even = lambda m, k: (1 / (m + 1) + m / ((m + 1) * k)) * (1 + k * m / 2)
  best = [min(even(m, k) for k in range(1, 50)) for m in (1, 2, 4)]
  np.testing.assert_allclose(best, [1.5, 2, 3])
