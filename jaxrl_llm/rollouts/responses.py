"""Samples, decodes and scores responses to prompts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import processes, sampling, sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import Needs
from jaxrl_llm.minibatches import split_prompts
from jaxrl_llm.models.cache import Cache
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.head import TokenStatistics
from jaxrl_llm.rewards import RewardPart, Scores
from jaxrl_llm.rewards import start as start_scoring
from jaxrl_llm.rewards.scoring import Failures, merge_failures
from jaxrl_llm.sampling import policy
from jaxrl_llm.sampling.allocation import Allocation
from jaxrl_llm.tasks.prompts import PromptBatch, columns

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Generation:
  """Settings for generating responses.

  Attributes:
    samples: G, responses per prompt.
    max_tokens: T, EOS included.
    eos_ids: tokens that end a response.
    pad_id: token that fills the positions after a response's end.
    decoding: temperature, top-k, top-p.
    statistics: names of what the sampler records besides log-probabilities:
      'entropy', 'score_norms'.
    allocation: grows prefix trees, in which a prefix is decoded once, as one of
      `sampling.allocation`; None decodes every response by itself.
  """

  samples: int
  max_tokens: int
  eos_ids: tuple[int, ...]
  pad_id: int = 0
  decoding: policy.Decoding = policy.Decoding()
  statistics: tuple[str, ...] = ()
  allocation: Allocation | None = None


class Responses(NamedTuple):
  """Scored responses to P prompts, on the host and on the device.

  Attributes:
    prompts: the prompts as the model reads them.
    rows: P dataset rows.
    samples: tokens, mask and log-probabilities, [P, G, T].
    completions: P·G texts, without special tokens; '' for a row of a tree that
      is not used.
    scoring: function that returns the rewards of the P·G responses; workers
      may still be computing them.
    cache: keys and values for branches to fork; None if not kept.
    grown: the trees that the responses are rows of, if they are.
  """

  prompts: policy.Prompts
  rows: Sequence[dict[str, Any]]
  samples: sampling.Samples
  completions: list[str]
  scoring: Callable[[], Scores]
  cache: Cache | None = None
  grown: sampling.Grown | None = None

  @property
  def tokens(self) -> int:
    """Number of tokens that were drawn."""
    if self.grown is not None:
      return int(self.grown.nodes)
    return int(self.samples.mask.sum())

  @property
  def scores(self) -> Scores:
    """Rewards of the P·G responses, total and by part.

    Raises:
      UserError: a reward function fails or returns something that is not a
        reward.
    """
    return self.scoring()


def to_prompts(batch: PromptBatch) -> policy.Prompts:
  """Places a batch of the data set on the device, as the model reads it."""
  return sharding.place_rows(
    policy.Prompts(tokens=batch.tokens, lengths=batch.lengths)
  )


def generate(
  config: ModelConfig,
  params: Any,
  batch: PromptBatch,
  generation: Generation,
  key: Array,
) -> tuple[policy.Prompts, sampling.Samples]:
  """Samples responses; also returns the prompts as the model reads them."""
  drawn = _draw(config, params, batch, generation, key, keep_cache=False)
  return drawn.prompts, drawn.samples


class _Drawn(NamedTuple):
  prompts: policy.Prompts
  samples: sampling.Samples
  cache: Cache | None = None
  grown: sampling.Grown | None = None


def _draw(config, params, batch, generation, key, keep_cache: bool) -> _Drawn:
  prompts = to_prompts(batch)
  settings = dict(
    max_tokens=generation.max_tokens,
    decoding=generation.decoding,
    eos_ids=generation.eos_ids,
    pad_id=generation.pad_id,
    statistics=generation.statistics,
  )
  drawn = config, params, prompts, key
  if generation.allocation is not None:
    if keep_cache:
      raise UserError(
        'branches fork from whole responses: generation.allocation has to be '
        'None for them'
      )
    grown = sampling.grow(*drawn, allocation=generation.allocation, **settings)
    return _Drawn(prompts, grown.samples, grown=grown)
  settings['samples'] = generation.samples
  if keep_cache:
    return _Drawn(prompts, *sampling.sample_and_keep(*drawn, **settings))
  return _Drawn(prompts, sampling.sample(*drawn, **settings))


def respond(
  config: ModelConfig,
  params: Any,
  batch: PromptBatch,
  generation: Generation,
  tokenizer: Any,
  rewards: Sequence[RewardPart],
  key: Array,
  keep_cache: bool = False,
) -> Responses:
  """Samples responses and starts to score them.

  Args:
    config, params: the model.
    batch: P prompts.
    generation: settings for generating.
    tokenizer: tokenizer of the model.
    rewards: reward functions.
    key: PRNG key.
    keep_cache: keep the responses' keys and values, for branches.
  """
  drawn = _draw(config, params, batch, generation, key, keep_cache)
  completions, scoring = score_rows(
    tokenizer, rewards, batch.rows, drawn.samples
  )
  return Responses(
    drawn.prompts,
    batch.rows,
    drawn.samples,
    completions,
    scoring,
    drawn.cache,
    drawn.grown,
  )


def score_rows(
  tokenizer: Any,
  rewards: Sequence[RewardPart],
  rows: Sequence[dict[str, Any]],
  samples: sampling.Samples,
) -> tuple[list[str], Callable[[], Scores]]:
  """Scores responses [P, R] to P prompts, as `score_responses`.

  A row without tokens is none: it gets '' and no score.

  Args:
    tokenizer, rewards: as in `score_responses`.
    rows: P dataset rows.
    samples: the responses.
  """
  tokens, mask, finished = sharding.to_host(
    (samples.tokens, samples.mask, samples.finished)
  )
  present = np.argwhere(mask.any(axis=2))
  flat = present[:, 0] * mask.shape[1] + present[:, 1]
  texts = [''] * (mask.shape[0] * mask.shape[1])
  scoring = None
  if len(present):
    completions, scoring = score_responses(
      tokenizer,
      rewards,
      [rows[p] for p, _ in present],
      [tokens[p, r][mask[p, r]].tolist() for p, r in present],
      [bool(finished[p, r, 0]) for p, r in present],
    )
    if len(present) == len(texts):
      return completions, scoring
    for i, text in zip(flat, completions, strict=True):
      texts[i] = text

  @functools.cache
  def finish() -> Scores:
    total, valid = np.zeros(len(texts)), np.zeros(len(texts), bool)
    parts = {part.name: np.full(len(texts), np.nan) for part in rewards}
    failed = {part.name: valid.copy() for part in rewards}
    if scoring is None:
      return Scores(total, valid, parts, failed)
    scores = scoring()
    total[flat], valid[flat] = scores.total, scores.valid
    for name, values in scores.parts.items():
      parts[name][flat], failed[name][flat] = values, scores.failed[name]
    return Scores(total, valid, parts, failed, scores.failures)

  return texts, finish


def score_responses(
  tokenizer: Any,
  rewards: Sequence[RewardPart],
  rows: Sequence[dict[str, Any]],
  ids: Sequence[list[int]],
  finished: Sequence[bool],
) -> tuple[list[str], Callable[[], Scores]]:
  """Decodes N whole responses and starts to score them.

  With several processes, each scores its own part, in order, and then receives
  the scores of all.  Reward functions receive the texts of prompts and
  responses, every column of the dataset, `completion_ids` (tokens, EOS
  included) and `finished` (true if the response ended with EOS).

  Args:
    tokenizer: tokenizer of the model.
    rewards: reward functions.
    rows: N dataset rows, one per response.
    ids: N lists of tokens.
    finished: N flags, true if a response ended with EOS.

  Returns:
    Texts without special tokens, and a function that returns the scores; see
    `rewards.start`.
  """
  completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
  part = processes.own_part(len(rows))
  inputs = columns(rows[part])
  inputs['completion_ids'] = list(ids[part])
  inputs['finished'] = list(finished[part])
  prompts = [row['prompt'] for row in rows[part]]
  scoring = functools.partial(_no_scores, rewards)
  if prompts or processes.count() == 1:
    scoring = start_scoring(rewards, prompts, completions[part], inputs)
  if processes.count() > 1:
    scoring = functools.cache(functools.partial(_share, scoring))
  return completions, scoring


def _no_scores(rewards: Sequence[RewardPart]) -> Scores:
  """Returns the scores of a process that has no response to score."""
  none = np.zeros(0)
  parts = {part.name: none for part in rewards}
  failed = {part.name: none.astype(bool) for part in rewards}
  return Scores(none, none.astype(bool), parts, failed)


def _share(scoring: Callable[[], Scores]) -> Scores:
  """Gathers the scores of all processes; raises the error of any in all."""
  scores, error = None, None
  try:
    scores = scoring()
  except UserError as caught:
    error = str(caught)
  for each in processes.gather_objects(error, 'rewards'):
    if each is not None:
      raise UserError(each)
  arrays = processes.gather(scores[:4], 'rewards')
  gathered = processes.gather_objects(scores.failures, 'failures of rewards')
  failures = [
    {name: Failures(*each) for name, each in reported.items()}
    for reported in gathered
  ]
  return Scores(*arrays, merge_failures(failures))


def with_statistics(generation: Generation, needs: Needs) -> Generation:
  """Returns settings that make the sampler record what `needs` requires."""
  optional = ('entropy', 'score_norms')
  names = tuple(name for name in optional if getattr(needs, name))
  return dataclasses.replace(generation, statistics=names)


def greedy(generation: Generation) -> Generation:
  """Returns the settings for one greedy response per prompt."""
  decoding = dataclasses.replace(generation.decoding, temperature=0.0)
  return dataclasses.replace(
    generation, samples=1, decoding=decoding, allocation=None
  )


@functools.partial(
  jax.jit,
  static_argnames=('config', 'decoding', 'micro_prompts', 'chunk', 'at_once'),
)
def score_tokens(
  config: ModelConfig,
  params: Any,
  prompts: policy.Prompts,
  tokens: Array,
  decoding: policy.Decoding,
  micro_prompts: int,
  chunk: int = 256,
  at_once: int | None = None,
) -> TokenStatistics:
  """Applies `policy.score` in parts, so that memory is bounded.

  Args:
    config, params: the model.
    prompts: P prompts.
    tokens: [P, G, T] int32.
    decoding, chunk: as for `policy.score`.
    micro_prompts: number of prompts at one time.
    at_once: number of responses to a prompt at one time, which must divide G;
      None for all.  The prompt is read again for each part.

  Returns:
    `TokenStatistics` with arrays [P, G, T].
  """

  def part(inputs):
    inputs = sharding.constrain_rows(inputs)
    return policy.score(config, params, *inputs, decoding, chunk)

  shape = tokens.shape
  if at_once is not None:
    times = shape[1] // at_once
    prompts = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), prompts)
    tokens = tokens.reshape(-1, at_once, shape[2])
  parts = split_prompts((prompts, tokens), micro_prompts)
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(shape), jax.lax.map(part, parts)
  )
