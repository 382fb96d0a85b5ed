"""Trees that are grown: as `sample`'s, by the rule, never too many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import toys

from jaxrl_llm import estimators as est
from jaxrl_llm import sampling, sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import thresholds as rules
from jaxrl_llm.models import transformer
from jaxrl_llm.sampling import trees
from jaxrl_llm.sampling.allocation import Independent, Systematic
from jaxrl_llm.sampling.policy import Decoding

LENGTHS = [6, 1, 3, 2, 5, 4, 6, 2]
SETTINGS = dict(max_tokens=9, eos_ids=(2, 5), pad_id=12)


def first_key():
  return jax.random.key(0)


def weighted(tau, at_most, count=1, reads_entropy=False):
  rule = est.Threshold(tau, at_most, reads_entropy)
  return Systematic(est.Trees(rule, count))


def of_model(name, scale=1.0):
  config, params = toys.make_policy(name)
  params = jax.tree.map(lambda x: scale * x, params)
  return config, params, transformer.sampling_layout(config, params)


def rows_of(grown):
  """(tokens, weights, parent, forked_at) of each row, by prompt."""
  mask, parents = np.asarray(grown.samples.mask), np.asarray(grown.parents)
  tokens, weights = np.asarray(grown.samples.tokens), grown.node_weights
  weights, forked_at = np.asarray(weights), np.asarray(grown.forked_at)
  return [
    [
      (
        tuple(tokens[p, r][mask[p, r]].tolist()),
        weights[p, r][mask[p, r]],
        int(parents[p, r, 0]),
        int(forked_at[p, r, 0]),
      )
      for r in range(mask.shape[1])
    ]
    for p in range(len(mask))
  ]


@pytest.mark.parametrize(
  'name, decoding',
  [
    ('llama', Decoding()),
    ('gemma', Decoding(temperature=0.6, top_k=5)),
    ('gpt2', Decoding(temperature=0.3, top_p=0.8, num_tokens=11)),
  ],
)
def test_independent_responses_are_those_of_sample(name, decoding):
  """Token for token, each distinct prefix decoded once."""
  config, _, layout = of_model(name)
  prompts = toys.make_prompts(LENGTHS)
  settings = dict(SETTINGS, decoding=decoding)
  settings['statistics'] = ('entropy', 'score_norms')
  for seed in range(3):
    given = config, layout, prompts, jax.random.key(seed)
    plain = sampling.sample(*given, samples=8, **settings)
    grown = sampling.grow(*given, allocation=Independent(8), **settings)
    for field in ('tokens', 'mask', 'finished'):
      np.testing.assert_array_equal(plain[field], grown.samples[field], field)
    for field in ('log_probs', 'entropy', 'score_norms'):
      np.testing.assert_allclose(
        plain[field], jnp.where(plain.mask, grown.samples[field], 0), atol=1e-5
      )
    prefixes = {
      (p, tokens[: t + 1])
      for p, rows in enumerate(rows_of(grown))
      for tokens, *_ in rows
      for t in range(len(tokens))
    }
    assert int(grown.nodes) == len(prefixes) < plain.mask.sum()
    for rows in rows_of(grown):
      for tokens, _, parent, forked_at in rows:
        assert tokens[:forked_at] == rows[parent][0][:forked_at]


def children_by_hand(rule, depth, weights, p, room, uniform):
  """{(state, token): weight} in float64, from the definition."""
  standing = rules.Standing(
    jnp.int32(depth),
    jnp.asarray(weights),
    jnp.asarray(-(p * np.log(np.maximum(p, 1e-30))).sum(axis=1)),
  )
  tree = jnp.zeros(len(p), jnp.int32)
  found = np.asarray(
    rules.thresholds(rule, standing, jnp.asarray(p), tree, jnp.array([room]))
  )
  kept, point = {}, uniform
  edge = 0.0
  for state, chances in enumerate(weights[:, None] * p):
    small = np.where(chances >= found[state], 0.0, chances)
    alone = found[state] >= weights[state]
    total = small.sum() if alone and small.sum() > 0 else found[state]
    for token, chance in enumerate(chances):
      if chance >= found[state]:
        kept[state, token] = chance
      edge += small[token] / total
      if small[token] and edge > point:
        kept[state, token] = found[state]
        point += 1
  return kept


@pytest.mark.parametrize(
  'allocation',
  [
    weighted(1 / 8, 8),
    weighted(0.05, 5, count=2),
    weighted(rules.falling(0.5, 0.1, 5), 8),
    weighted(
      lambda standing: jnp.where(standing.entropy > 1.5, 0.1, 0.5), 9, 1, True
    ),
  ],
  ids=['one rule', 'held', 'falling', 'entropy'],
)
def test_trees_are_those_of_the_rule(allocation):
  """Depth by depth, from the scorer's distributions and the uniforms."""
  config, params, layout = of_model('llama')
  prompts = toys.make_prompts(LENGTHS)
  grown = sampling.grow(
    config, layout, prompts, first_key(), allocation=allocation, **SETTINGS
  )
  most, count = allocation.rows, allocation.trees
  tokens = np.asarray(grown.samples.tokens)
  logits = toys.plain_logits(config, params, prompts, tokens)
  p = np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1), np.float64)
  checked = 0
  for prompt, rows in enumerate(rows_of(grown)):
    for tree in range(count):
      own = rows[tree * most : (tree + 1) * most]
      for depth in range(SETTINGS['max_tokens']):
        states = {}
        for r, (tokens, weights, *_) in enumerate(own):
          if len(tokens) > depth:
            states.setdefault(tokens[:depth], (r, weights))
        if not states:
          continue
        ended = {t for t, *_ in own if t and len(t) <= depth}
        firsts = [r for r, _ in states.values()]
        weights = np.array(
          [w[depth - 1] if depth else 1.0 for _, w in states.values()]
        )
        uniform = jax.random.uniform(
          jax.random.fold_in(first_key(), depth), (len(LENGTHS) * count,)
        )
        expected = children_by_hand(
          allocation.wanted.rule,
          depth,
          weights,
          p[prompt, [tree * most + r for r in firsts], depth],
          most - len(ended),
          float(uniform[prompt * count + tree]),
        )
        order = {prefix: i for i, prefix in enumerate(states)}
        found = {
          (order[tokens[:depth]], tokens[depth]): weights[depth]
          for tokens, weights, *_ in own
          if len(tokens) > depth
        }
        assert found.keys() == expected.keys()
        for child, weight in found.items():
          np.testing.assert_allclose(weight, expected[child], rtol=1e-4)
        checked += 1
  assert checked > 20


@pytest.mark.parametrize('scale', [0.1, 1.0, 3.0])
def test_never_too_many_rows_and_nothing_is_dropped(scale):
  """Of flat and of peaked policies: what is drawn ends, or fills its budget."""
  config, _, layout = of_model('llama', scale)
  prompts = toys.make_prompts([3] * 256)
  weights = []
  for seed in range(5):
    for allocation in (weighted(1 / 8, 8), weighted(0.1, 4, 2)):
      given = config, layout, prompts, jax.random.key(seed)
      grown = sampling.grow(*given, allocation=allocation, **SETTINGS)
      mask, done = grown.samples.mask, grown.samples.finished[..., 0]
      lengths = np.asarray(mask.sum(axis=2))
      present = lengths > 0
      assert (np.asarray(done) | (lengths == 9))[present].all()
      shape = len(lengths), allocation.trees, allocation.rows
      assert present.reshape(shape).any(axis=2).all()
      leaves = jnp.take_along_axis(
        grown.node_weights, np.maximum(lengths - 1, 0)[..., None], axis=2
      )
      leaves = np.where(present, leaves[..., 0], 0.0).reshape(shape)
      weights.append(leaves.sum(axis=2).ravel())
  # The total weight of the leaves is a martingale.
  weights = np.concatenate(weights)
  error = weights.std() / np.sqrt(len(weights))
  assert abs(weights.mean() - 1) < 4 * error + 1e-6


def test_trees_do_not_depend_on_the_sizes_of_the_pool(monkeypatch):
  config, _, layout = of_model('llama')
  prompts = toys.make_prompts(LENGTHS)
  for allocation in (Independent(8), weighted(1 / 8, 8, 2)):
    grow = functools.partial(
      sampling.grow, config, layout, prompts, first_key(), allocation=allocation
    )
    one = grow(**SETTINGS)
    with monkeypatch.context() as patch:
      patch.setattr(trees, '_GROWTH', 8.0)
      other = grow(**SETTINGS)
    assert int(other.row_steps) > int(one.row_steps)
    np.testing.assert_array_equal(one.samples.tokens, other.samples.tokens)
    np.testing.assert_array_equal(one.parents, other.parents)
    assert int(one.nodes) == int(other.nodes)


def on_a_mesh(index):
  config, params, layout = of_model('llama')
  prompts = toys.make_prompts(LENGTHS)
  for allocation in (Independent(4), weighted(1 / 8, 8, 2)):
    grow = functools.partial(
      sampling.grow, config, key=first_key(), allocation=allocation, **SETTINGS
    )
    one = sharding.to_host(grow(layout, prompts))
    for mesh in ((8, 1, 1), (2, 2, 2), (1, 1, 8)):
      with jax.set_mesh(sharding.make_mesh(*mesh)):
        placed = transformer.sampling_layout(config, sharding.place(params))
        other = sharding.to_host(grow(placed, sharding.place_rows(prompts)))
      for field in ('tokens', 'mask', 'finished'):
        np.testing.assert_array_equal(one.samples[field], other.samples[field])
      np.testing.assert_array_equal(one.parents, other.parents)
      np.testing.assert_allclose(
        one.node_weights, other.node_weights, rtol=1e-4
      )
      assert int(one.nodes) == int(other.nodes)


def test_eight_devices_grow_the_trees_of_one():
  peers.run(on_a_mesh, count=1, devices=8)


def test_greedy_trees_are_refused():
  config, _, layout = of_model('llama')
  with pytest.raises(UserError, match='temperature above 0'):
    given = config, layout, toys.make_prompts([2]), first_key()
    settings = dict(SETTINGS, decoding=Decoding(temperature=0.0))
    sampling.grow(*given, allocation=Independent(2), **settings)
