"""Critic, optimiser and diagnostics that a configuration describes."""

import functools
from collections.abc import Callable

import jax

from experiments import build
from jaxrl_llm import estimators, naming, sharding, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.models import transformer
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.training import critic as critic_lib

# Names that `config.critic.trunk` may have.
TRUNKS = {'separate': critic_lib.separate, 'shared': critic_lib.shared}


def critic(config, built: build.Model) -> critic_lib.Critic:
  """Returns the critic that `config.critic` describes.

  Raises:
    UserError: the folder it is to begin with holds no model whose values could
      be learned, or one that reads other tokens than the policy writes.
  """
  section = config.critic
  if not section.path:
    return TRUNKS[section.trunk](built.config)
  shape = folders.load_trunk_config(
    section.path, **build.model_settings(config.model)
  )
  folders.check_vocabulary(shape, built.tokenizer)
  known = folders.load_tokenizer(section.path).get_vocab()
  for token, i in built.tokenizer.get_vocab().items():
    if known.get(token) != i:
      raise UserError(
        f'config.critic.path: in {section.path} the token {token!r} has the '
        f'id {known.get(token)}, in the policy {i}\n'
        "name a model with the policy's tokenizer"
      )
  longest = config.prompts.max_tokens + config.rollout.max_tokens
  if longest > shape.max_length:
    raise UserError(
      f'config.critic.path: {section.path} reads {shape.max_length} tokens; '
      f'prompt and response may have {longest}\n'
      'lower config.prompts.max_tokens or config.rollout.max_tokens'
    )
  return TRUNKS[section.trunk](shape)


def describe(config) -> str:
  """The critic in a line."""
  if config.critic.trunk == 'shared':
    return "critic: a value head on the policy's hidden states"
  beginning = config.critic.path or "the policy's parameters"
  return f'critic: a trunk of its own, which begins with {beginning}'


def start(config, built: critic_lib.Critic, policy_params):
  """What a critic begins with: a copy of the policy, or its folder."""
  if not config.critic.path:
    return sharding.place(built.init(policy_params))
  trunk, score = folders.load_trunk(
    config.critic.path,
    built.config,
    config.model.param_dtype,
    sharding.shardings(_trunk_shapes(config, built)),
  )
  return sharding.place(built.init(trunk, score))


def critic_shapes(config, built: critic_lib.Critic):
  """Returns the shapes of `start`, from nothing."""
  return jax.eval_shape(built.init, _trunk_shapes(config, built))


def shapes(
  config, estimator, critic, optimizer, policy_params
) -> training.TrainState:
  """Returns the shapes of a first state, from those of the policy."""
  critic_params = None if critic is None else critic_shapes(config, critic)
  make = lambda policy, value: build.init_state(
    policy, optimizer, estimator, value
  )
  return sharding.with_shardings(
    jax.eval_shape(make, policy_params, critic_params)
  )


def _trunk_shapes(config, built: critic_lib.Critic):
  init = functools.partial(
    transformer.init, built.config, param_dtype=config.model.param_dtype
  )
  return jax.eval_shape(init, jax.random.key(0))


def optimizer(config, needs: estimators.Needs):
  """The optimiser of online RL, and its learning rates.

  With a critic both have their own; the policy's begins, with its schedule,
  after `config.critic.warmup` steps.

  Returns:
    (transformation, rates): `rates` maps the number of updates taken to the
    rates of the next one, by metric name.
  """
  per_step = config.training.epochs * config.training.minibatches
  left_out = config.critic.warmup * per_step if needs.critic else 0
  total = config.steps * per_step
  chosen, course = build.optimizer(config.optimizer, total - left_out)

  def rate(updates: int) -> float:
    return float(course(updates - left_out)) if updates >= left_out else 0.0

  if not needs.critic:
    return chosen, lambda updates: {'learning_rate': rate(updates)}
  of_critic, its_course = build.optimizer(config.critic.optimizer, total)
  both = training.by_part(
    policy=training.delayed(chosen, left_out), critic=of_critic
  )
  return both, lambda updates: {
    'learning_rate': rate(updates),
    'critic/learning_rate': float(its_course(updates)),
  }


def explained_variance(config) -> Callable[[estimators.Rollouts], jax.Array]:
  """How much of the returns' variance the values of rollouts explain.

  The return of a state is the shaped reward to go: the algorithm's own value
  target with λ = 1.  An algorithm of the user's is measured so if it has a
  parameter `lam`, otherwise against its value targets as they are.
  """
  spec = config.algorithm.to_dict()
  if naming.argument(build.ALGORITHMS, spec, 'lam') is not None:
    spec['lam'] = 1.0
  prepare = build.named_estimator(spec).prepare
  return lambda data: diagnostics.explained_variance(prepare(data))


def value_metrics(config) -> dict[str, diagnostics.Diagnostic]:
  """Per-token diagnostics of the named algorithm's critic."""
  spec = config.algorithm.to_dict()
  clip = naming.argument(build.ALGORITHMS, spec, 'value_clip')
  return diagnostics.critic_per_token(clip)
