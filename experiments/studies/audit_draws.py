"""Draws gradients of estimators on one model and one set of prompts."""

import functools
import hashlib
import io
import json
import pathlib
import re
import zipfile
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import build, checks, cli, critics, online, stored_runs
from experiments.configs import base
from jaxrl_llm import audit, estimators, rollouts, training
from jaxrl_llm.atomic import as_json
from jaxrl_llm.errors import UserError
from jaxrl_llm.minibatches import split_prompts
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.head import TokenStatistics
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.runs.digests import describe, named_leaves
from jaxrl_llm.sampling import policy

# Batches before the first draw, where an estimator remembers earlier ones.
_WARM_UP = 30
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
    critic: parameters of the run's critic; None without.
    reference: parameters of the reference policy; None for the model's own.
    title: its name in the report.
  """

  config: ConfigDict
  model: build.Model
  rows: list[dict]
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
    tree = _restore(path / 'checkpoints', template, number, part=True)
    critic = tree['state']['trainable']['critic']
  if needs.reference and number > config.warm_start.steps:
    reference = _restore(path / 'reference', model.params)
  rows = choose_prompts(config, model, prompts)
  title = f'{path.name}, step {number}'
  return Subject(config, model, rows, critic, reference, title)


def _restore(folder: pathlib.Path, template, step=None, part=False) -> Any:
  with Checkpoints(folder, read_only=True) as checkpoints:
    restored = checkpoints.restore(template, step, part=part)
  if restored is None:
    raise UserError(f'{folder} has no checkpoint')
  return restored[1]


def of_config(config: ConfigDict, prompts: int) -> Subject:
  """Loads the model that a configuration names."""
  if not config.model.path:
    raise UserError(
      'config.model.path is empty: a model with random parameters has no '
      'estimators worth auditing\nname a folder, or a run with --run'
    )
  checks.check(config)
  model = build.model(config.model, config.seed)
  rows = choose_prompts(config, model, prompts)
  return Subject(config, model, rows, None, None, config.model.path)


def choose_prompts(config, model: build.Model, count: int) -> list[dict]:
  """Returns training prompts, drawn with the configuration's seed."""
  data = build.dataset(config, model.tokenizer)
  rows = build.encode(config, data.train, model.tokenizer).rows
  if len(rows) < count:
    raise UserError(f'--prompts is {count}; there are {len(rows)}')
  bits = np.random.PCG64(config.seed).random_raw(len(rows))
  return [rows[i] for i in np.argsort(bits, kind='stable')[:count]]


def variant(subject: Subject, label: str, spec: dict[str, Any]) -> ConfigDict:
  """Returns one estimator's configuration: on policy, all prompts in a batch.

  It has no hints, refilling or curriculum, which choose prompts or groups.

  Raises:
    UserError: the algorithm or the changes do not fit; names the label.
  """
  built = subject.config.copy_and_resolve_references().unlock()
  built.algorithm = ConfigDict(spec['algorithm'])
  built.steps, built.warm_start.steps = 0, 0
  built.training.update(epochs=1, minibatches=1)
  built.rollout.prompts = len(subject.rows)
  plain = base.get_config()
  for section, names in _CHOOSING.items():
    built[section].update({name: plain[section][name] for name in names})
  changes = spec.get('rollout', {})
  try:
    if other := sorted(changes.keys() - {'samples'}):
      raise UserError(
        f'rollout.{other[0]}: prompts and policy are the same for all\nonly '
        'rollout.samples may differ'
      )
    built.lock()
    built.rollout.update(ConfigDict(changes))
    needs = build.estimator(built).needs
    built.critic.warmup = 0
    if not needs.critic:
      built.critic = plain.critic
    elif subject.critic is None:
      raise UserError('it needs a critic, and there is none: audit a PPO run')
    checks.check(built)
  except (KeyError, TypeError, UserError) as error:
    raise UserError(f'{label}: {error.args[0]}') from error
  return built


def begin(
  subject: Subject, config: ConfigDict, label: str
) -> tuple[online.Steps, training.TrainState]:
  """Returns the phase that trains with an estimator, and its first state."""
  key = jax.random.fold_in(
    jax.random.key(config.seed), zlib.crc32(label.encode())
  )
  rl = online.Steps(config, subject.model, subject.rows, key)
  rl.reference = subject.reference or subject.model.params
  state = rl.begin(subject.model.params)
  if rl.critic is not None:
    trainable = state.trainable | {'critic': subject.critic}
    state = state.replace(trainable=trainable)
  difference = rl.log_prob_difference(state, 0)
  rl.fix(rescore=not difference <= config.rollout.log_prob_tolerance)
  needs = rl.estimator.needs
  if needs.running:
    # Running numbers are fixed from here on.
    for step in range(_WARM_UP):
      own = rl.collect(state, step).own
      state = state.replace(running=estimators.update_running(needs, own))
  return rl, state


def load_or_draw(
  subject: Subject,
  config: ConfigDict,
  label: str,
  folder: pathlib.Path,
  tokens: int,
  dimension: int,
) -> tuple[Draws, bool]:
  """Returns an estimator's draws, and whether they were stored.

  Args:
    subject: the model and the prompts.
    config: of `variant`.
    label: the estimator's name, and the seed of its draws.
    folder: where draws are stored.
    tokens: budget of generated tokens.
    dimension: numbers kept of each gradient.

  Raises:
    UserError: the folder cannot be written.
  """
  path = folder / f'{file_name(label)}.npz'
  digest = _digest(subject, config, label, tokens, dimension)
  stored = _read(path, digest)
  if stored is not None:
    return stored, True
  draws = draw(subject, config, label, tokens, dimension)
  memory = io.BytesIO()
  np.savez(memory, np.array(digest), *jax.tree.leaves(draws))
  cli.write_files(folder, {path.name: memory.getvalue()})
  return draws, False


def _read(path: pathlib.Path, digest: str) -> Draws | None:
  """Returns stored draws with these settings, or None."""
  try:
    with np.load(path, allow_pickle=False) as stored:
      if str(stored['arr_0']) != digest:
        return None
      arrays = [stored[f'arr_{i}'] for i in range(1, 8)]
  except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError):
    return None
  whole, equal = audit.Gradients(*arrays[:3]), audit.Gradients(*arrays[3:6])
  return Draws(whole, equal, arrays[6])


def _digest(subject: Subject, config, label, tokens, dimension) -> str:
  """Hashes all that draws depend on, except the library's own code."""
  values = as_json(config.to_dict(), 'configuration')
  trees = {
    'policy': subject.model.params,
    'critic': subject.critic,
    'reference': subject.reference,
  }
  settings = [
    {name: values[name] for name in _SECTIONS},
    [pathlib.Path(file).read_text() for file in build.code_files(config)],
    repr(subject.model.config),
    as_json(subject.rows, 'prompts'),
    {k: describe(named_leaves(tree)) for k, tree in trees.items() if tree},
    [label, tokens, dimension],
  ]
  return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def draw(subject: Subject, config, label, tokens, dimension) -> Draws:
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
  zeros = jax.tree.map(jnp.zeros_like, params)
  shares = []

  def one(i: int) -> tuple[dict[str, Any], int]:
    collected = rl.collect(state, _WARM_UP + i)
    inputs = collected.responses.prompts, collected.rollouts.tokens
    outputs = score(*inputs)
    batch = prepare(collected.rollouts)
    equal = equal_rewards(collected.own)
    shares.append(float(equal.mean()))
    parts = []
    for where in (equal, ~equal):
      weights = differentiate(batch, outputs, where)
      # Groups with equal rewards often have no gradient.
      some = any(bool(jnp.any(x != 0)) for x in weights)
      parts.append(gradient(*inputs, *weights) if some else zeros)
    whole = jax.tree.map(jnp.add, *parts)
    generated = int(np.asarray(collected.responses.samples.mask).sum())
    return {'equal': parts[0], 'whole': whole}, generated + collected.tokens

  drawn = audit.draw_gradients(one, tokens=tokens, dimension=dimension)
  return Draws(drawn['whole'], drawn['equal'], np.array(shares))


def equal_rewards(rollouts: estimators.Rollouts) -> jax.Array:
  """Marks prompts, [P, 1, 1], whose several valid responses earn the same."""
  valid = estimators.valid_responses(rollouts)
  several = valid.sum(axis=1, keepdims=True) > 1
  low = jnp.where(valid, rollouts.rewards, jnp.inf).min(axis=1, keepdims=True)
  high = jnp.where(valid, rollouts.rewards, -jnp.inf)
  return several & (low >= high.max(axis=1, keepdims=True))


def token_weights(
  estimator: estimators.Estimator,
  batch: estimators.Batch,
  outputs: TokenStatistics,
  where: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns −∂ loss / ∂ log-probabilities and entropies, [P, G, T] each.

  A critic's own error is left out: it is not part of the policy gradient.

  Args:
    estimator: the loss.
    batch: from its `prepare`.
    outputs: the policy's statistics of the batch.
    where: [P, 1, 1] bool, the prompts that contribute.
  """
  kept = batch.replace(weights=jnp.where(where, batch.weights, 0.0))

  def objective(log_probs, entropy):
    given = estimators.Outputs(
      log_probs=log_probs, entropy=entropy, values=batch.values
    )
    return -estimator.loss(given, kept)

  return jax.grad(objective, argnums=(0, 1))(outputs.log_probs, outputs.entropy)


@functools.partial(
  jax.jit, static_argnames=('config', 'decoding', 'micro_prompts', 'chunk')
)
def weighted_gradient(
  config: ModelConfig,
  params: Any,
  prompts: policy.Prompts,
  tokens: jax.Array,
  by_log_probs: jax.Array,
  by_entropy: jax.Array,
  *,
  decoding: policy.Decoding,
  micro_prompts: int,
  chunk: int,
) -> Any:
  """Returns ∇ Σ weights · (log-probabilities, entropies), a tree like `params`.

  All estimators share one program: they differ in the weights alone.
  """

  def objective(params, part):
    *inputs, by_log_probs, by_entropy = part
    found = policy.score(config, params, *inputs, decoding, chunk)
    return (by_log_probs * found.log_probs + by_entropy * found.entropy).sum()

  def add(total, part):
    return jax.tree.map(jnp.add, total, jax.grad(objective)(params, part)), None

  everything = (prompts, tokens, by_log_probs, by_entropy)
  parts = split_prompts(everything, micro_prompts)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  return jax.lax.scan(add, zeros, parts)[0]


def file_name(label: str) -> str:
  """Returns a label as the name of a file."""
  return re.sub(r'\W+', '_', label).strip('_').lower()
