"""The schedule of a run, and the protocol of its main phase."""

import dataclasses
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from experiments import build, data
from jaxrl_llm import rollouts, training
from jaxrl_llm.rewards.failures import Failures
from jaxrl_llm.runs import Sample
from jaxrl_llm.signals import StopSignal


class Cycle(NamedTuple):
  """What the main phase of a run repeats.

  Online RL samples and learns in every step.  Other methods sample for some
  steps, and learn from that for some more.

  Attributes:
    sampling: steps that only sample, at the beginning.
    learning: steps after them, at least 1.
  """

  sampling: int = 0
  learning: int = 1

  @property
  def steps(self) -> int:
    """Of both kinds."""
    return self.sampling + self.learning


@dataclasses.dataclass
class Schedule:
  """Steps of a run, the warm start's first, and the tokens it generated.

  Attributes:
    first: steps of the warm start; the main phase begins after them.
    total: steps of both.
    budget: generated tokens after which no round begins; 0 for any number.
    cycle: of the main phase.
    step: steps done.
    tokens: generated so far; evaluations do not count.
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
    """A step is done, which generated so many tokens."""
    if self._place(self.step) == 0:
      self.tokens_before = self.tokens
    self.step += 1
    self.tokens += tokens

  @property
  def in_warm_start(self) -> bool:
    """Whether the next step is one of the warm start."""
    return self.step < self.first

  @property
  def ended(self) -> bool:
    """Whether the last step was the last, by steps or by tokens."""
    spent = 0 < self.budget <= self.tokens and self._place(self.step) == 0
    return self.step >= self.total or spent

  @property
  def overran(self) -> bool:
    """Whether there are more steps than the settings ask for."""
    return self.step > self.total or 0 < self.budget <= self.tokens_before

  def evaluation_is_due(self, every: int, every_tokens: int) -> bool:
    """Where the main phase begins and ends, and in between by steps and tokens.

    Rounds that begin with sampling are evaluated after it, for what the tokens
    have not yet changed, while they learn, and at their ends.

    Args:
      every: steps of the main phase.
      every_tokens: tokens, where every step samples and learns; 0 for never.
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
    """Where a phase ends, and every so many of its steps."""
    if self.step == self.first or self.ended:
      return True
    since = self.step - self.first if self.step > self.first else self.step
    return since % every == 0

  def _place(self, step: int) -> int:
    """How many steps of its round are done after so many of the run."""
    return max(step - self.first, 0) % self.cycle.steps


class Result(NamedTuple):
  """What a step leaves: state, records, and responses for the sample table.

  Attributes:
    state: the new `TrainState`.
    metrics: numbers that depend on the computation only.
    timings: seconds.
    tokens: generated tokens.
    responses, advantages: what was sampled, and [P, G] advantages; None in
      the warm start.
    failures: of rewards in worker processes, by name in the record.
  """

  state: training.TrainState
  metrics: dict[str, float]
  timings: dict[str, float]
  tokens: int = 0
  responses: rollouts.Responses | None = None
  advantages: np.ndarray | None = None
  failures: Mapping[str, Failures] = types.MappingProxyType({})


class Evaluation(NamedTuple):
  """Numbers on held-out data.

  Attributes:
    metrics: by name, 'eval/…'.
    samples: rows for the sample table; empty where nothing was sampled.
    failures: of rewards in worker processes, by name in the record.
  """

  metrics: dict[str, float]
  samples: Sequence[Sample] = ()
  failures: Mapping[str, Failures] = types.MappingProxyType({})


class Phase(Protocol):
  """The main phase of a run, as `loop.Run` uses it.

  Attributes:
    cycle: what it repeats.
    estimator: whose running numbers the state holds.
    key: PRNG key of the run; a resumed run sets the one of its checkpoint.
    keeps_reference: whether it needs the policy that it begins with later on.
    reference: parameters of that policy, set by `Run` if it is kept.
    curves: what the curve of held-out numbers shows, metric → label; the first
      is the score by which the best checkpoint is chosen.
  """

  cycle: Cycle
  estimator: Any
  key: Any
  keeps_reference: bool
  reference: Any
  curves: Mapping[str, str]

  def begin(self, policy_params: Any) -> training.TrainState:
    """The state that the phase begins with."""

  def shapes(self, policy_params: Any) -> training.TrainState:
    """Shapes of `begin`."""

  def start(self, state: training.TrainState) -> Sequence[str]:
    """Called before the first step, again if that did not end.

    Returns:
      What the user should know.
    """

  def step(
    self, state: training.TrainState, number: int, stop: StopSignal
  ) -> Result:
    """Step `number` of the phase, from 0."""

  def save(self) -> dict[str, Any]:
    """Returns the JSON values that a checkpoint holds beside the state."""

  def load(self, values: Mapping[str, Any]) -> None:
    """Restores what `save` returned."""

  def fingerprint(self) -> dict[str, Any]:
    """What must be equal for a step number to mean the same data."""

  def evaluate(self, trainable: Any, step: int, stop: StopSignal) -> Evaluation:
    """Numbers on held-out data after so many steps of the run."""

  def finish(self, trainable: Any, folder: pathlib.Path) -> Sequence[str]:
    """Writes `hf/`, which `transformers` opens, and more; gives their names."""

  def describe(self) -> Sequence[str]:
    """Lines about data and parts."""


# Makes the phase of (configuration, outline of the model, data, key, folder).
MakePhase = Callable[
  [ConfigDict, build.Model, data.Data, Any, pathlib.Path], Phase
]


class Script(NamedTuple):
  """What is peculiar to a script that trains.

  Attributes:
    check: raises UserError for a configuration that it cannot train.
    phase: makes its main phase.
  """

  check: Callable[[ConfigDict], None]
  phase: MakePhase
