"""The schedule of a run, the interface of its main phase, and its results."""

import dataclasses
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import build, data, stored_runs
from jaxrl_llm import estimators, rollouts, sharding, training
from jaxrl_llm.evaluation import HeldOut, answer, summary
from jaxrl_llm.rewards.scoring import Failures
from jaxrl_llm.runs import Sample
from jaxrl_llm.signals import StopSignal


class Cycle(NamedTuple):
  """The cycle of steps that the main phase of a run repeats: a round.

  Online RL samples and learns in every step.  Other methods first sample for
  some steps, and then learn from the samples for some more.

  Attributes:
    sampling: number of initial steps that only sample.
    learning: number of steps after them, at least 1.
  """

  sampling: int = 0
  learning: int = 1

  @property
  def steps(self) -> int:
    """Number of steps of both kinds."""
    return self.sampling + self.learning


@dataclasses.dataclass
class Schedule:
  """Steps of a run, the warm start's first, and the tokens it generated.

  Attributes:
    first: number of steps of the warm start, which precedes the main phase.
    total: number of steps of both.
    budget: number of generated tokens after which no round starts; 0 for no
      limit.
    cycle: cycle of the main phase.
    step: number of completed steps.
    tokens: number of tokens generated so far, without evaluations.
    tokens_before: `tokens` before the last round.
  """

  first: int
  total: int
  budget: int
  cycle: Cycle = Cycle()
  step: int = 0
  tokens: int = 0
  tokens_before: int = 0

  def advance(self, tokens: int) -> None:
    """Counts a completed step and its generated tokens."""
    if self._place(self.step) == 0:
      self.tokens_before = self.tokens
    self.step += 1
    self.tokens += tokens

  @property
  def in_warm_start(self) -> bool:
    """True if the next step belongs to the warm start."""
    return self.step < self.first

  @property
  def ended(self) -> bool:
    """True if the run is complete, by steps or by tokens."""
    spent = 0 < self.budget <= self.tokens and self._place(self.step) == 0
    return self.step >= self.total or spent

  @property
  def overran(self) -> bool:
    """True if the run has taken more steps than configured."""
    return self.step > self.total or 0 < self.budget <= self.tokens_before

  def evaluation_is_due(self, every: int, every_tokens: int) -> bool:
    """Returns True at both ends of the main phase and at its intervals.

    Rounds with sampling steps are evaluated after sampling, when the model is
    still unchanged, at intervals while they learn, and at their ends.

    Args:
      every: interval in steps of the main phase.
      every_tokens: interval in tokens, used if every step samples and learns;
        0 for none.
    """
    since = self.step - self.first
    if since <= 0 or self.ended:
      return since >= 0
    if self.cycle.sampling:
      place = self._place(self.step)
      if place <= self.cycle.sampling:
        return place in (0, self.cycle.sampling)
    elif every_tokens:
      before, now = self.tokens_before, self.tokens
      if before // every_tokens < now // every_tokens:
        return True
    return since % every == 0

  def checkpoint_is_due(self, every: int) -> bool:
    """Returns True at the end of a phase and after every `every` steps."""
    if self.step == self.first or self.ended:
      return True
    since = self.step - self.first if self.step > self.first else self.step
    return since % every == 0

  def _place(self, step: int) -> int:
    """Returns the number of steps done in the round after `step` steps."""
    return max(step - self.first, 0) % self.cycle.steps


class Result(NamedTuple):
  """Result of a step: state, records, and responses for the sample table.

  Attributes:
    state: the new `TrainState`.
    metrics: numbers that depend only on the computation.
    timings: times in seconds.
    tokens: number of generated tokens.
    responses, advantages: sampled responses and their [P, G] advantages; None
      in the warm start.
    failures: failures of rewards in worker processes, by name in the record.
  """

  state: training.TrainState
  metrics: dict[str, float]
  timings: dict[str, float]
  tokens: int = 0
  responses: rollouts.Responses | None = None
  advantages: np.ndarray | None = None
  failures: Mapping[str, Failures] = types.MappingProxyType({})


class Evaluation(NamedTuple):
  """Results on held-out data.

  Attributes:
    metrics: numbers by name, 'eval/…'.
    samples: rows for the sample table; empty if nothing was sampled.
    failures: failures of rewards in worker processes, by name in the record.
  """

  metrics: dict[str, float]
  samples: Sequence[Sample] = ()
  failures: Mapping[str, Failures] = types.MappingProxyType({})


def to_samples(
  responses: rollouts.Responses,
  step: int,
  advantages: np.ndarray | None = None,
  limit: int | None = None,
) -> list[Sample]:
  """Builds rows for a sample table, with [P, G] advantages if known.

  With a `limit`, returns at most `limit` rows, spread over the prompts.
  """
  mask, finished = sharding.to_host(
    (responses.samples.mask, responses.samples.finished)
  )
  mask, finished = np.concatenate(mask), finished.reshape(-1)
  scores = responses.scores
  per_prompt = len(mask) // len(responses.rows)

  def sample(i: int) -> Sample:
    parts = {
      name: None if np.isnan(values[i]) else float(values[i])
      for name, values in scores.parts.items()
    }
    return Sample(
      step=step,
      prompt=responses.rows[i // per_prompt]['prompt'],
      response=responses.completions[i],
      rewards=parts,
      reward=float(scores.total[i]) if scores.valid[i] else None,
      advantage=None if advantages is None else float(advantages.flat[i]),
      tokens=int(mask[i].sum()),
      finished=bool(finished[i]),
    )

  if limit is None:
    return [sample(i) for i in range(len(mask))]
  count = min(limit, len(mask))
  return [sample(i * len(mask) // count) for i in range(count)]


def build_held_out(
  config, model: build.Model, rows, rewards, key, **changes
) -> HeldOut:
  """Builds a held-out set; `changes` override `config.evaluation`."""
  settings = config.evaluation.to_dict() | changes
  encoded = build.encode(
    config, rows[: settings['prompts'] or None], model.tokenizer
  )
  samples, temperature = settings['samples'], settings['temperature']
  setting = rollouts.Setting(
    model.config,
    model.tokenizer,
    estimators.Needs(),
    rewards,
    build.generation(
      config, model, encoded.pad_id, samples=samples, temperature=temperature
    ),
    # As many responses as in a micro-batch of training, which fits in memory.
    micro_prompts=max(
      build.micro_prompts(config) * config.rollout.samples // samples, 1
    ),
    chunk=config.training.chunk,
  )
  return HeldOut(setting, encoded, settings['batch'], key)


def evaluate(
  held_out: HeldOut, params, step: int, table: int, stop=None
) -> Evaluation:
  """Answers a held-out set; returns metrics and rows for a sample table.

  Args:
    held_out, params, stop: as for `evaluation.answer`.
    step: step number for the sample table.
    table: number of prompts whose first response is shown.
  """
  answers = answer(held_out, params, stop)
  samples = [s for part in answers.responses for s in to_samples(part, step)]
  per_prompt = held_out.setting.generation.samples
  shown = samples[: table * per_prompt : per_prompt]
  return Evaluation(summary(answers), shown, answers.failures)


def failure_messages(
  failures: Mapping[str, Failures], where: str, reported: set[tuple[str, str]]
) -> list[str]:
  """Returns a line for each kind of failure that was not reported before.

  Args:
    failures: failures by name in the record.
    where: where they occurred, such as 'at step 7'.
    reported: (name, kind) of reported failures; the new ones are added.
  """
  lines = []
  for name, each in failures.items():
    for kind, message in each.messages.items():
      if (name, kind) not in reported:
        reported.add((name, kind))
        lines.append(
          f'{name}: {each.counts[kind]} {where} without a score by {kind}: '
          f'{message}'
        )
  return lines


class Phase:
  """The main phase of a run, as `loop.Run` uses it.

  A subclass implements `step`, `fingerprint`, `evaluate` and `describe`; the
  other methods are those of a phase that trains a policy without a critic.

  Attributes:
    cycle: the cycle of steps that it repeats.
    curves: held-out metrics to plot, metric → label; the first is the score
      that selects the best checkpoint.
    keeps_reference: True if the phase needs its initial policy later.
    reference: parameters of that policy, set by `Run` if it is kept.
    model: outline of the model.
    estimator: the estimator whose running numbers the state holds.
    optimizer: optimiser of the trained parameters.
    key: PRNG key of the run; a resumed run sets the one in its checkpoint.
  """

  cycle = Cycle()
  curves: Mapping[str, str] = types.MappingProxyType(
    {'eval/reward': 'held-out reward'}
  )
  keeps_reference = False
  reference = None
  model: build.Model
  estimator: estimators.Estimator
  optimizer: optax.GradientTransformation
  key: jax.Array

  def begin(self, policy_params: Any) -> training.TrainState:
    """Returns the initial state of the phase."""
    return build.init_state(policy_params, self.optimizer, self.estimator)

  def shapes(self, policy_params: Any) -> training.TrainState:
    """Returns the shapes of `begin`."""
    state = jax.eval_shape(self.begin, policy_params)
    return sharding.with_shardings(state)

  def start(self, state: training.TrainState) -> Sequence[str]:
    """Prepares the first step; called again if that step did not complete.

    Returns:
      Lines for the user.
    """
    del state
    return ()

  def step(
    self, state: training.TrainState, number: int, stop: StopSignal
  ) -> Result:
    """Takes step `number` of the phase, from 0."""
    raise NotImplementedError

  def save(self) -> dict[str, Any]:
    """Returns the JSON values that a checkpoint holds besides the state."""
    return {}

  def load(self, values: Mapping[str, Any]) -> None:
    """Restores what `save` returned."""

  def fingerprint(self) -> dict[str, Any]:
    """Returns values that identify the data of each step number.

    They stand under 'training' for the phase's own steps.
    """
    raise NotImplementedError

  def evaluate(self, trainable: Any, step: int, stop: StopSignal) -> Evaluation:
    """Evaluates on held-out data after `step` steps of the run."""
    raise NotImplementedError

  def finish(self, trainable: Any, folder: pathlib.Path) -> Sequence[str]:
    """Writes files, such as `hf/` for `transformers`; returns their names."""
    trained = self.model._replace(params=trainable['policy'])
    stored_runs.export(trained, folder / 'hf')
    return ['hf/ (for transformers)']

  def describe(self) -> Sequence[str]:
    """Returns lines about data and parts."""
    raise NotImplementedError


# (configuration, outline of the model, data, key, folder) → phase.
MakePhase = Callable[
  [ConfigDict, build.Model, data.Data, Any, pathlib.Path], Phase
]


class Script(NamedTuple):
  """The parts that differ between the scripts that train.

  Attributes:
    check: raises UserError for a configuration that the script cannot train.
    phase: builds the main phase.
  """

  check: Callable[[ConfigDict], None]
  phase: MakePhase


def describe(
  model: build.Model, state: training.TrainState, main: Phase, task: data.Data
) -> list[str]:
  """Describes model, devices, main phase and data, a line each."""
  trained = state.trainable.get('policy', state.trainable)
  size = sum(leaf.size for leaf in jax.tree.leaves(trained))
  sizes = sharding.mesh_sizes().items()
  mesh = ' x '.join(f'{name} {size}' for name, size in sizes)
  return [
    f'{model.config.family} model, {size:,} parameters, '
    f'{len(model.tokenizer)} tokens; {jax.device_count()} '
    f'{jax.default_backend()} device(s){f": {mesh}" if mesh else ""}',
    *main.describe(),
    *task.notes,
  ]
