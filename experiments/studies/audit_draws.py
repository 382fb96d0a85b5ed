"""Draws gradients of estimators on one model and one set of prompts."""

import functools
import hashlib
import io
import pathlib
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import build, checks, cli, critics, online, stored_runs
from experiments.configs import base
from jaxrl_llm import audit, estimators, rollouts, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import baselines
from jaxrl_llm.minibatches import split_prompts
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.head import TokenStatistics
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.runs.digests import describe, named_leaves
from jaxrl_llm.sampling import policy

# Batches before the first draw, where an estimator remembers earlier ones.
_WARM_UP = 30
# Numbers kept of each gradient.
_DIMENSION = 2**14
# Fields that choose among prompts or groups.
_CHOOSING = {
  'rollout': ('refill', 'hints', 'hint_threshold', 'hint_template'),
  'prompts': ('curriculum', 'curriculum_steps', 'curriculum_stages'),
}
# Sections of a configuration that draws depend on.
_SECTIONS = ('seed', 'algorithm', 'rollout', 'prompts', 'rewards')


class Subject(NamedTuple):
  """The model and the prompts that all estimators share.

  Attributes:
    config: of the task, the rewards and the sampling.
    model: with its parameters.
    rows: P prompts, rows of the data set.
    pool: more prompts, for what varies between them; these P are the first.
    critic: parameters of the run's critic; None without.
    reference: parameters of the reference policy; None for the model's own.
    title: its name in the report.
  """

  config: ConfigDict
  model: build.Model
  rows: list[dict]
  pool: list[dict]
  critic: Any
  reference: Any
  title: str


class Draws(NamedTuple):
  """Draws of one estimator's gradient.

  Attributes:
    whole: the gradients.
    equal: the part of each that groups with equal rewards contribute.
    equal_groups: [n], the share of such groups.
  """

  whole: audit.Gradients
  equal: audit.Gradients
  equal_groups: np.ndarray


def of_run(
  folder: str, step: str, prompts: int, trust_code: bool = False
) -> Subject:
  """Loads a checkpoint of a run: its policy, critic and reference policy.

  Args:
    folder: of the run.
    step: 'newest', 'best' or a number.
    prompts: number of training prompts.
    trust_code: execute the user functions that its configuration names.
  """
  untrusted = () if trust_code else build.CODE
  config, model, number = stored_runs.load(folder, step, untrusted)
  needs, path = build.estimator(config).needs, pathlib.Path(folder)
  critic = reference = None
  if needs.critic and number > config.warm_start.steps:
    shapes = critics.critic_shapes(config, critics.critic(config, model))
    template = {'state': {'trainable': {'critic': shapes}}}
    tree = _restore(path / 'checkpoints', template, number)
    critic = tree['state']['trainable']['critic']
  if needs.reference and number > config.warm_start.steps:
    reference = _restore(path / 'reference', model.params)
  pool = choose_prompts(config, model, prompts)
  title = f'{path.name}, step {number}'
  return Subject(config, model, pool[:prompts], pool, critic, reference, title)


def _restore(folder: pathlib.Path, template, step=None) -> Any:
  """Returns the part of a checkpoint that a template names."""
  with Checkpoints(folder, read_only=True) as checkpoints:
    if restored := checkpoints.restore(template, step, part=True):
      return restored[1]
  raise UserError(f'{folder} has no checkpoint')


def of_config(config: ConfigDict, prompts: int) -> Subject:
  """Loads the model that a configuration names."""
  if not config.model.path:
    raise UserError(
      'config.model.path is empty: a model with random parameters has no '
      'estimators worth auditing\nname a folder, or a run with --run'
    )
  checks.check(config)
  model = build.model(config.model, config.seed)
  pool = choose_prompts(config, model, prompts)
  rows, title = pool[:prompts], config.model.path
  return Subject(config, model, rows, pool, None, None, title)


def choose_prompts(config, model: build.Model, count: int) -> list[dict]:
  """Returns training prompts, drawn with the configuration's seed.

  They are 64 times as many as asked for, where there are so many.
  """
  data = build.dataset(config, model.tokenizer)
  rows = build.encode(config, data.train, model.tokenizer).rows
  if len(rows) < count:
    raise UserError(f'--prompts is {count}; there are {len(rows)}')
  bits = np.random.PCG64(config.seed).random_raw(len(rows))
  return [rows[i] for i in np.argsort(bits, kind='stable')[: 64 * count]]


def variant(subject: Subject, label: str, spec: dict[str, Any]) -> ConfigDict:
  """Returns one estimator's configuration: on policy, all prompts in a batch.

  It has no hints, refilling or curriculum, which choose prompts or groups.

  Raises:
    UserError: the algorithm or the changes do not fit; names the label.
  """
  built = subject.config.copy_and_resolve_references().unlock()
  plain = base.get_config()
  built.steps = built.warm_start.steps = built.critic.warmup = 0
  built.training.update(epochs=1, minibatches=1)
  built.rollout.prompts = len(subject.rows)
  for section, names in _CHOOSING.items():
    built[section].update({name: plain[section][name] for name in names})
  try:
    spec = {'rollout': {}, 'free': False} | spec
    known = set(spec) == {'algorithm', 'rollout', 'free'}
    if not known or set(spec['rollout']) - {'samples', 'allocation'}:
      raise UserError(
        f'{spec} is not like dict(algorithm=dict(name=…), '
        'rollout=dict(samples=8), free=True)\nprompts and policy are the '
        'same for all; rollout and free may be left out'
      )
    built.algorithm = ConfigDict(spec['algorithm'])
    built.rollout.update(spec['rollout'])
    needs = build.estimator(built).needs
    if not needs.critic:
      built.critic = plain.critic
    elif subject.critic is None:
      raise UserError('it needs a critic, and there is none: audit a PPO run')
    checks.check(built)
  except (TypeError, UserError) as error:
    raise UserError(f'{label}: {error.args[0]}') from error
  return built.lock()


def begin(
  subject: Subject, config: ConfigDict, label: str
) -> tuple[online.Steps, training.TrainState]:
  """Returns the phase that trains with an estimator, and its first state."""
  key = jax.random.key(config.seed)
  key = jax.random.fold_in(key, zlib.crc32(label.encode()))
  rl = online.Steps(config, subject.model, subject.rows, key)
  rl.reference = subject.reference or subject.model.params
  state = rl.begin(subject.model.params)
  if rl.critic is not None:
    trainable = state.trainable | {'critic': subject.critic}
    state = state.replace(trainable=trainable)
  difference = rl.log_prob_difference(state, 0)
  rl.fix(rescore=not difference <= config.rollout.log_prob_tolerance)
  # Running numbers are fixed after the warm-up.
  for step in range(_WARM_UP if rl.estimator.needs.running else 0):
    collected = rl.collect(state, step)
    running = estimators.update_running(rl.estimator.needs, collected.own)
    state = state.replace(running=running)
  return rl, state


def load_or_draw(
  subject: Subject,
  config: ConfigDict,
  label: str,
  folder: pathlib.Path,
  tokens: int,
  free: bool = False,
) -> Draws:
  """Returns an estimator's draws, stored ones if their settings are the same.

  Args:
    subject: the model and the prompts.
    config: of `variant`.
    label: the estimator's name, and the seed of its draws.
    folder: where draws are stored.
    tokens: budget of generated tokens.
    free: do not count the tokens of branches.

  Raises:
    UserError: the folder cannot be written.
  """
  start = time.perf_counter()
  path = folder / f'{_digest(subject, config, label, tokens, free)}.npz'
  if path.exists():
    with np.load(path, allow_pickle=False) as stored:
      arrays = list(stored.values())
    source = 'stored'
  else:
    arrays = jax.tree.leaves(draw(subject, config, label, tokens, free))
    memory = io.BytesIO()
    np.savez(memory, *arrays)
    cli.write_files(folder, {path.name: memory.getvalue()})
    source = f'{time.perf_counter() - start:.0f} s'
  whole, equal = audit.Gradients(*arrays[:3]), audit.Gradients(*arrays[3:6])
  spent, count = whole.tokens.sum(), len(whole.tokens)
  print(
    f'{label}: {spent:,.0f} tokens, {count} gradients, {source}', flush=True
  )
  return Draws(whole, equal, arrays[6])


def _digest(subject: Subject, config, label, tokens, free) -> str:
  """Hashes all that draws depend on, except the library's own code."""
  parameters = subject.model.params, subject.critic, subject.reference
  settings = [
    [config[name] for name in _SECTIONS],
    [pathlib.Path(file).read_text() for file in build.code_files(config)],
    [subject.model.config, subject.rows, label, tokens, free, _DIMENSION],
    [tree and describe(named_leaves(tree)) for tree in parameters],
  ]
  return hashlib.sha256(repr(settings).encode()).hexdigest()


def draw(subject: Subject, config, label, tokens, free) -> Draws:
  """Draws an estimator's gradient; the arguments are `load_or_draw`'s."""
  rl, state = begin(subject, config, label)
  params = state.trainable['policy']
  prepare = jax.jit(rl.estimator.prepare)
  differentiate = jax.jit(functools.partial(token_weights, rl.estimator))
  settings = {
    'decoding': rl.generation.decoding,
    'micro_prompts': build.micro_prompts(config),
    'chunk': config.training.chunk,
  }
  score, gradient = (
    functools.partial(f, subject.model.config, params, **settings)
    for f in (rollouts.score_tokens, weighted_gradient)
  )
  zeros, shares = jax.tree.map(jnp.zeros_like, params), []

  def one(i: int) -> tuple[dict[str, Any], int]:
    collected = rl.collect(state, _WARM_UP + i)
    inputs = collected.responses.prompts, collected.rollouts.tokens
    outputs, batch = score(*inputs), prepare(collected.rollouts)
    equal = equal_rewards(collected.own)
    shares.append(float(equal.mean()))
    parts = []
    for where in (equal, ~equal):
      weights = differentiate(batch, outputs, where)
      # Groups with equal rewards often have no gradient.
      some = any(bool(x.any()) for x in jax.tree.leaves(weights))
      parts.append(gradient(*inputs, weights) if some else zeros)
    whole = jax.tree.map(jnp.add, *parts)
    generated = collected.responses.tokens
    generated += 0 if free else collected.tokens
    return {'equal': parts[0], 'whole': whole}, generated

  drawn = audit.draw_gradients(one, tokens=tokens, dimension=_DIMENSION)
  return Draws(drawn['whole'], drawn['equal'], np.array(shares))


def equal_rewards(rollouts: estimators.Rollouts) -> jax.Array:
  """Marks prompts, [P, 1, 1], whose several valid responses earn the same."""
  valid = estimators.valid_responses(rollouts)
  several = valid.sum(axis=1, keepdims=True) > 1
  return several & ~baselines.varies(rollouts.rewards, valid)


def token_weights(
  estimator: estimators.Estimator,
  batch: estimators.Batch,
  outputs: TokenStatistics,
  where: jax.Array,
) -> TokenStatistics:
  """Returns −∂ loss / ∂ log-probabilities and entropies, [P, G, T] each.

  A critic's own error is left out: it is not part of the policy gradient.

  Args:
    estimator: the loss.
    batch: from its `prepare`.
    outputs: the policy's statistics of the batch.
    where: [P, 1, 1] bool, the prompts that contribute.
  """
  kept = batch.replace(weights=jnp.where(where, batch.weights, 0.0))

  def objective(x):
    fields = dict(log_probs=x.log_probs, entropy=x.entropy, values=batch.values)
    return -estimator.loss(estimators.Outputs(**fields), kept)

  return jax.grad(objective)(outputs)


@functools.partial(
  jax.jit, static_argnames=('config', 'decoding', 'micro_prompts', 'chunk')
)
def weighted_gradient(
  config: ModelConfig,
  params: Any,
  prompts: policy.Prompts,
  tokens: jax.Array,
  weights: TokenStatistics,
  *,
  decoding: policy.Decoding,
  micro_prompts: int,
  chunk: int,
) -> Any:
  """Returns ∇ Σ weights · (log-probabilities, entropies), a tree like `params`.

  All estimators share one program: they differ in the weights alone.
  """

  def objective(params, prompts, tokens, weights):
    x = policy.score(config, params, prompts, tokens, decoding, chunk)
    return (weights.log_probs * x.log_probs + weights.entropy * x.entropy).sum()

  def add(total, part):
    gradient = jax.grad(objective)(params, *part)
    return jax.tree.map(jnp.add, total, gradient), None

  parts = split_prompts((prompts, tokens, weights), micro_prompts)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  return jax.lax.scan(add, zeros, parts)[0]
