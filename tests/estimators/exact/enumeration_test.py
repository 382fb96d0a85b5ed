"""The enumeration itself: against brute force, its sampling, its errors."""

import inspect
import itertools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import mostly_slow

from jaxrl_llm import estimators as est

enumeration, positions = est.enumeration, est.positions
TOY = enumeration.toy(seed=0, words=2, max_length=3)
TINY = enumeration.toy(seed=2, words=1, max_length=3)


def test_the_language_is_whole():
  assert len(TOY.responses) == 1 + 2 + 4 * 3 and len(TOY.prefixes) == 7
  assert len(set(TOY.responses)) == 15
  for response, row, mask in zip(
    TOY.responses, TOY.tokens, TOY.mask, strict=True
  ):
    assert tuple(row[mask]) == response
    assert len(response) == 3 or response[-1] == 2
    assert 2 not in response[:-1]
  total = enumeration.response_probabilities(TOY).sum()
  assert total == pytest.approx(1.0, rel=1e-12)


def test_results_are_float64_and_leave_the_setting_alone():
  before = jax.config.jax_enable_x64
  report = enumeration.examine(est.rloo(), TOY)
  assert report.gradient.dtype == np.float64 and report.bias < 1e-12
  assert jax.config.jax_enable_x64 == before


def test_exact_gradient_by_differences():
  """∇ of E[R] − β KL by central differences over a loop of the responses."""
  kl, step = 0.3, 1e-5
  toy = enumeration.toy(seed=3, words=1, max_length=2, prompts=2)

  def objective(params):
    total = 0.0
    for prompt in range(2):
      for n, response in enumerate(toy.responses):
        p = ref = 1.0
        for t, token in enumerate(response):
          row = toy.prefixes.index(response[:t])
          for logits in (params, toy.reference):
            odds = np.exp(logits[prompt, row])
            share = odds[token] / odds.sum()
            p, ref = (p * share, ref) if logits is params else (p, ref * share)
        total += p * (toy.rewards[prompt, n] - kl * np.log(p / ref)) / 2
    return total

  numeric = np.zeros(toy.params.shape)
  for at in np.ndindex(*toy.params.shape):
    moved = [toy.params.copy() for _ in range(2)]
    moved[0][at] += step
    moved[1][at] -= step
    numeric[at] = (objective(moved[0]) - objective(moved[1])) / (2 * step)
  got = enumeration.exact_gradient(toy, kl=kl)
  np.testing.assert_allclose(got, numeric, rtol=0, atol=1e-9)


def test_moments_by_brute_force():
  """RLOO of two responses, summed in loops from its formula."""
  p = enumeration.response_probabilities(TINY)[0]
  rows = np.exp(np.asarray(TINY.params[0]))
  rows /= rows.sum(axis=1, keepdims=True)
  scores = np.zeros((len(p), *rows.shape))
  for n, response in enumerate(TINY.responses):
    for t, token in enumerate(response):
      row = TINY.prefixes.index(response[:t])
      scores[n, row] -= rows[row]
      scores[n, row, token] += 1
  mean, square = 0.0, 0.0
  for i, j in itertools.product(range(len(p)), repeat=2):
    difference = TINY.rewards[0, i] - TINY.rewards[0, j]
    g = difference * (scores[i] - scores[j]) / 2
    mean = mean + p[i] * p[j] * g
    square += p[i] * p[j] * (g * g).sum()
  report = enumeration.examine(est.rloo(), TINY)
  np.testing.assert_allclose(report.gradient[0], mean, rtol=0, atol=1e-12)
  assert report.variance == pytest.approx(square - (mean * mean).sum())
  assert report.draws == len(p) ** 2 and report.exact
  lengths = [len(r) for r in TINY.responses]
  assert report.tokens == pytest.approx(2 * (p * lengths).sum())


def test_branches_by_brute_force():
  """Two branches after the first token: values, baselines, tokens."""
  rule = est.trepo(1, 2, positions.fixed(1), score_weighted=True)

  def prepare(rollouts):
    # A gradient that is the baseline and the value at the fork.
    both = rollouts.branch_values + 10 * rollouts.branch_baselines
    batch = rule.prepare(rollouts)
    return batch.replace(advantages=both * rollouts.branch_mask)

  report = enumeration.examine(rule._replace(prepare=prepare), TINY)
  p = enumeration.response_probabilities(TINY)[0]
  rows = np.exp(np.asarray(TINY.params[0]))
  rows /= rows.sum(axis=1, keepdims=True)
  norm = lambda r, t: (
    1
    - 2 * rows[TINY.prefixes.index(r[:t]), r[t]]
    + (rows[TINY.prefixes.index(r[:t])] ** 2).sum()
  )
  ends = [n for n, r in enumerate(TINY.responses) if r[0] == 0]
  after = p[ends] / p[ends].sum()
  mean = 0.0
  for (i, a), (j, b) in itertools.product(
    zip(ends, after, strict=True), repeat=2
  ):
    weights = np.array(
      [
        sum(
          norm(TINY.responses[k], t) for t in range(1, len(TINY.responses[k]))
        )
        for k in (i, j)
      ]
    )
    pair = TINY.rewards[0, [i, j]]
    mean += a * b * (pair.mean() + 10 * (weights * pair).sum() / weights.sum())
  # The token after the fork is weighed by what was found there.
  expected = np.zeros(TINY.params.shape)
  row = TINY.prefixes.index((0,))
  for n in ends:
    token = TINY.responses[n][1]
    expected[0, row] -= p[n] * mean * rows[row]
    expected[0, row, token] += p[n] * mean
  np.testing.assert_allclose(report.gradient, expected, rtol=0, atol=1e-12)
  lengths = np.array([len(r) for r in TINY.responses])
  rest = p[ends].sum() * 2 * (after * (lengths[ends] - 1)).sum()
  assert report.tokens == pytest.approx(2 * ((p * lengths).sum() + rest))


# name: (estimator, toy, samples)
DRAWN = {
  'rloo': (est.rloo(), TOY, 2),
  'remax': (est.remax(), enumeration.toy(prompts=2, max_length=2), 1),
  'branches': (
    est.trepo(2, 1, positions.delimiter(0), score_weighted=True),
    TOY,
    2,
  ),
  'random positions': (
    est.trepo(1, 2, positions.uniform(), score_weighted=True),
    enumeration.toy(seed=1, words=1, max_length=4),
    2,
  ),
  'tree': (est.trepo_tree(2, 1, positions.uniform()), TINY, 2),
}


@pytest.mark.parametrize('name', mostly_slow(DRAWN, 'rloo', 'branches', 'tree'))
def test_drawing_agrees_with_summing(name):
  """Within four of its own standard errors; variances within 5 %."""
  estimator, toy, samples = DRAWN[name]
  exact = enumeration.examine(estimator, toy, samples)
  drawn = enumeration.examine(
    estimator, toy, samples, limit=1, draws=40_000, seed=1
  )
  assert exact.exact and not drawn.exact and drawn.draws == 40_000
  assert exact.bias < 1e-10
  # `bias` is the norm of the error; its square's mean is standard_error².
  assert 0.1 * drawn.standard_error < drawn.bias < 2.5 * drawn.standard_error
  assert drawn.variance == pytest.approx(exact.variance, rel=0.05)
  assert drawn.tokens == exact.tokens
  again = enumeration.examine(
    estimator, toy, samples, limit=1, draws=40_000, seed=1
  )
  np.testing.assert_array_equal(drawn.gradient, again.gradient)


def test_a_network_as_the_policy():
  """Any function of parameters to logits; the gradient has their tree."""
  toy = enumeration.toy(seed=0, words=2, max_length=2, prompts=2)
  states = len(toy.prefixes)
  inputs = np.random.default_rng(1).normal(size=(2, states, 4))
  random = np.random.default_rng(2)
  params = {
    'in': random.normal(size=(4, 5)),
    'out': {'kernel': random.normal(size=(5, 3)), 'bias': np.zeros(3)},
  }

  def logits(params):
    hidden = jnp.tanh(jnp.einsum('psi,ij->psj', inputs, params['in']))
    out = params['out']
    out = jnp.einsum('psj,jv->psv', hidden, out['kernel'])
    return out + params['out']['bias'][None, None]

  toy = toy._replace(params=params, logits=logits)
  report = enumeration.examine(est.rloo(), toy)
  assert report.exact and report.bias < 1e-10
  assert jax.tree.structure(report.gradient) == jax.tree.structure(params)
  assert report.gradient['out']['bias'].shape == (3,)
  assert enumeration.examine(est.grpo(kl=0.0), toy).cosine < 0.999


def test_exact_values_average_what_follows():
  values = enumeration.exact_values(TINY)[0]
  rows = np.exp(np.asarray(TINY.params[0]))
  rows /= rows.sum(axis=1, keepdims=True)
  for prefix, value in zip(TINY.prefixes, values, strict=True):
    later = 0.0
    for token, p in enumerate(rows[TINY.prefixes.index(prefix)]):
      longer = (*prefix, token)
      if longer in TINY.prefixes:
        later += p * values[TINY.prefixes.index(longer)]
      else:
        later += p * TINY.rewards[0, TINY.responses.index(longer)]
    assert value == pytest.approx(later, rel=1e-12)


def test_the_example_of_the_docstring(capsys):
  """Ten lines that test a new estimator."""
  lines = inspect.getdoc(enumeration).split('ten lines:')[1]
  code = textwrap.dedent(lines.split('\nVary')[0])
  assert len([x for x in code.splitlines() if x.strip()]) <= 10
  exec(compile(code, 'docstring', 'exec'), {})
  assert '% off, cosine 0.' in capsys.readouterr().out


def test_mistakes_say_what_to_do():
  with pytest.raises(ValueError, match='too many to list.*fewer words'):
    enumeration.toy(words=9, max_length=9)
  with pytest.raises(ValueError, match='must be positive'):
    enumeration.toy(words=0)
  with pytest.raises(ValueError, match='at least 2 responses'):
    enumeration.examine(est.rloo(), TOY, samples=1)
  with pytest.raises(ValueError, match=r'rewards has to be \(1, 15\)'):
    enumeration.examine(est.rloo(), TOY._replace(rewards=np.zeros((1, 3))))
  with pytest.raises(ValueError, match=r'logits\(params\) has to be'):
    enumeration.exact_gradient(TOY._replace(logits=lambda x: x[:, :3]))
  with pytest.raises(ValueError, match='exact gradient is 0'):
    enumeration.examine(est.rloo(), TOY._replace(rewards=np.ones((1, 15))))
  with pytest.raises(ValueError, match='needs rewards of tokens'):
    transform = est.chain(est.at_last_token(), est.add_token_rewards())
    enumeration.examine(
      est.estimator(transform, est.score_function(), est.sequence_sum()), TOY
    )
  with pytest.raises(ValueError, match='a function `states`'):
    unlisted = positions.Positions(
      lambda key, count, size: jax.random.randint(key, (), 1, size),
      lambda state, t, token, entropy: (state, t == state),
    )
    enumeration.examine(est.trepo(1, 1, unlisted), TOY)
