"""Which prompts a step samples from, and which groups it trains on.

Without data tools these are the step's own prompts, all of them.  With hints
(GHPO) a group whose responses all fail is sampled again with the beginning of
its reference solution.  With refilling (DAPO) groups without variance of the
reward give way to groups of further prompts.  Hints come first; further prompts
get none.

References:
  Yu et al., `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025
  Liu et al., `GHPO <https://arxiv.org/abs/2507.10628>`_, 2025
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollouts import Responses
from jaxrl_llm.rollouts import groups as regroup
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks import sources
from jaxrl_llm.tasks.curriculum import Curriculum
from jaxrl_llm.tasks.hints import Hints, has_solution

# What `jax.random.fold_in` of the run's key gives to each use.
_OWN, _REFILL, _HINT = 1, 5, 6


class Drawn(NamedTuple):
  """The groups that a step trains on.

  Attributes:
    responses: of P groups.  The 'prompt' of a row is the text that was read,
      with its hint.
    batch: the same prompts as token ids, with the rows of the data set.
    tokens: generated in groups that are not trained on.
    record: numbers for the log.
  """

  responses: Responses
  batch: prompts_lib.PromptBatch
  tokens: int
  record: dict[str, float]


class _Groups:
  """All that a step has sampled, and which group stands for each prompt.

  Attributes:
    parts: batches of responses, the first of them to the step's own prompts.
    chosen: (batch, group in it) for each of the P prompts.
    texts: of prompts with a hint, by their place among the P.
  """

  def __init__(self, first: Responses):
    self.parts = [first]
    self.chosen = [(0, group) for group in range(len(first.rows))]
    self.texts = {}

  def replace(self, place: int, group: int) -> None:
    """Lets a group of the newest batch stand at a place."""
    self.chosen[place] = (len(self.parts) - 1, group)

  def varying(self) -> np.ndarray:
    """Whether the group at each place has variance: [P] bool."""
    found = [regroup.varying(p.scores, len(p.rows)) for p in self.parts]
    return np.array([found[part][group] for part, group in self.chosen])


class Collection:
  """Draws the groups of a step, as `config.prompts` and `config.rollout` say.

  A step is a pure function of its number, of the key, and of how responses are
  drawn.

  Args:
    config: the whole configuration.
    encoded: training prompts.
    tokenizer: of the model.

  Attributes:
    source: of the steps' own prompts.
  """

  def __init__(self, config, encoded: prompts_lib.EncodedPrompts, tokenizer):
    self._settings = config.rollout
    self._encoded = encoded
    self.source = prompt_source(config, encoded, config.seed)
    self._curriculum = bool(config.prompts.curriculum)
    self._further = None
    if config.rollout.refill:
      self._further = prompt_source(
        config,
        encoded,
        sources.derive_seed(config.seed, 'refill'),
        config.rollout.refill,
      )
    self._hints = None
    if config.rollout.hints:
      if not any(map(has_solution, encoded.rows)):
        raise UserError(
          'config.rollout.hints: no training prompt has a solution\n'
          "give rows a text in the column 'solution', or set hints to ()"
        )
      self._hints = Hints(
        tokenizer,
        config.rollout.hint_template,
        chat_template=config.prompts.chat_template or None,
        system_prompt=config.prompts.system_prompt or None,
        suffix=config.prompts.suffix,
      )

  def draw(
    self, respond: Callable[..., Responses], key: Any, step: int, stop=None
  ) -> Drawn:
    """The groups of a step.

    Without hints and refilling no score is asked for.

    Args:
      respond: `rollouts.respond`, to be called with batch and key.
      key: PRNG key of the run.
      step: of RL.
      stop: polled before sampling again.
    """
    batch = self.source.batch(step)
    first = respond(batch=batch, key=_key(key, _OWN, step))
    record = {}
    if self._curriculum:
      record['curriculum/share'] = self.source.share(step)
      record['curriculum/difficulty'] = self.source.difficulty(step)
    if self._hints is None and self._further is None:
      return Drawn(first, batch, 0, record)
    groups = _Groups(first)
    if self._hints is not None:
      record |= self._hint(groups, respond, _key(key, _HINT, step), stop)
    if self._further is not None:
      record |= self._refill(
        groups, respond, _key(key, _REFILL, step), step, stop
      )
    joined = regroup.join(groups.parts, groups.chosen)
    batch = prompts_lib.PromptBatch(
      *sharding.to_host((joined.prompts.tokens, joined.prompts.lengths)),
      joined.rows,
    )
    rows = [
      row | {'prompt': groups.texts[i]} if i in groups.texts else row
      for i, row in enumerate(joined.rows)
    ]
    tokens = sum(map(_tokens, groups.parts)) - _tokens(joined)
    record |= _sampled(groups.parts) | {'sampled/discarded_tokens': tokens}
    return Drawn(joined._replace(rows=rows), batch, tokens, record)

  def _hint(self, groups: _Groups, respond, key, stop) -> dict[str, int]:
    """Samples groups that fail again, with more and more of the solution.

    hints/failed: groups that have a score and none above the threshold.
    hints/no_solution, hints/over_budget: of them those without a solution, and
      those whose prompt with a hint is too long.
    hints/groups_0.25, …: groups sampled with this share.
    hints/saved: groups in which a response succeeded with a hint.
    """
    threshold = self._settings.hint_threshold
    first = groups.parts[0]
    scored = first.scores.valid.reshape(len(first.rows), -1).any(axis=1)
    success = regroup.succeeding(first.scores, len(first.rows), threshold)
    failed = np.flatnonzero(scored & ~success).tolist()
    left = [place for place in failed if has_solution(first.rows[place])]
    record = {
      'hints/failed': len(failed),
      'hints/no_solution': len(failed) - len(left),
      'hints/over_budget': 0,
    }
    for number, share in enumerate(self._settings.hints):
      hinted = {
        place: self._hints.encode(first.rows[place], share) for place in left
      }
      # What does not fit now will not with more of the solution.
      budget = self._encoded.max_tokens
      fits = [place for place in left if len(hinted[place].ids) <= budget]
      record['hints/over_budget'] += len(left) - len(fits)
      record[f'hints/groups_{share:g}'] = len(fits)
      left = fits
      if not left:
        continue
      if stop is not None:
        stop.check()
      ids = [hinted[place].ids for place in left]
      batch = self._batch(ids, [first.rows[place] for place in left])
      part = respond(batch=batch, key=jax.random.fold_in(key, number))
      groups.parts.append(part)
      helped = regroup.succeeding(part.scores, len(part.rows), threshold)
      for group, place in enumerate(left):
        if helped[group]:
          groups.replace(place, group)
          groups.texts[place] = hinted[place].text
      left = [place for place in left if place not in groups.texts]
    return record | {'hints/saved': len(groups.texts)}

  def _batch(self, ids: list[list[int]], rows: list[dict]):
    """Prompts that are not of the source, repeated up to a usual number."""
    size = _usual(len(ids), self._settings.prompts)
    again = [i % len(ids) for i in range(size)]
    encoded = self._encoded._replace(
      tokens=[np.asarray(row, np.int32) for row in ids], rows=rows
    )
    return prompts_lib.gather(encoded, again)

  def _refill(self, groups: _Groups, respond, key, step, stop):
    """Replaces groups without variance by groups of further prompts.

    refill/rounds: of sampling.
    refill/replaced, refill/unfilled: groups without variance that were, and
      were not, replaced.
    refill/discarded: groups sampled that are not trained on.
    """
    missing = np.flatnonzero(~groups.varying()).tolist()
    wanted, most = len(missing), self._settings.prompts
    good, drawn, rounds = most - wanted, most, 0
    while missing and rounds < self._settings.refill:
      if stop is not None:
        stop.check()
      # As many as will do if the share with variance stays what it was.
      size = _usual(-(-len(missing) * drawn // max(good, 1)), most)
      batch = self._further.batch(step * self._settings.refill + rounds)
      batch = prompts_lib.PromptBatch(*(part[:size] for part in batch))
      part = respond(batch=batch, key=jax.random.fold_in(key, rounds))
      groups.parts.append(part)
      found = np.flatnonzero(regroup.varying(part.scores, size)).tolist()
      for place, group in zip(missing, found, strict=False):
        groups.replace(place, group)
        groups.texts.pop(place, None)
      missing = missing[len(found) :]
      good, drawn, rounds = good + len(found), drawn + size, rounds + 1
    return {
      'refill/rounds': rounds,
      'refill/replaced': wanted - len(missing),
      'refill/unfilled': len(missing),
      # Of each replacement one group is lost: the replaced one or a spare.
      'refill/discarded': drawn - most,
    }


def prompt_source(
  config,
  encoded: prompts_lib.EncodedPrompts,
  seed: int,
  batches_per_step: int = 1,
) -> sources.PromptSource | Curriculum:
  """The order of prompts that `config.prompts` asks for.

  Args:
    config: the whole configuration.
    encoded: training prompts.
    seed: of the order.
    batches_per_step: batches of P prompts that a step may ask for.
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


def _key(key, use: int, step: int):
  return jax.random.fold_in(jax.random.fold_in(key, use), step)


def _usual(count: int, most: int) -> int:
  """The next power of two, at most `most`: few sizes are ever compiled."""
  return min(1 << (count - 1).bit_length(), most)


def _tokens(responses: Responses) -> int:
  return int(responses.samples.mask.sum())


def _sampled(parts: list[Responses]) -> dict[str, float]:
  """Rewards of all that was sampled, whatever is trained on.

  sampled/reward, sampled/frac_reward_zero_std: of the step's own prompts
    without hints, which are what `reward` and `frac_reward_zero_std` are
    without data tools: unbiased.
  sampled/all_reward: mean over every response of the step.
  """
  first = parts[0].scores
  groups = len(parts[0].rows)
  scored = first.valid.reshape(groups, -1).any(axis=1)
  equal = ~regroup.varying(first, groups)[scored]
  total = np.concatenate([part.scores.total for part in parts])
  valid = np.concatenate([part.scores.valid for part in parts])
  return {
    'sampled/reward': _mean(first.total[first.valid]),
    'sampled/frac_reward_zero_std': _mean(equal),
    'sampled/all_reward': _mean(total[valid]),
  }


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if values.size else np.nan
