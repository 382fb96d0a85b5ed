"""How far a run is, and what is due there."""

import dataclasses


@dataclasses.dataclass
class Course:
  """Steps of a run, supervised ones first, and the tokens that RL generated.

  Attributes:
    first: steps of the warm start; RL begins after them.
    total: steps of both.
    budget: generated tokens after which no step begins; 0 for any number.
    step: steps done.
    tokens: generated so far; evaluations do not count.
    tokens_before: `tokens` before the last step.
  """

  first: int
  total: int
  budget: int
  step: int = 0
  tokens: int = 0
  tokens_before: int = 0

  def advance(self, tokens: int) -> None:
    """A step is done, which generated so many tokens."""
    self.step += 1
    self.tokens_before = self.tokens
    self.tokens += tokens

  @property
  def in_warm_start(self) -> bool:
    """Whether the next step is a supervised one."""
    return self.step < self.first

  @property
  def ended(self) -> bool:
    """Whether the last step was the last, by steps or by tokens."""
    return self.step >= self.total or 0 < self.budget <= self.tokens

  @property
  def overran(self) -> bool:
    """Whether there are more steps than the settings ask for."""
    return self.step > self.total or 0 < self.budget <= self.tokens_before

  def evaluation_is_due(self, every: int, every_tokens: int) -> bool:
    """Where RL begins and ends, and in between by steps and by tokens.

    Args:
      every: steps of RL.
      every_tokens: tokens; 0 for never.
    """
    since = self.step - self.first
    if since <= 0 or self.ended:
      return since >= 0
    if every_tokens:
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
