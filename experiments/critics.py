"""Builds critic, optimiser and diagnostics from a configuration."""

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
  """Builds the critic of `config.critic`.

  Raises:
    UserError: the folder of the critic does not hold a suitable model, or its
      tokenizer differs from the policy's.
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
        "choose a model with the policy's tokenizer"
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
  """Describes the critic in a line."""
  if config.critic.trunk == 'shared':
    return "critic: a value head on the policy's hidden states"
  beginning = config.critic.path or "the policy's parameters"
  return f'critic: a separate trunk, initialised from {beginning}'


def start(config, built: critic_lib.Critic, policy_params):
  """Returns initial parameters, from the policy or the critic's folder."""
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
  """Returns the shapes of `start` without parameters."""
  return jax.eval_shape(built.init, _trunk_shapes(config, built))


def shapes(
  config, estimator, critic, optimizer, policy_params
) -> training.TrainState:
  """Returns the shapes of the initial state, from those of the policy."""
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


def explained_variance(config) -> Callable[[estimators.Rollouts], jax.Array]:
  """Returns a function: the returns' variance explained by the values.

  The return of a state is the shaped reward to go: the algorithm's value target
  with λ = 1.  This also applies to a user's algorithm if it has a parameter
  `lam`; otherwise its unchanged value targets are used.
  """
  spec = config.algorithm.to_dict()
  if naming.argument(build.ALGORITHMS, spec, 'lam') is not None:
    spec['lam'] = 1.0
  prepare = build.named_estimator(spec).prepare
  return lambda data: diagnostics.explained_variance(prepare(data))


def value_metrics(config) -> dict[str, diagnostics.Diagnostic]:
  """Returns the per-token diagnostics of the named algorithm's critic."""
  spec = config.algorithm.to_dict()
  clip = naming.argument(build.ALGORITHMS, spec, 'value_clip')
  return diagnostics.critic_per_token(clip)
