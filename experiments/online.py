"""Online RL as the main phase of a run: the trainer and its data."""

from collections.abc import Callable

import jax
import numpy as np

from experiments import build, critics, schedule
from experiments.schedule import Evaluation, Phase, Result
from jaxrl_llm import estimators, rollouts, sharding, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.rollouts import groups
from jaxrl_llm.rollouts.collect import Keys
from jaxrl_llm.tasks import sources
from jaxrl_llm.tasks.curriculum import Curriculum
from jaxrl_llm.tasks.hints import Hints, has_solution

# Numbers that are folded into the run's key, by use.
_USES = Keys(responses=1, shuffle=2, branches=3, refill=5, hints=6)
_HELD_OUT = 4


def trainer(
  config,
  model: build.Model,
  rewards=(),
  generation: rollouts.Generation | None = None,
  reference=None,
  rescore: bool = False,
) -> training.Trainer:
  """Builds the trainer of a configuration.

  Args:
    config: the whole configuration.
    model: the policy; its parameters may be shapes.
    rewards: result of `build.reward_parts`; empty if nothing is sampled.
    generation: None for the configuration's, padded with 0.
    reference: parameters of the reference policy; None for those of `model`.
    rescore: recompute the sampler's log-probabilities in the trainer.
  """
  estimator = build.estimator(config)
  needs = estimator.needs
  per_token, per_batch = build.token_metrics(config), {}
  if needs.reference:
    per_token['kl'] = diagnostics.reference_kl
    reference = model.params if reference is None else reference
  critic = None
  if needs.critic:
    critic = critics.critic(config, model)
    per_token |= critics.value_metrics(config)
    per_batch['critic/explained_variance'] = critics.explained_variance(config)
  settings = config.training
  return training.online(
    model.config,
    model.tokenizer,
    estimator,
    optimizer(config, needs)[0],
    rewards,
    generation or build.generation(config, model, 0),
    reference=reference,
    critic=critic,
    micro_prompts=build.micro_prompts(config),
    minibatches=settings.minibatches,
    epochs=settings.epochs,
    chunk=settings.chunk,
    rescore=rescore,
    per_token=per_token,
    per_batch=per_batch,
  )


def optimizer(config, needs: estimators.Needs):
  """Builds the optimiser of online RL, and its learning rates.

  With a critic, both have their own; the policy's optimiser and its schedule
  start after `config.critic.warmup` steps.

  Returns:
    (transformation, rates): `rates` maps the number of updates taken to the
    learning rates of the next one, by metric name.
  """
  per_step = config.training.epochs * config.training.minibatches
  left_out = config.critic.warmup * per_step if needs.critic else 0
  total = config.steps * per_step
  for_policy, schedule = build.optimizer(config.optimizer, total - left_out)

  def rate(updates: int) -> float:
    return float(schedule(updates - left_out)) if updates >= left_out else 0.0

  if not needs.critic:
    return for_policy, lambda updates: {'learning_rate': rate(updates)}
  for_critic, critic_schedule = build.optimizer(config.critic.optimizer, total)
  both = training.by_part(
    policy=training.delayed(for_policy, left_out), critic=for_critic
  )
  return both, lambda updates: {
    'learning_rate': rate(updates),
    'critic/learning_rate': float(critic_schedule(updates)),
  }


class Steps(Phase):
  """The steps of online RL, each a function of the state and its number.

  `Online` adds held-out prompts.

  Args:
    config: the whole configuration.
    model: the model to train.
    rows: training prompts.
    key: PRNG key of the run.

  Attributes:
    key: PRNG key; a resumed run sets the one in its checkpoint.
    estimator, critic, optimizer: those of the configuration.
    generation, rewards: its sampling settings and reward functions.
    source: source of the steps' own prompts.
    dropped: number of prompts over budget.
  """

  def __init__(self, config, model: build.Model, rows: list[dict], key):
    self._config, self.model, self.key = config, model, key
    for name, prompts in (
      ('config.rollout.prompts', config.rollout.prompts),
      ('config.training.micro_prompts', build.micro_prompts(config)),
    ):
      sharding.check_rows(prompts, config.rollout.samples, name)
    self._encoded = build.encode(config, rows, model.tokenizer)
    self.dropped = self._encoded.dropped
    self.source = prompt_source(config, self._encoded, config.seed)
    self._groups = group_tools(config, self._encoded, model.tokenizer)
    self.generation = build.generation(config, model, self._encoded.pad_id)
    self.rewards = build.reward_parts(config)
    self.estimator = build.estimator(config)
    self.critic = None
    if self.estimator.needs.critic:
      self.critic = critics.critic(config, model)
    self.keeps_reference = self.estimator.needs.reference
    self.optimizer, self.rates = optimizer(config, self.estimator.needs)
    self._fixed = {'reference': None, 'rescore': False}
    self._trainer = None

  @property
  def trainer(self) -> training.Trainer:
    """The trainer, built on first use."""
    if self._trainer is None:
      self._trainer = trainer(
        self._config,
        self.model,
        self.rewards,
        self.generation,
        **self._fixed,
      )
    return self._trainer

  def fix(self, **changes) -> None:
    """Sets `reference` or `rescore` before the first step."""
    self._fixed |= changes
    self._trainer = None

  @property
  def reference(self):
    """The parameters of the reference policy."""
    return self._fixed['reference']

  @reference.setter
  def reference(self, params):
    self.fix(reference=params)

  @property
  def rescore(self) -> bool:
    """True if the trainer recomputes the sampler's log-probabilities."""
    return self._fixed['rescore']

  def begin(self, policy_params) -> training.TrainState:
    """Returns the initial state of online RL, critic included.

    Updates donate the parameters that are passed in.
    """
    parameters = None
    if self.critic is not None:
      parameters = critics.start(self._config, self.critic, policy_params)
    return build.init_state(
      policy_params, self.optimizer, self.estimator, parameters
    )

  def shapes(self, policy_params) -> training.TrainState:
    """Returns the shapes of `begin` from the shapes of its argument."""
    return critics.shapes(
      self._config, self.estimator, self.critic, self.optimizer, policy_params
    )

  def collect(self, state: training.TrainState, step: int, stop=None):
    """Samples a step and returns its `Collected` rollouts."""
    return self.trainer.collect(state, *self._inputs(step), stop)

  def log_prob_difference(self, state: training.TrainState, step: int) -> float:
    """Returns the largest |trainer − sampler| log-probability of a step."""
    return training.log_prob_difference(
      self.trainer.setting._replace(
        micro_prompts=build.micro_prompts(self._config)
      ),
      state.trainable['policy'],
      self.source.batch(step),
      self._keys(step).responses,
    )

  def step(self, state: training.TrainState, step: int, stop=None) -> Result:
    """Samples and scores responses, and takes the step's updates."""
    rates = self.rates(int(state.updates))
    state, metrics, sampled = self.trainer.step(
      state, *self._inputs(step), stop
    )
    metrics = metrics | self._curriculum(step) | rates
    return Result(
      state,
      metrics,
      sampled.timings,
      sampled.tokens,
      sampled.responses,
      sampled.advantages,
      sampled.failures,
    )

  def _inputs(self, step: int):
    """Returns prompts, keys and groups of a step."""
    return self.source.batch(step), self._keys(step), self._groups(step)

  def _keys(self, step: int) -> Keys:
    fold = jax.random.fold_in
    return Keys(*(fold(fold(self.key, use), step) for use in _USES))

  def _curriculum(self, step: int) -> dict[str, float]:
    if not self._config.prompts.curriculum:
      return {}
    return {
      'curriculum/share': self.source.share(step),
      'curriculum/difficulty': self.source.difficulty(step),
    }


class Online(Steps):
  """Online RL as the main phase of a run.

  Args:
    config: the whole configuration.
    model: the model to train.
    data: data of the task.
    key: PRNG key of the run.
    folder: folder of the run.
  """

  def __init__(self, config, model: build.Model, data, key, folder):
    del folder
    super().__init__(config, model, data.train, key)
    self._prompts = len(data.train)
    self._held_out = schedule.build_held_out(
      config, model, data.held_out, self.rewards, None
    )

  def start(self, state: training.TrainState) -> list[str]:
    """Chooses the sampler's or the trainer's log-probabilities."""
    difference = self.log_prob_difference(state, 0)
    limit = self._config.rollout.log_prob_tolerance
    if not np.isfinite(difference):
      raise UserError(
        f'log-probabilities of sampler and trainer differ by {difference}\n'
        "the model's parameters do not yield finite log-probabilities"
      )
    self.fix(rescore=difference > limit)
    if not self.rescore:
      return []
    return [
      f'sampler and trainer differ by {difference:.2g} nats, more than '
      f'{limit:.2g}: the trainer recomputes log-probabilities'
    ]

  def save(self):
    return {'rescore': self.rescore}

  def load(self, values) -> None:
    self.fix(rescore=values['rescore'])

  def fingerprint(self):
    return {
      'training': self.source.fingerprint(),
      'held-out': sources.PromptSource(
        self._held_out.encoded, 1, 0
      ).fingerprint(),
    }

  def evaluate(self, trainable, step: int, stop) -> Evaluation:
    setting = self._held_out.setting._replace(reference=self.reference)
    key = jax.random.fold_in(self.key, _HELD_OUT)
    held_out = self._held_out._replace(setting=setting, key=key)
    table = self._config.log.table
    return schedule.evaluate(held_out, trainable['policy'], step, table, stop)

  def describe(self) -> list[str]:
    held, dropped = self._held_out.encoded, self.dropped
    lines = [
      f'{self._prompts - dropped:,} training and {len(held.rows):,} held-out '
      f'prompts; dropped as over budget: {dropped:,} and {held.dropped:,}'
    ]
    per_step = self._config.rollout.prompts
    known = self._prompts - dropped
    if per_step > known:
      lines.append(
        f'{per_step:,} prompts per step (config.rollout.prompts) of {known:,}: '
        'each step repeats some'
      )
    if self.critic is not None:
      lines.append(critics.describe(self._config))
    return lines


def group_tools(config, encoded, tokenizer) -> Callable[[int], groups.Groups]:
  """Returns step → its `Groups`: refilled, hinted, or as sampled.

  Args:
    config: the whole configuration.
    encoded: training prompts.
    tokenizer: tokenizer of the model.

  Raises:
    UserError: hints are configured, but no prompt has a solution.
  """
  settings, tools = config.rollout, []
  if settings.hints:
    if not any(map(has_solution, encoded.rows)):
      raise UserError(
        'config.rollout.hints: no training prompt has a solution\n'
        "give rows a text in the column 'solution', or set hints to ()"
      )
    hints = Hints(
      tokenizer,
      settings.hint_template,
      **build.around_prompts(config),
    )
    tools.append(
      groups.hint(
        hints.encode, encoded, settings.hints, settings.hint_threshold
      )
    )
  rounds = settings.refill
  if not rounds:
    chosen = groups.chain(*tools) if tools else groups.as_sampled
    return lambda step: chosen
  seed = sources.derive_seed(config.seed, 'refill')
  further = prompt_source(config, encoded, seed, rounds)
  return lambda step: groups.chain(
    *tools, groups.refill(lambda i: further.batch(step * rounds + i), rounds)
  )


def prompt_source(
  config, encoded, seed: int, batches_per_step: int = 1
) -> sources.PromptSource | Curriculum:
  """Returns the source of prompts that `config.prompts` specifies.

  Args:
    config: the whole configuration.
    encoded: training prompts.
    seed: seed of the order.
    batches_per_step: maximum number of batches of P prompts per step.
  """
  settings, count = config.prompts, config.rollout.prompts
  if not settings.curriculum:
    return sources.PromptSource(encoded, count, seed)
  return Curriculum(
    encoded,
    settings.curriculum,
    count,
    seed,
    steps=settings.curriculum_steps,
    stages=settings.curriculum_stages,
    batches_per_step=batches_per_step,
  )
