"""How far a run is, and what is due there."""

import dataclasses
from typing import NamedTuple


class Round(NamedTuple):
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
class Course:
  """Steps of a run, the warm start's first, and the tokens it generated.

  Attributes:
    first: steps of the warm start; the main phase begins after them.
    total: steps of both.
    budget: generated tokens after which no round begins; 0 for any number.
    round: of the main phase.
    step: steps done.
    tokens: generated so far; evaluations do not count.
    tokens_before: `tokens` before the last round.
  """

  first: int
  total: int
  budget: int
  round: Round = Round()
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
    if self.round.sampling:
      place = self._place(self.step)
      if place <= self.round.sampling:
        return place in (0, self.round.sampling)
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
    return max(step - self.first, 0) % self.round.steps
