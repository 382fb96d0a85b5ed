"""Fulfils an estimator's `Needs`: samples, rewards, greedy, reference."""

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
from jaxrl_llm.rewards.failures import Failures, merge
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks.prompts import PromptBatch, columns

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Generation:
  """How responses are generated.

  Attributes:
    samples: G, responses per prompt.
    max_tokens: T, EOS included.
    eos_ids: any of these ends a response.
    pad_id: fills the places behind a response's end.
    decoding: temperature, top-k, top-p.
    statistics: what the sampler records beside log-probabilities: 'entropy',
      'score_norms'.
  """

  samples: int
  max_tokens: int
  eos_ids: tuple[int, ...]
  pad_id: int = 0
  decoding: policy.Decoding = policy.Decoding()
  statistics: tuple[str, ...] = ()


class Responses(NamedTuple):
  """Scored responses to P prompts, on the host and on the device.

  Attributes:
    prompts: the prompts as the model reads them.
    rows: P dataset rows.
    samples: tokens, mask and log-probabilities, [P, G, T].
    completions: P·G texts, special tokens left out.
    scoring: called for the rewards of the P·G responses, which workers may
      still be at.
    cache: keys and values that branches fork, where they were kept.
  """

  prompts: policy.Prompts
  rows: Sequence[dict[str, Any]]
  samples: sampling.Samples
  completions: list[str]
  scoring: Callable[[], Scores]
  cache: Cache | None = None

  @property
  def scores(self) -> Scores:
    """Rewards of the P·G responses, total and by part.

    Raises:
      UserError: a reward function fails or gives something that is no reward.
    """
    return self.scoring()


def to_prompts(batch: PromptBatch) -> policy.Prompts:
  """A batch of the data set as the model reads it."""
  return sharding.place_rows(
    policy.Prompts(tokens=batch.tokens, lengths=batch.lengths)
  )


def generate(
  config: ModelConfig,
  params: Any,
  batch: PromptBatch,
  generation: Generation,
  key: Array,
  sampler: Callable = sampling.sample,
) -> tuple[policy.Prompts, Any]:
  """Samples responses; gives the prompts as the model reads them, too.

  Args:
    sampler: `sampling.sample` or `sampling.sample_and_keep`.
  """
  prompts = to_prompts(batch)
  samples = sampler(
    config,
    params,
    prompts,
    key,
    samples=generation.samples,
    max_tokens=generation.max_tokens,
    decoding=generation.decoding,
    eos_ids=generation.eos_ids,
    pad_id=generation.pad_id,
    statistics=generation.statistics,
  )
  return prompts, samples


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
  """Samples responses and begins to score them.

  Args:
    config, params: the model.
    batch: P prompts.
    generation: how to generate.
    tokenizer: of the model.
    rewards: reward functions.
    key: PRNG key.
    keep_cache: keeps the responses' keys and values, for branches.
  """
  cache = None
  if keep_cache:
    prompts, (samples, cache) = generate(
      config, params, batch, generation, key, sampling.sample_and_keep
    )
  else:
    prompts, samples = generate(config, params, batch, generation, key)
  host = sharding.to_host(samples)
  ids = [
    row[mask].tolist()
    for row, mask in zip(
      np.concatenate(host.tokens), np.concatenate(host.mask), strict=True
    )
  ]
  rows = [row for row in batch.rows for _ in range(generation.samples)]
  finished = host.finished.reshape(-1).tolist()
  completions, scoring = score_responses(
    tokenizer, rewards, rows, ids, finished
  )
  return Responses(prompts, batch.rows, samples, completions, scoring, cache)


def score_responses(
  tokenizer: Any,
  rewards: Sequence[RewardPart],
  rows: Sequence[dict[str, Any]],
  ids: Sequence[list[int]],
  finished: Sequence[bool],
) -> tuple[list[str], Callable[[], Scores]]:
  """Decodes N whole responses and begins to score them.

  Of several processes each scores its own part of them, in order, and has the
  scores of all in the end.  Reward functions get the prompts' and responses'
  texts, every column of the dataset, `completion_ids` (tokens, EOS included)
  and `finished` (whether the response ended with EOS).

  Args:
    tokenizer: of the model.
    rewards: reward functions.
    rows: N dataset rows, one per response.
    ids: N lists of tokens.
    finished: N.

  Returns:
    Texts, special tokens left out, and what to call for the scores; see
    `rewards.start`.
  """
  completions = tokenizer.batch_decode(ids, skip_special_tokens=True)
  own = processes.own_part(len(rows))
  given = columns(rows[own])
  given['completion_ids'] = list(ids[own])
  given['finished'] = list(finished[own])
  prompts = [row['prompt'] for row in rows[own]]
  scoring = functools.partial(_no_scores, rewards)
  if prompts or processes.count() == 1:
    scoring = start_scoring(rewards, prompts, completions[own], given)
  if processes.count() > 1:
    scoring = functools.cache(functools.partial(_share, scoring))
  return completions, scoring


def _no_scores(rewards: Sequence[RewardPart]) -> Scores:
  """Of a process that has no response to score."""
  none = np.zeros(0)
  parts = {part.name: none for part in rewards}
  return Scores(none, none.astype(bool), parts)


def _share(scoring: Callable[[], Scores]) -> Scores:
  """Scores of all processes' responses; an error of one is raised in all."""
  found, error = None, None
  try:
    found = scoring()
  except UserError as caught:
    error = str(caught)
  for each in processes.gather_objects(error, 'rewards'):
    if each is not None:
      raise UserError(each)
  total, valid, parts = processes.gather(
    (found.total, found.valid, found.parts), 'rewards'
  )
  told = processes.gather_objects(found.failures, 'failures of rewards')
  failures = [
    {name: Failures(*each) for name, each in of_process.items()}
    for of_process in told
  ]
  return Scores(total, valid, parts, merge(failures))


def with_statistics(generation: Generation, needs: Needs) -> Generation:
  """The settings under which the sampler records what `needs` asks for."""
  wanted = ('entropy', 'score_norms')
  found = tuple(name for name in wanted if getattr(needs, name))
  return dataclasses.replace(generation, statistics=found)


def greedy(generation: Generation) -> Generation:
  """The settings of one greedy response per prompt."""
  decoding = dataclasses.replace(generation.decoding, temperature=0.0)
  return dataclasses.replace(generation, samples=1, decoding=decoding)


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
  """`policy.score` in parts, so that memory does not grow with the batch.

  Args:
    config, params: the model.
    prompts: P prompts.
    tokens: [P, G, T] int32.
    decoding, chunk: as for `policy.score`.
    micro_prompts: prompts at one time.
    at_once: responses to a prompt at one time, which read it each time anew;
      None for all.  It divides G.

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
