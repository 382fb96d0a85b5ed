"""Awkward random rollouts, a table of recipes, tiny policies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import estimators as est
from jaxrl_llm import rollouts
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling.policy import Prompts

NAN = float('nan')
# Settings of the recipes below, for formulas to share.  Clips are narrow, so
# that they bite on the random rollouts.
CLIP, HIGH, KL, BETA, FLOOR = 0.15, 0.25, 0.07, 0.4, 3.0
MAX_LENGTH, BUFFER, ALPHA, LAM, DUAL = 7, 4, 0.4, 0.8, 1.3
ENTROPY, VALUE, VALUE_CLIP, THRESHOLD = 0.2, 0.6, 0.1, 0.1
STEERED = est.adaptive_kl(0.05, target=0.5, horizon=40)
CRITIC = VALUE, VALUE_CLIP
_VALUES = dict(fill=est.interpolate_values)
_ADVANTAGES = dict(
  fill=est.interpolate_advantages,
  positions=est.positions.pairs(est.positions.uniform()),
)
# One entry per recipe and setting; every contract runs over all of them.
RECIPES = {
  'reinforce': est.reinforce(),
  'reinforce_baseline': est.reinforce_baseline(0.8),
  'remax': est.remax(),
  'rloo': est.rloo(),
  'rloo with KL': est.rloo(kl=KL),
  'rloo with adaptive KL': est.rloo(kl=STEERED),
  'reinforce_plus_plus': est.reinforce_plus_plus(CLIP, KL),
  'reinforce_plus_plus with adaptive KL': est.reinforce_plus_plus(
    CLIP, STEERED
  ),
  'reinforce_plus_plus_baseline': est.reinforce_plus_plus_baseline(CLIP, KL),
  'grpo': est.grpo(CLIP, KL),
  'grpo without KL': est.grpo(CLIP, kl=0.0),
  'dr_grpo': est.dr_grpo(MAX_LENGTH, CLIP),
  'dapo': est.dapo(MAX_LENGTH, BUFFER, CLIP, HIGH),
  'gspo': est.gspo(CLIP, HIGH),
  'gspo by token': est.gspo(CLIP, HIGH, est.sequence_token_ratio),
  'cispo': est.cispo(CLIP, HIGH),
  'opo': est.opo(),
  'opo_leave_one_out': est.opo_leave_one_out(),
  'obl_reinforce': est.obl_reinforce(),
  'rl_zvp': est.rl_zvp(ENTROPY, CLIP),
  'p3o': est.p3o(CLIP),
  'p3o by pair': est.p3o(CLIP, est.pair_ratio),
  'ppo': est.ppo(CLIP, LAM, 0.0, VALUE, VALUE_CLIP),
  'ppo with KL and dual clip': est.ppo(CLIP, LAM, STEERED, *CRITIC, DUAL),
  'vapo': est.vapo(ALPHA, CLIP, HIGH, VALUE, VALUE_CLIP),
  'vine_ppo': est.vine_ppo((3,), clip=CLIP, kl=KL),
  'trepo': est.trepo(clip=CLIP),
  'trepo, values interpolated': est.trepo(**_VALUES, clip=CLIP),
  'trepo, advantages interpolated': est.trepo(**_ADVANTAGES, clip=CLIP),
  'trepo, score-weighted': est.trepo(clip=CLIP, score_weighted=True),
  'trepo with KL': est.trepo(clip=CLIP, kl=KL),
  'trepo_critic': est.trepo_critic(
    clip=CLIP, kl=KL, value_coefficient=VALUE, value_clip=VALUE_CLIP
  ),
  'trepo_tree': est.trepo_tree(2, 2, clip=CLIP),
  'trepo_tree with KL': est.trepo_tree(2, 2, clip=CLIP, kl=KL),
  'trepo_weighted': est.trepo_weighted(0.25),
  'trepo_weighted, clipped, with KL': est.trepo_weighted(
    0.25, clip=CLIP, kl=KL
  ),
  'dpo': est.dpo(BETA),
  'dpop': est.dpop(BETA, FLOOR),
  'ipo': est.ipo(BETA),
  'rest_em': est.rest_em(THRESHOLD),
  'reward_model': est.reward_model(),
  'sft': est.sft(),
}
GROUP_BASED = [name for name, e in RECIPES.items() if e.needs.samples > 1]


def random_rollouts(
  seed,
  prompts=3,
  samples=4,
  length=5,
  *,
  invalid=True,
  full=False,
  dtype=np.float64,
):
  """Rollouts and outputs of a policy some updates away from the sampler."""
  random = np.random.default_rng(seed)
  shape = (prompts, samples, length)
  lengths = random.integers(1, length + 1, (prompts, samples))
  lengths[0, 0], lengths[-1, -1] = length, 0
  if full:
    lengths[:] = length
  mask = np.arange(length)[None, None] < lengths[..., None]
  valid = np.ones((prompts, samples, 1), bool)
  if invalid:
    valid[0, 1] = valid[-1, 0] = False
  kept = mask & valid
  cast = lambda x: x.astype(dtype)
  inside = lambda x, where=kept: cast(np.where(where, x, NAN))
  nats = lambda: -random.exponential(size=shape)
  log_probs = nats()
  moved = log_probs + random.normal(0.0, 0.3, shape)
  rewards = random.normal(size=(prompts, samples, 1))
  tokens = random.integers(0, 9, shape).astype(np.int32)
  ref_log_probs = nats()
  entropy = random.exponential(size=shape)
  values = random.normal(size=shape)
  # Garbage outside the mask and at the prompt, where it must not be read.
  forks = random.random(shape) < 0.5
  later = kept & (np.arange(length) > 0)[None, None]
  forked = later & forks
  rollouts = est.Rollouts(
    tokens=tokens,
    mask=mask,
    log_probs=inside(log_probs),
    rewards=inside(rewards, valid),
    valid=valid if invalid else None,
    token_rewards=inside(random.normal(size=shape)),
    greedy_rewards=cast(random.normal(size=(prompts, 1, 1))),
    ref_log_probs=inside(ref_log_probs),
    values=inside(values),
    entropy=inside(random.exponential(size=shape)),
    score_norms=inside(random.exponential(size=shape)),
    branch_values=inside(random.normal(size=shape), forked),
    branch_baselines=inside(random.normal(size=shape), forked),
    branch_mask=forks,
    running=_some_batches_later(dtype),
  )
  outputs = est.Outputs(
    log_probs=inside(moved),
    entropy=inside(entropy),
    values=inside(values + random.normal(0.0, 0.3, shape)),
  )
  return rollouts, outputs


def plain_rollouts(rewards, lengths=None, length=5, dtype=np.float32, **fields):
  """Rollouts of given rewards, [P, G]."""
  rewards = jnp.asarray(rewards, dtype)[..., None]
  lengths = np.full(rewards.shape, length) if lengths is None else lengths
  lengths = np.reshape(lengths, rewards.shape)
  tokens = jnp.zeros((*rewards.shape[:2], length), jnp.int32)
  return est.Rollouts(
    tokens=tokens,
    mask=jnp.arange(length)[None, None] < lengths,
    rewards=rewards,
    **{'log_probs': tokens.astype(dtype), **fields},
  )


def with_branch_rows(rollouts, samples=3):
  """The rollouts with further rows as branches of the first `samples`."""
  _, rows, length = rollouts.mask.shape
  numbers = np.arange(rows)[None, :, None]
  lengths = rollouts.mask.sum(axis=2, keepdims=True)
  parents = np.broadcast_to(numbers % samples, lengths.shape)
  of_parents = np.take_along_axis(lengths, parents, axis=1)
  middle = np.minimum(lengths, of_parents) // 2
  forks = (numbers >= samples) & (middle > 0)
  return rollouts.replace(
    parents=np.where(forks, parents, numbers).astype(np.int32),
    forked_at=np.where(forks, middle, 0).astype(np.int32),
  )


def with_tree_rows(rollouts, samples=3):
  """The same, with weights of nodes; garbage where there are none."""
  random = np.random.default_rng(0)
  weights = random.uniform(0.1, 1.0, rollouts.mask.shape)
  inside = rollouts.mask & ~np.isnan(rollouts.log_probs)
  weights = np.where(inside, weights, NAN).astype(rollouts.log_probs.dtype)
  return with_branch_rows(rollouts, samples).replace(node_weights=weights)


def rows_for(estimator, rollouts):
  """The rollouts without the relations of rows that an estimator lacks."""
  branches, tree = estimator.needs.branches, estimator.needs.tree
  if not tree:
    rollouts = rollouts.replace(node_weights=None)
  if tree or (branches is not None and branches.trained):
    return rollouts
  return rollouts.replace(parents=None, forked_at=None)


def _some_batches_later(dtype):
  """What the recipes' running numbers have become: none is at its start."""
  start = {}
  for estimator in RECIPES.values():
    start |= est.start_running(estimator.needs)
  return {name: dtype(float(value) + 0.25) for name, value in start.items()}


def changed(x, function):
  """A copy of a dataclass of arrays, `function` applied to those present."""
  arrays = {name: v for name, v in x.items() if hasattr(v, 'shape')}
  return x.replace(**{name: function(v) for name, v in arrays.items()})


_SHAPE = dict(
  vocab_size=13,
  hidden_size=16,
  intermediate_size=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  max_length=32,
)
MODELS = {
  'llama': _SHAPE,
  'gemma': dict(
    _SHAPE,
    family='gemma2',
    tied=True,
    window=3,
    sliding=(True, False),
    norm_offset=1.0,
    post_norms=True,
    embedding_scale=4.0,
    attention_softcap=5.0,
    logit_softcap=6.0,
  ),
  'gpt2': dict(
    _SHAPE,
    family='gpt2',
    num_kv_heads=4,
    tied=True,
    rope=None,
    norm='layer',
    query_bias=True,
    output_bias=True,
    mlp_bias=True,
    activation='gelu_tanh',
    gated=False,
  ),
}


@functools.cache
def make_policy(name='llama', **changes):
  """(config, params) of a tiny model; every parameter is random."""
  config = ModelConfig(**{**MODELS[name], **changes})
  shapes = jax.eval_shape(
    lambda key: transformer.init(config, key), jax.random.key(0)
  )
  random = np.random.default_rng(1)

  def draw(path, shape):
    scale, mean = 0.3, float(path[-1].key == 'scale')
    if path[-1].key in ('kernel', 'embedding'):
      scale = 1.5 * shape.shape[-2 if path[-1].key == 'kernel' else -1] ** -0.5
    return jnp.asarray(random.normal(mean, scale, shape.shape), jnp.float32)

  return config, jax.tree_util.tree_map_with_path(draw, shapes)


def make_prompts(lengths, width=None, seed=2, vocab_size=13):
  """Ragged prompts; behind their lengths stand other valid tokens."""
  random = np.random.default_rng(seed)
  shape = len(lengths), width or max(lengths)
  tokens = random.integers(0, vocab_size, shape).astype(np.int32)
  return Prompts(tokens=tokens, lengths=np.array(lengths, np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _rows_logits(config, params, rows):
  hidden, _ = transformer.apply(config, params, rows)
  return transformer.logits(config, params, hidden)


def plain_logits(config, params, prompts, responses):
  """[P, G, T, V]: each prompt and response as one plain row, dense head."""
  num_prompts, samples, length = responses.shape
  lengths = np.repeat(np.asarray(prompts.lengths), samples)
  rows = np.zeros((num_prompts * samples, lengths.max() + length), np.int32)
  for i, size in enumerate(lengths):
    p, g = divmod(i, samples)
    rows[i, :size] = prompts.tokens[p, :size]
    rows[i, size : size + length] = responses[p, g]
  logits = _rows_logits(config, params, rows)
  positions = lengths[:, None] - 1 + np.arange(length)
  chosen = logits[np.arange(len(rows))[:, None], positions]
  return chosen.reshape(num_prompts, samples, length, -1)


def adjusted_probabilities(logits, decoding):
  """The distribution that `decoding` describes, by sorting, in float64."""
  logits = np.array(logits, np.float64)
  if decoding.num_tokens is not None:
    logits[..., decoding.num_tokens :] = -np.inf
  logits /= decoding.temperature or 1.0
  order = np.argsort(-logits, axis=-1)
  ranked = np.take_along_axis(logits, order, axis=-1)
  if decoding.top_k:
    ranked[..., decoding.top_k :] = -np.inf
  p = np.exp(ranked - ranked[..., :1])
  p /= p.sum(axis=-1, keepdims=True)
  before = np.cumsum(p, axis=-1) - p
  p[before >= decoding.top_p] = 0.0
  p /= p.sum(axis=-1, keepdims=True)
  out = np.zeros_like(p)
  np.put_along_axis(out, order, p, axis=-1)
  return out


def exact_statistics(config, params, prompts, tokens, decoding):
  """What `score` gives, of plain passes in float64: {name: [P, G, T]}."""
  logits = plain_logits(config, params, prompts, tokens)
  p = adjusted_probabilities(logits, decoding)
  chosen = np.eye(p.shape[-1])[np.asarray(tokens)]
  with np.errstate(divide='ignore'):  # What pads may never be drawn.
    log_probs = np.log((p * chosen).sum(axis=-1))
  return {
    'log_probs': log_probs,
    'entropy': -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1),
    'score_norms': np.square(chosen - p).sum(axis=-1),
  }


def to_rollouts(
  config,
  params,
  reference,
  responses,
  generation,
  needs,
  micro_prompts,
  baseline=None,
  **settings,
):
  """`rollouts.complete` with all that it may read given one by one."""
  setting = rollouts.Setting(
    config,
    None,
    needs,
    (),
    generation,
    reference,
    None,
    micro_prompts,
    **settings,
  )
  return rollouts.complete(
    setting, {'policy': params}, None, responses, baseline
  )
