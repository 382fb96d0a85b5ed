"""Which ids are drawn, and that an end token that also pads is learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from experiments import build
from jaxrl_llm import estimators as est
from jaxrl_llm import sampling, training
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.sampling import policy
from jaxrl_llm.sampling.policy import Decoding

ROWS, KNOWN, T = 300, 290, 49
# It ends a response, and stands behind the end.
END = 4
score = jax.jit(policy.score, static_argnames=('config', 'decoding'))


@functools.cache
def padded_model():
  """The rows that only pad its vocabulary have the highest logits anywhere."""
  config, params = toys.make_policy(
    num_layers=1, norm='layer', max_length=64, vocab_size=ROWS
  )
  width = config.hidden_size
  # The first number behind the final norm is 10, and only these rows read it.
  scale, bias = params['norm']['scale'], params['norm']['bias']
  norm = {'scale': scale.at[0].set(0.0), 'bias': bias.at[0].set(10.0)}
  reads = jnp.where(jnp.arange(ROWS) < KNOWN, 0.0, 3.0)
  head = params['head']['embedding'].at[:, 0].set(reads)
  assert head.shape == (ROWS, width)
  return config, dict(params, norm=norm, head={'embedding': head})


PROMPTS = toys.make_prompts([6, 1, 3, 2, 5, 4, 6, 6], vocab_size=KNOWN)
# One of the padded rows would end a response.
SETTINGS = dict(samples=256, max_tokens=T, eos_ids=(ROWS - 1,))


def written(found):
  """The tokens of all responses or branches, as one array."""
  return np.asarray(found.tokens)[np.asarray(found.mask)]


def test_no_id_beyond_the_tokenizer_is_drawn():
  decoding = Decoding(num_tokens=KNOWN)
  found = sampling.sample(
    *padded_model(), PROMPTS, jax.random.key(0), decoding=decoding, **SETTINGS
  )
  tokens = written(found)
  assert tokens.size == 8 * 256 * T > 100_000
  assert tokens.min() >= 0 and tokens.max() < KNOWN
  # Most of those that may be drawn are.
  assert len(np.unique(tokens)) > 0.8 * KNOWN


@pytest.mark.slow
@pytest.mark.parametrize(
  'fields', [{}, dict(top_k=40), dict(top_p=0.9), dict(temperature=3.0)]
)
def test_no_branch_draws_one(fields):
  """Nor do responses with other settings; 100,000 tokens of each."""
  decoding, places = Decoding(num_tokens=KNOWN, **fields), np.array([8, 24])
  responses, cache = sampling.sample_and_keep(
    *padded_model(), PROMPTS, jax.random.key(0), decoding=decoding, **SETTINGS
  )
  at = jnp.asarray(np.broadcast_to(places, (8, 256, 2)))
  given = cache, responses, at, jax.random.key(1)
  settings = dict(decoding=decoding, eos_ids=SETTINGS['eos_ids'])
  forked, _ = sampling.fork(*padded_model(), *given, branches=1, **settings)
  assert written(forked).size == 8 * 256 * (2 * T - places.sum())
  for found in (responses, forked):
    assert written(found).size > 100_000 and written(found).max() < KNOWN


def test_the_limit_is_what_keeps_them_out():
  given = toys.make_prompts([3, 1], vocab_size=KNOWN), jax.random.key(0)
  samples = sampling.sample(*padded_model(), *given, samples=8, max_tokens=4)
  assert (np.asarray(samples.tokens) >= KNOWN).all()


@functools.cache
def ending_responses():
  """(samples, where they end): the end token is the padding, too."""
  random = np.random.default_rng(0)
  shape = 2, 16, 6
  lengths = random.integers(1, 7, shape[:2])[..., None]
  place = np.arange(6)[None, None]
  mask = place < lengths
  ends = (place == lengths - 1) & (random.random((2, 16, 1)) < 0.5)
  words = random.choice([w for w in range(13) if w != END], shape)
  samples = sampling.Samples(
    tokens=np.where(mask & ~ends, words, END).astype(np.int32),
    mask=mask,
    log_probs=-random.exponential(size=shape).astype(np.float32),
    finished=ends.any(axis=2, keepdims=True),
  )
  # Some end, some do not, and there is padding of the same id.
  assert 4 < ends.sum() < 28 and (samples.tokens[~mask] == END).all()
  return samples, ends


def rl_batch(estimator, log_probs):
  """Who ends is rewarded."""
  samples, _ = ending_responses()
  rollouts = est.Rollouts(
    tokens=samples.tokens,
    mask=samples.mask,
    log_probs=log_probs,
    valid=np.ones_like(samples.finished),
    rewards=samples.finished.astype(np.float32),
  )
  return jax.jit(estimator.prepare)(rollouts)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rloo', 'grpo'])
def test_an_end_token_that_pads_is_learned(name):
  """An update makes it likelier, where responses end and that is rewarded."""
  samples, ends = ending_responses()
  config, params = toys.make_policy(num_layers=1)
  prompts = toys.make_prompts([3, 1])
  estimator = {'rloo': est.rloo(), 'grpo': est.grpo(kl=0.0)}[name]
  before = score(config, params, prompts, samples.tokens).log_probs
  batch = rl_batch(estimator, before)
  optimizer = optax.sgd(1e-3)
  update = training.make_update(
    training.policy_forward(config, Decoding()), estimator, optimizer, 2
  )
  trainable = {'policy': jax.tree.map(jnp.copy, params)}
  state = training.init_state(trainable, optimizer)
  state, metrics = update(state, None, prompts, batch)
  assert metrics['grad_norm'] > 0
  policy_params = state.trainable['policy']
  after = score(config, policy_params, prompts, samples.tokens).log_probs
  assert np.asarray(after - before)[ends].mean() > 0


@pytest.mark.parametrize(
  'name', ['stories260k', 'gpt2-tokenizer', 'arithmetic-sequence-init']
)
def test_tokenizers_have_no_holes(name, shared):
  """Every id below the limit is a token: there is no other to be drawn."""
  tokenizer = folders.load_tokenizer(shared / 'models' / name)
  model = build.Model(None, None, tokenizer, (), None)
  ids = sorted(tokenizer.get_vocab().values())
  assert ids == list(range(len(tokenizer)))
  assert build.known_tokens(model) == len(tokenizer)
