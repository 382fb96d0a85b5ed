"""Gradients of estimators on one model and one set of prompts."""

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

from experiments import build, checks, critics, online, stored_runs
from experiments.configs import base
from jaxrl_llm import audit, estimators, rollouts, training
from jaxrl_llm.atomic import as_json, write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.minibatches import split_prompts
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.head import TokenStatistics
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.runs.digests import describe, named_leaves
from jaxrl_llm.sampling import policy
from jaxrl_llm.training.critic import Critic

# Batches before the first draw, where an estimator remembers earlier ones.
_WARM_UP = 30
_NAMES = ('vectors', 'squared_norms', 'tokens')


class Subject(NamedTuple):
  """What all estimators are measured on.

  Attributes:
    config: of the task, the rewards and the sampling.
    model: with its parameters.
    rows: the P prompts, rows of the data set.
    critic: parameters of the run's critic; None without.
    reference: parameters of the reference policy; None for the model's own.
    title: what it is, in words.
  """

  config: ConfigDict
  model: build.Model
  rows: list[dict]
  critic: Any
  reference: Any
  title: str


class Draws(NamedTuple):
  """Of one estimator.

  Attributes:
    whole: its gradients.
    equal: the part of each that groups with equal rewards contribute.
    equal_groups: [n], the share of such groups.
  """

  whole: audit.Gradients
  equal: audit.Gradients
  equal_groups: np.ndarray


def of_run(
  folder: str, step: str, prompts: int, trust_code: bool = False
) -> Subject:
  """A checkpoint of a run: its policy, critic and reference policy.

  Args:
    folder: of the run.
    step: 'newest', 'best' or a number.
    prompts: how many training prompts.
    trust_code: execute functions of a user's that its configuration names.
  """
  untrusted = () if trust_code else build.CODE
  config, model, number = stored_runs.load(folder, step, untrusted)
  rl = build.estimator(config)
  path = pathlib.Path(folder)
  critic = reference = None
  if rl.needs.critic and number > config.warm_start.steps:
    shapes = critics.critic_shapes(config, critics.critic(config, model))
    template = {'state': {'trainable': {'critic': shapes}}}
    with Checkpoints(path / 'checkpoints', read_only=True) as checkpoints:
      _, tree, _ = checkpoints.restore(template, number, part=True)
    critic = tree['state']['trainable']['critic']
  if rl.needs.reference and number > config.warm_start.steps:
    with Checkpoints(path / 'reference', read_only=True) as checkpoints:
      found = checkpoints.restore(model.params)
    if found is None:
      raise UserError(f'{path / "reference"} has no reference policy')
    reference = found[1]
  return Subject(
    config,
    model,
    choose_prompts(config, model, prompts),
    critic,
    reference,
    f'{path.name}, step {number}',
  )


def of_config(config: ConfigDict, prompts: int) -> Subject:
  """The model that a configuration names."""
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
  """Training prompts, drawn with the configuration's seed.

  Raises:
    UserError: there are fewer.
  """
  data = build.dataset(config, model.tokenizer)
  rows = build.encode(config, data.train, model.tokenizer).rows
  if len(rows) < count:
    raise UserError(f'--prompts is {count}; there are {len(rows)}')
  bits = np.random.PCG64(config.seed).random_raw(len(rows))
  return [rows[i] for i in np.argsort(bits, kind='stable')[:count]]


def variant(subject: Subject, label: str, spec: dict[str, Any]) -> ConfigDict:
  """The configuration of one estimator: on policy, all prompts in a batch.

  Nothing chooses among prompts or groups: no hints, refilling or curriculum.

  Raises:
    UserError: the algorithm or the changes do not fit; names the label.
  """
  built = subject.config.copy_and_resolve_references().unlock()
  built.algorithm = ConfigDict(spec['algorithm'])
  built.steps, built.warm_start.steps = 0, 0
  built.training.update(epochs=1, minibatches=1)
  built.rollout.prompts = len(subject.rows)
  plain = base.get_config()
  for name in ('refill', 'hints', 'hint_threshold', 'hint_template'):
    built.rollout[name] = plain.rollout[name]
  for name in ('curriculum', 'curriculum_steps', 'curriculum_stages'):
    built.prompts[name] = plain.prompts[name]
  changes = spec.get('rollout', {})
  try:
    if other := sorted(set(changes) - {'samples'}):
      raise UserError(
        f'rollout.{other[0]}: prompts and policy are the same for all\nonly '
        'rollout.samples may differ'
      )
    built.lock()
    built.rollout.update(ConfigDict(changes))
    needs = build.estimator(built).needs
    built.critic.warmup = 0
    if not needs.critic:
      built.critic = base.get_config().critic
    elif subject.critic is None:
      raise UserError('it needs a critic, and there is none: audit a PPO run')
    checks.check(built)
  except (KeyError, TypeError, UserError) as error:
    reason = str(error.args[0])
    raise UserError(f'{label}: {reason}') from error
  return built


def begin(
  subject: Subject, config: ConfigDict, label: str
) -> tuple[online.Steps, training.TrainState]:
  """The phase that trains with an estimator, and its first state."""
  key = jax.random.fold_in(
    jax.random.key(config.seed), zlib.crc32(label.encode())
  )
  rl = online.Steps(config, subject.model, subject.rows, key)
  reference = subject.reference
  rl.fix(reference=subject.model.params if reference is None else reference)
  state = rl.begin(subject.model.params)
  if rl.critic is not None:
    state = state.replace(
      trainable=state.trainable | {'critic': subject.critic}
    )
  difference = rl.log_prob_difference(state, 0)
  rl.fix(rescore=not difference <= config.rollout.log_prob_tolerance)
  needs = rl.estimator.needs
  if needs.running:
    # Running numbers are fixed from here on.
    for step in range(_WARM_UP):
      own = rl.collect(state, step).own
      state = state.replace(running=estimators.update_running(needs, own))
  return rl, state


def critic_of(subject: Subject) -> Critic:
  """The run's critic, without its parameters."""
  return critics.critic(subject.config, subject.model)


def load_or_draw(
  subject: Subject,
  config: ConfigDict,
  label: str,
  folder: pathlib.Path,
  tokens: int,
  dimension: int,
) -> tuple[Draws, bool]:
  """An estimator's draws, and whether they were stored.

  Args:
    subject: what it is measured on.
    config: of `variant`.
    label: the estimator's name, and its randomness.
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
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _to_bytes(draws, digest))
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from error
  return draws, False


def draw(
  subject: Subject,
  config: ConfigDict,
  label: str,
  tokens: int,
  dimension: int,
) -> Draws:
  """Draws an estimator's gradient; the arguments are `load_or_draw`'s."""
  rl, state = begin(subject, config, label)
  params = state.trainable['policy']
  prepare = jax.jit(rl.estimator.prepare)
  differentiate = jax.jit(functools.partial(token_weights, rl.estimator))
  settings = {
    'decoding': rl.trainer.setting.generation.decoding,
    'micro_prompts': build.micro_prompts(config),
    'chunk': config.training.chunk,
  }
  zeros = jax.tree.map(jnp.zeros_like, params)
  shares = []

  def one(i: int) -> tuple[dict[str, Any], int]:
    found = rl.collect(state, _WARM_UP + i)
    inputs = found.responses.prompts, found.rollouts.tokens
    outputs = rollouts.score_tokens(
      subject.model.config, params, *inputs, **settings
    )
    batch, equal = prepare(found.rollouts), equal_rewards(found.own)
    shares.append(float(equal.mean()))
    parts = []
    for chosen in (equal, ~equal):
      weights = differentiate(batch, outputs, chosen)
      # Groups of equal rewards often give nothing: so much is known for free.
      some = any(bool(jnp.any(x != 0)) for x in weights)
      parts.append(
        weighted_gradient(
          subject.model.config, params, *inputs, *weights, **settings
        )
        if some
        else zeros
      )
    whole = jax.tree.map(jnp.add, *parts)
    generated = int(np.asarray(found.responses.samples.mask).sum())
    return {'equal': parts[0], 'whole': whole}, generated + found.tokens

  drawn = audit.draw_gradients(one, tokens=tokens, dimension=dimension)
  return Draws(drawn['whole'], drawn['equal'], np.array(shares))


def equal_rewards(rollouts: estimators.Rollouts) -> jax.Array:
  """[P, 1, 1] bool, whether two or more valid responses all earned the same."""
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
  """−∂ loss / ∂ log-probabilities and entropies, [P, G, T] each.

  A critic's own error is left out: it is no part of the policy gradient.

  Args:
    estimator: the loss.
    batch: of its `prepare`.
    outputs: what the policy says of the batch.
    where: [P, 1, 1] bool, the prompts that contribute.
  """
  kept = batch.replace(weights=jnp.where(where, batch.weights, 0.0))

  def objective(log_probs, entropy):
    found = estimators.Outputs(
      log_probs=log_probs, entropy=entropy, values=batch.values
    )
    return -estimator.loss(found, kept)

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
  """∇ of Σ weights · (log-probabilities, entropies): a tree like `params`.

  One program for all estimators, which differ in the weights alone.
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
  """A label as the name of a file."""
  return re.sub(r'\W+', '_', label).strip('_').lower()


def _digest(subject: Subject, config, label, tokens, dimension) -> str:
  """Of everything that draws depend on, but for the library's own code."""
  files = [pathlib.Path(file) for file in build.code_files(config)]
  settings = {
    'config': {
      name: value
      for name, value in as_json(config.to_dict(), 'configuration').items()
      if name in ('seed', 'algorithm', 'rollout', 'prompts', 'rewards')
    },
    'model': repr(subject.model.config),
    'rows': as_json(subject.rows, 'prompts'),
    'parameters': {
      name: describe(named_leaves(tree))
      for name, tree in (
        ('policy', subject.model.params),
        ('critic', subject.critic),
        ('reference', subject.reference),
      )
      if tree is not None
    },
    'files': [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
    'draws': [label, tokens, dimension],
  }
  return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _to_bytes(draws: Draws, digest: str) -> bytes:
  buffer = io.BytesIO()
  parts = {'whole': draws.whole, 'equal': draws.equal}
  np.savez(
    buffer,
    digest=np.array(digest),
    equal_groups=draws.equal_groups,
    **{
      f'{k}_{name}': getattr(v, name)
      for k, v in parts.items()
      for name in _NAMES
    },
  )
  return buffer.getvalue()


def _read(path: pathlib.Path, digest: str) -> Draws | None:
  """Stored draws of these settings; None where there are none."""
  try:
    with np.load(path, allow_pickle=False) as stored:
      if str(stored['digest']) != digest:
        return None
      part = lambda k: audit.Gradients(*(stored[f'{k}_{n}'] for n in _NAMES))
      return Draws(part('whole'), part('equal'), stored['equal_groups'])
  except (FileNotFoundError, zipfile.BadZipFile, KeyError, ValueError):
    return None
