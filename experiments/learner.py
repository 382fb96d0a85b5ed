"""What online RL trains and how: estimator, critic, optimiser, update."""

import jax

from experiments import build, critics
from jaxrl_llm import sharding, training
from jaxrl_llm.estimators import diagnostics


class Learner:
  """The part of a run that depends on the algorithm and on no data.

  Args:
    config: the whole configuration.
    model: the policy; shapes serve for its parameters, as `build.outline` has
      them.

  Attributes:
    estimator: of `config.algorithm`.
    critic: of the estimator; None without.
    decoding: the settings that responses are sampled with.
    micro_prompts: prompts, with all their responses, read at one time.
    optimizer: of what is trained.
    rates: number of updates taken → the next one's learning rates, by name.
    update: of `training.make_update`.
  """

  def __init__(self, config, model: build.Model):
    self._config = config
    self.estimator = build.estimator(config)
    self.decoding = build.decoding(config, model, config.rollout.temperature)
    self.micro_prompts = build.micro_prompts(config)
    needs, chunk = self.estimator.needs, config.training.chunk
    self.optimizer, self.rates = critics.optimizer(config, needs)
    per_token = build.token_metrics(config)
    if needs.reference:
      per_token['kl'] = diagnostics.reference_kl
    self.critic = None
    forward = training.policy_forward(model.config, self.decoding, chunk)
    if needs.critic:
      self.critic = critics.critic(config, model)
      forward = training.actor_critic_forward(
        model.config, self.decoding, self.critic, chunk
      )
      per_token |= critics.value_metrics(config)
    self.update = training.make_update(
      forward, self.estimator, self.optimizer, self.micro_prompts, per_token
    )

  def begin(self, policy_params) -> training.TrainState:
    """The state that online RL begins with, critic included."""
    beginning = None
    if self.critic is not None:
      beginning = critics.start(self._config, self.critic, policy_params)
    return self._state(policy_params, beginning)

  def shapes(self, policy_params) -> training.TrainState:
    """Shapes of `begin`, from nothing but the shapes of its argument."""
    beginning = None
    if self.critic is not None:
      beginning = critics.shapes(self._config, self.critic)
    state = jax.eval_shape(self._state, policy_params, beginning)
    return sharding.with_shardings(state)

  def _state(self, policy_params, critic_params) -> training.TrainState:
    return build.init_state(
      policy_params, self.optimizer, self.estimator, critic_params
    )
