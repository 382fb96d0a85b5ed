"""What the phases of a run give, and what `loop.Run` asks of the main one."""

import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from experiments import build, data
from experiments.schedule import Round
from jaxrl_llm import rollouts, training
from jaxrl_llm.rewards.failures import Failures
from jaxrl_llm.runs import Sample
from jaxrl_llm.signals import StopSignal


class Result(NamedTuple):
  """What a step leaves: state, records, and responses for the sample table.

  Attributes:
    state: the new `TrainState`.
    metrics: numbers that depend on the computation only.
    timings: seconds.
    tokens: generated tokens.
    responses, advantages: what was sampled, and [P, G] advantages; None in
      the warm start.
    messages: what the user should be told once.
  """

  state: training.TrainState
  metrics: dict[str, float]
  timings: dict[str, float]
  tokens: int = 0
  responses: rollouts.Responses | None = None
  advantages: np.ndarray | None = None
  messages: Sequence[str] = ()


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
  """The main phase of a run, as `Run` uses it.

  Attributes:
    round: what it repeats.
    estimator: whose running numbers the state holds.
    key: PRNG key of the run; a resumed run sets the one of its checkpoint.
    keeps_reference: whether it needs the policy that it begins with later on.
    reference: parameters of that policy, set by `Run` if it is kept.
    curves: what the curve of held-out numbers shows, metric → label; the first
      is the score by which the best checkpoint is chosen.
  """

  round: Round
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
