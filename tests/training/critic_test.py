"""Critics against transformers' reward models, and who learns from whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import toys
from selection import mostly_slow
from trees import assert_same

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.training import critic


def responses_of(shape, high, seed=3):
  random = np.random.default_rng(seed)
  return random.integers(0, high, shape).astype(np.int32)


def reward_model(name, folder, labels=1):
  """Saves a random *ForSequenceClassification; gives the torch model."""
  return tiny_models.build(name, folder, num_labels=labels)


def read_folder(folder):
  """(config, params, score) of a folder."""
  config = folders.load_trunk_config(folder)
  return config, *folders.load_trunk(folder, config)


@pytest.mark.parametrize('name', mostly_slow(['llama', 'gpt2'], 'llama'))
def test_values_are_the_scores_of_a_reward_model(name, tmp_path):
  """Index t is the model's own score of the prompt and the first t tokens."""
  torch = pytest.importorskip('torch')
  oracle = reward_model(name, tmp_path)
  config, params, score = read_folder(tmp_path)
  prompts = toys.make_prompts([3, 1], vocab_size=tiny_models.VOCABULARY)
  responses = responses_of((2, 2, 4), tiny_models.VOCABULARY)
  built = critic.separate(config)
  found = jax.jit(built.values)(
    built.init(params, score), prompts, responses, None
  )
  assert found.dtype == jnp.float32
  expected = np.zeros(responses.shape)
  with torch.no_grad():
    for p, g, t in np.ndindex(responses.shape):
      prompt = prompts.tokens[p, : prompts.lengths[p]]
      row = np.concatenate([prompt, responses[p, g, :t]])
      given = torch.tensor(row[None]).long()
      expected[p, g, t] = oracle(given).logits[0, 0]
  assert np.ptp(expected) > 1
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_language_model_gives_its_trunk_and_no_score(tmp_path):
  config, params = toys.make_policy()  # untied: it has a head
  folders.save(tmp_path / 'model', config, params)
  shape, trunk, score = read_folder(tmp_path / 'model')
  assert score is None and shape.tied and 'head' not in trunk
  built = critic.separate(shape)
  ours = built.init(trunk)
  assert_same(ours, critic.separate(config).init(params))
  assert not ours['value']['kernel'].any() and not ours['value']['bias'].any()


def test_what_has_no_value_is_refused(tmp_path):
  pytest.importorskip('torch')
  reward_model('llama', tmp_path / 'labels', labels=3)
  with pytest.raises(UserError, match='3 scores .*\n.*num_labels=1'):
    folders.load_trunk_config(tmp_path / 'labels')
  reward_model('llama', tmp_path / 'model')
  # As a policy it would lack its head.
  with pytest.raises(UserError, match='score.weight|lm_head'):
    folders.load(tmp_path / 'model')
  config = folders.load_config(tmp_path / 'model')
  (tmp_path / 'model' / 'config.json').write_text(
    (tmp_path / 'model' / 'config.json')
    .read_text()
    .replace('"intermediate_size": 48', '"intermediate_size": 44')
  )
  assert config.intermediate_size == 48
  with pytest.raises(UserError, match=r'asks for a float tensor \[32, 44\]'):
    folders.load_trunk_config(tmp_path / 'model')


def test_init_shares_no_array_with_what_it_copies():
  # Both are donated to the same update.
  config, params = toys.make_policy()
  made = critic.separate(config).init(params)
  shared = {id(leaf) for leaf in jax.tree.leaves(params)}
  assert not shared & {id(leaf) for leaf in jax.tree.leaves(made)}
  pointer = lambda x: x.unsafe_buffer_pointer()
  theirs = {pointer(leaf) for leaf in jax.tree.leaves(params)}
  assert not theirs & {pointer(leaf) for leaf in jax.tree.leaves(made)}


def a_score(config):
  random = np.random.default_rng(5)
  return random.normal(size=(1, config.hidden_size)).astype(np.float32)


@pytest.mark.parametrize('make', [critic.separate, critic.shared])
def test_both_trunks_value_the_same_states(make):
  """A fresh copy and the policy itself are one function, read in parts."""
  config, params = toys.make_policy(num_layers=1)
  built, score = make(config), a_score(config)
  trainable = {'policy': params, 'critic': built.init(params, score)}
  prompts = toys.make_prompts([5, 1, 3, 2])
  responses = responses_of((4, 2, 3), 13)
  rows, ends = np.zeros((4, 2, 8), np.int32), np.zeros((4, 2, 3), np.int32)
  for p, size in enumerate(prompts.lengths):
    rows[p, :, :size] = prompts.tokens[p, :size]
    rows[p, :, size : size + 3] = responses[p]
    ends[p] = size - 1 + np.arange(3)
  read = jax.jit(transformer.apply, static_argnums=0)
  hidden, _ = read(config, params, rows.reshape(8, 8))
  scores = (hidden @ score[0]).reshape(4, 2, 8)
  expected = np.take_along_axis(scores, ends, axis=2)
  assert np.ptp(expected) > 1
  for micro in (1, 4):
    found = critic.score_values(
      config, built, trainable, prompts, responses, micro
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_values_of_a_bfloat16_trunk_are_float32():
  config, params = toys.make_policy(dtype='bfloat16')
  built = critic.shared(config)
  random = np.random.default_rng(0)
  hidden = random.normal(size=(1, 2, 3, config.hidden_size))
  head = built.init(params, a_score(config))
  head['value']['bias'] += 256.0
  values = built.values(head, None, None, hidden.astype(jnp.bfloat16))
  assert values.dtype == jnp.float32
  # In bfloat16 there is nothing between 256 and 258.
  assert np.abs(values - 2 * np.round(values / 2)).max() > 0.1


def test_a_trunk_of_its_own_does_not_read_the_policy():
  config, params = toys.make_policy(num_layers=1)
  prompts, responses = toys.make_prompts([2]), responses_of((1, 2, 3), 13)
  flops = {}
  for make in (critic.separate, critic.shared):
    built = make(config)
    trainable = {'policy': params, 'critic': built.init(params)}
    compiled = critic.score_values.lower(
      config, built, trainable, prompts, responses, 1
    ).compile()
    flops[make] = compiled.cost_analysis()['flops']
  one, other = flops.values()
  assert one == pytest.approx(other, rel=0.01)
