"""Reward models: transformers as oracle, training, and texts of any length."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import toys
from trees import assert_same

from jaxrl_llm import estimators as est
from jaxrl_llm import training
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import value_head
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.models.huggingface import reward_model as folder_rm
from jaxrl_llm.sampling import policy
from jaxrl_llm.training import critic
from jaxrl_llm.training import reward_model as rm
from tests.training.critic_test import read_folder, responses_of, reward_model

VOCABULARY = tiny_models.VOCABULARY
# Of the tokens that are drawn, none pads.
PADDING = VOCABULARY - 1
SCORES = 'SequenceClassification'


def torch_scores(model, texts):
  """Scores of right-padded texts, in one batch."""
  import torch

  model.config.pad_token_id = PADDING
  width = max(map(len, texts))
  rows = [[*text, *[PADDING] * (width - len(text))] for text in texts]
  mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
  with torch.no_grad():
    found = model(torch.tensor(rows), attention_mask=torch.tensor(mask))
  return found.logits[:, 0].numpy()


def a_model(**changes):
  """(config, parameters) with a random head."""
  config, params = toys.make_policy(num_layers=1, **changes)
  built = critic.separate(config)
  random = np.random.default_rng(5)
  head = random.normal(size=(1, config.hidden_size)).astype(np.float32)
  return built.config, built.init(params, head)


@pytest.mark.parametrize('name', ['llama', 'qwen2', 'qwen3'])
def test_scores_are_those_of_transformers(name, tmp_path):
  """Ragged prompts and responses, one of them empty, some full."""
  pytest.importorskip('torch')
  oracle = reward_model(name, tmp_path)
  config, params = folder_rm.load_reward_model(tmp_path)
  prompts = toys.make_prompts([3, 1, 5, 2], vocab_size=PADDING)
  responses = responses_of((4, 2, 6), PADDING)
  lengths = np.array([[6, 0], [1, 4], [6, 2], [3, 5]], np.int32)
  found = value_head.score(config, params, prompts, responses, lengths, 2)
  assert found.shape == (4, 2) and found.dtype == jnp.float32
  texts = [
    [
      *prompts.tokens[p, : prompts.lengths[p]],
      *responses[p, g, : lengths[p, g]],
    ]
    for p, g in np.ndindex(4, 2)
  ]
  expected = torch_scores(oracle, texts)
  assert np.ptp(expected) > 0.2
  np.testing.assert_allclose(found.ravel(), expected, rtol=1e-5, atol=1e-5)


def a_batch(lengths, rewards, width=4):
  shape = len(lengths), len(lengths[0]), width
  rollouts = est.Rollouts(
    tokens=jnp.asarray(responses_of(shape, 13)),
    mask=jnp.arange(width)[None, None] < jnp.array(lengths)[..., None],
    log_probs=jnp.zeros(shape),
    rewards=jnp.asarray(rewards, jnp.float32)[..., None],
  )
  return est.reward_model().prepare(rollouts)


@pytest.mark.slow
def test_training_reads_the_score_that_scoring_gives():
  """The loss of an update is that of the margins of `score`."""
  config, params = a_model()
  prompts = toys.make_prompts([3, 1])
  lengths = np.array([[4, 1], [2, 4]], np.int32)
  batch = a_batch(lengths, [[1, 0], [0, 1]])
  forward = jax.jit(rm.forward(config))
  outputs = forward({'critic': params}, None, prompts, batch)
  scores = value_head.score(config, params, prompts, batch.tokens, lengths, 1)
  scores = np.asarray(scores)
  ends = np.take_along_axis(outputs.values, lengths[..., None] - 1, axis=2)
  np.testing.assert_allclose(ends[..., 0], scores, rtol=1e-6, atol=1e-6)
  margins = np.array([scores[0, 0] - scores[0, 1], scores[1, 1] - scores[1, 0]])
  expected = np.log1p(np.exp(-margins)).mean()
  got = float(est.reward_model().loss(outputs, batch))
  assert got == pytest.approx(expected, rel=1e-5)


def test_updates_learn_which_response_is_preferred():
  """The bias, which no pair tells anything of, does not move by a bit."""
  config, params = a_model()
  prompts = toys.make_prompts([3, 1, 2, 4])
  lengths = [[4, 1], [2, 4], [3, 3], [1, 2]]
  batch = a_batch(lengths, [[1, 0], [0, 1], [1, 0], [0, 1]])
  params['value']['bias'] += 0.75
  optimizer = training.adamw(1e-2, max_grad_norm=None, weight_decay=0.1)
  state = training.init_state({'critic': params}, optimizer)
  update = training.make_update(
    rm.forward(config), est.reward_model(), optimizer, micro_prompts=2
  )
  losses = []
  for _ in range(30):
    state, metrics = update(state, None, prompts, batch)
    losses.append(float(metrics['loss']))
  assert {'loss', 'skipped', 'critic/grad_norm'} <= set(metrics)
  assert metrics['log_prob_difference/max'] == 0
  assert losses[0] > 0.3 and losses[-1] < 0.05
  trained = state.trainable['critic']
  assert float(trained['value']['bias'][0]) == 0.75
  scores = value_head.score(
    config, trained, prompts, batch.tokens, np.array(lengths, np.int32), 4
  )
  np.testing.assert_array_equal(
    np.sign(scores[:, 0] - scores[:, 1]), [1, -1, 1, -1]
  )


def test_padding_and_what_stands_in_it_change_no_score():
  config, params = a_model()
  prompts = toys.make_prompts([3, 2])
  lengths = np.array([[2, 1], [0, 2]], np.int32)
  responses = responses_of((2, 2, 5), 13)
  score = functools.partial(value_head.score, config, params, prompts)
  wide = score(responses, lengths, 2)
  other = np.where(np.arange(5) < lengths[..., None], responses, 7)
  np.testing.assert_array_equal(score(other, lengths, 2), wide)
  narrow = score(responses[:, :, :2], lengths, 2)
  np.testing.assert_allclose(narrow, wide, rtol=1e-5, atol=1e-6)


def test_texts_of_every_length_take_few_programs():
  """Up to all that the model can read, which is no power of two."""
  config, params = a_model(max_length=40)
  random = np.random.default_rng(1)
  lengths = [40, 1, 33, 32, 2, 17, 39]
  texts = [random.integers(0, 13, n).tolist() for n in lengths]
  before = value_head.score._cache_size()
  found = folder_rm.score_texts(config, params, texts, batch_size=2)
  # Widths of 24, 32 and, for two batches, 40.
  assert value_head.score._cache_size() - before == 3
  assert found.shape == (7,) and found.dtype == np.float32
  rows = np.zeros((7, 40), np.int32)
  for row, text in zip(rows, texts, strict=True):
    row[: len(text)] = text
  # As responses, each to its first token.
  prompts = policy.Prompts(tokens=rows[:, :1], lengths=np.ones(7, np.int32))
  counts = np.array(lengths, np.int32)[:, None] - 1
  expected = value_head.score(
    config, params, prompts, rows[:, None, 1:], counts, 7
  )
  np.testing.assert_allclose(found, expected[:, 0], rtol=1e-5, atol=1e-5)
  assert folder_rm.score_texts(config, params, [], 2).shape == (0,)
  with pytest.raises(UserError, match='41'):
    folder_rm.score_texts(config, params, [[1] * 41], 2)


def test_a_language_model_is_no_reward_model(tmp_path):
  config, params = toys.make_policy(num_layers=1)
  folders.save(tmp_path / 'model', config, params)
  with pytest.raises(UserError, match='gives no score.\nName a reward model'):
    folder_rm.load_reward_model(tmp_path / 'model')


@pytest.mark.parametrize('name', ['llama', 'qwen3', 'gemma3_text', 'gpt2'])
def test_a_saved_trunk_opens_in_transformers(name, tmp_path):
  """Its scores equal the original's to the last bit."""
  pytest.importorskip('torch')
  texts = [responses_of((n,), PADDING, seed=n).tolist() for n in (7, 1, 4)]
  with tiny_models.quiet():
    original = reward_model(name, tmp_path / 'original')
    config, trunk, score = read_folder(tmp_path / 'original')
    params = critic.separate(config).init(trunk, score)
    folders.save_trunk(tmp_path / 'copy', config, trunk, params['value'])
    copy = tiny_models.reopen(tmp_path / 'copy', SCORES)
  assert copy.config.num_labels == 1
  np.testing.assert_array_equal(
    torch_scores(copy, texts), torch_scores(original, texts)
  )
  again, *read = read_folder(tmp_path / 'copy')
  assert again == config
  assert_same(read, [trunk, score])


def test_a_trunk_of_a_real_model_with_its_tokenizer(shared, tmp_path):
  """Texts padded by transformers; bfloat16 with a float32 head."""
  torch = pytest.importorskip('torch')
  source = shared / 'models' / 'stories260k'
  config, trunk, none = read_folder(source)
  assert none is None
  random = np.random.default_rng(0)
  score = random.normal(size=(1, config.hidden_size)).astype(np.float32)
  head = value_head.init_head(config, score)
  folders.save_trunk(tmp_path / 'rm', config, trunk, head, source=source)
  with tiny_models.quiet():
    model = tiny_models.reopen(tmp_path / 'rm', SCORES)
  tokenizer = folders.load_tokenizer(tmp_path / 'rm')
  assert model.config.pad_token_id == tokenizer.pad_token_id
  texts = ['Once upon a time', 'Lily', 'The big red dog ran up the hill.']
  given = tokenizer(texts, padding=True, return_tensors='pt')
  with torch.no_grad():
    expected = model(**given).logits[:, 0].numpy()
  ids = [tokenizer(text)['input_ids'] for text in texts]
  found = folder_rm.score_texts(
    *folder_rm.load_reward_model(tmp_path / 'rm'), ids, 4
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  half = jax.tree.map(lambda x: x.astype('bfloat16'), trunk)
  folders.save_trunk(tmp_path / 'rm', config, half, head, source=source)
  shape = folders.load_trunk_config(tmp_path / 'rm')
  assert_same(
    folders.load_trunk(tmp_path / 'rm', shape, 'bfloat16'), (half, score)
  )
  assert not (tmp_path / 'rm' / folders.GENERATION).exists()


def a_tokenizer(shared, **tokens):
  """stories260k's, with other special tokens."""
  tokenizer = folders.load_tokenizer(shared / 'models' / 'stories260k')
  for name, token in tokens.items():
    setattr(tokenizer, name, token)
  return tokenizer


def test_what_pads_ends_no_text(shared, tmp_path):
  """At an end token that pads, transformers would not read the score."""
  config, params = a_model(vocab_size=512)
  save = functools.partial(
    folders.save_trunk,
    tmp_path / 'rm',
    config,
    params['trunk'],
    params['value'],
  )
  padding = lambda: json.loads((tmp_path / 'rm' / 'config.json').read_text())[
    'pad_token_id'
  ]
  save(a_tokenizer(shared))
  assert padding() == 2
  other = a_tokenizer(shared, eos_token='a', pad_token='a', bos_token='b')
  save(other)
  written = folders.load_tokenizer(tmp_path / 'rm')
  assert padding() == written.pad_token_id == other.bos_token_id
  assert other.pad_token == 'a'
  with pytest.raises(UserError, match='no padding token besides its end'):
    save(a_tokenizer(shared, eos_token='a', pad_token='a', bos_token='a'))


def test_a_bias_has_no_place_in_the_layout(tmp_path):
  config, params = a_model()
  head = {**params['value'], 'bias': jnp.array([0.5])}
  with pytest.raises(UserError, match='has a bias of 0.5'):
    folders.save_trunk(tmp_path / 'rm', config, params['trunk'], head)
  _, whole = toys.make_policy(num_layers=1)
  with pytest.raises(UserError, match='head/embedding'):
    folders.save_trunk(tmp_path / 'rm', config, whole, params['value'])
  assert not list(tmp_path.iterdir())
