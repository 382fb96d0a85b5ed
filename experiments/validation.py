"""Scores a model on held-out prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build
from experiments.schedule import Evaluation
from jaxrl_llm import evaluation, rollouts, sharding
from jaxrl_llm.models import transformer
from jaxrl_llm.rewards import RewardPart
from jaxrl_llm.rewards.workers import Failures, merge_failures
from jaxrl_llm.rollouts.collect import failure_counts
from jaxrl_llm.runs import Sample
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks import sources


class HeldOut(NamedTuple):
  """A held-out set with the settings for sampling and scoring responses.

  Attributes:
    model: configuration and tokenizer of the model.
    encoded: the prompts.
    generation: samples per prompt, temperature, length.
    rewards: reward functions, as in training.
    batch: number of prompts at one time.
    micro_prompts: number of prompts at one time when scoring for the KL.
    key: PRNG key, the same in every evaluation.
    chunk: positions whose logits exist at one time.
  """

  model: build.Model
  encoded: prompts_lib.EncodedPrompts
  generation: rollouts.Generation
  rewards: Sequence[RewardPart]
  batch: int
  micro_prompts: int
  key: Any
  chunk: int

  def fingerprint(self) -> dict[str, Any]:
    """Returns values that identify the prompts."""
    return sources.PromptSource(self.encoded, 1, 0).fingerprint()


def build_held_out(
  config, model: build.Model, rows, rewards, key, **changes
) -> HeldOut:
  """Builds a held-out set; `changes` override `config.evaluation`."""
  settings = config.evaluation.to_dict() | changes
  encoded = build.encode(
    config, rows[: settings['prompts'] or None], model.tokenizer
  )
  generation = build.generation(
    config,
    model,
    encoded.pad_id,
    samples=settings['samples'],
    temperature=settings['temperature'],
  )
  # As many responses as in a micro-batch of training, which fits in memory.
  responses = build.micro_prompts(config) * config.rollout.samples
  return HeldOut(
    model,
    encoded,
    generation,
    rewards,
    settings['batch'],
    max(responses // settings['samples'], 1),
    key,
    config.training.chunk,
  )


class Answers(NamedTuple):
  """Responses to N held-out prompts, n each, in the prompts' order.

  Attributes:
    rewards: [N, n] weighted sums; NaN if any part returned None.
    parts: [N, n] rewards by reward function.
    lengths: [N, n] numbers of tokens, EOS included.
    finished: [N, n] bool, True if the response ended with EOS.
    tokens: N·n lists of token ids.
    samples: N·n rows for a sample table.
    kl: mean of log π − log π_ref over the tokens, nats; None without a
      reference.
    failures: failures of rewards in worker processes, by name in the record.
  """

  rewards: np.ndarray
  parts: dict[str, np.ndarray]
  lengths: np.ndarray
  finished: np.ndarray
  tokens: list[list[int]]
  samples: list[Sample]
  kl: float | None
  failures: Mapping[str, Failures]


def answer(
  held_out: HeldOut, params, step: int, reference=None, stop=None
) -> Answers:
  """Samples and scores responses to the whole set.

  Args:
    held_out: the set.
    params: the model's parameters.
    step: step number for the sample table.
    reference: parameters of a reference policy, for `kl`; ignored for greedy
      responses, whose mean log-ratio is not a KL.
    stop: stop signal, polled between batches.
  """
  if held_out.generation.decoding.greedy:
    reference = None
  sampled_by = transformer.sampling_layout(held_out.model.config, params)
  count = len(held_out.encoded.rows)
  pieces, kl_sum = [], 0.0
  for start in range(0, count, held_out.batch):
    if stop is not None:
      stop.check()
    chosen = range(start, min(start + held_out.batch, count))
    responses = rollouts.respond(
      held_out.model.config,
      sampled_by,
      prompts_lib.gather(held_out.encoded, chosen),
      held_out.generation,
      held_out.model.tokenizer,
      held_out.rewards,
      jax.random.fold_in(held_out.key, start),
    )
    pieces.append(responses)
    if reference is not None:
      kl_sum += _kl_sum(held_out, params, reference, responses)
  samples = [s for piece in pieces for s in to_samples(piece, step)]
  shape = (count, held_out.generation.samples)
  host = [sharding.to_host(piece.samples) for piece in pieces]
  masks = [np.concatenate(piece.mask) for piece in host]
  tokens = [
    row[mask].tolist()
    for piece, piece_mask in zip(host, masks, strict=True)
    for row, mask in zip(np.concatenate(piece.tokens), piece_mask, strict=True)
  ]
  lengths = np.array([len(row) for row in tokens]).reshape(shape)
  rewards = [
    np.where(piece.scores.valid, piece.scores.total, np.nan) for piece in pieces
  ]
  parts = {
    part.name: np.concatenate(
      [piece.scores.parts[part.name] for piece in pieces]
    ).reshape(shape)
    for part in held_out.rewards
  }
  failures = merge_failures(piece.scores.failures for piece in pieces)
  return Answers(
    rewards=np.concatenate(rewards).reshape(shape),
    parts=parts,
    lengths=lengths,
    finished=np.array([s.finished for s in samples]).reshape(shape),
    tokens=tokens,
    samples=samples,
    kl=None if reference is None else kl_sum / max(lengths.sum(), 1),
    failures={f'eval/rewards/{name}': each for name, each in failures.items()},
  )


def evaluate(
  held_out: HeldOut, params, step: int, table: int, reference=None, stop=None
) -> Evaluation:
  """Answers the whole set; returns metrics and rows for a sample table.

  Args:
    held_out, params, step, reference, stop: as for `answer`.
    table: number of prompts whose first response is shown.
  """
  answers = answer(held_out, params, step, reference, stop)
  per_prompt = held_out.generation.samples
  shown = answers.samples[: table * per_prompt : per_prompt]
  return Evaluation(summary(answers), shown, answers.failures)


def summary(answers: Answers) -> dict[str, float]:
  """Returns means over the held-out responses, named as in the record.

  eval/rewards/NAME/failed is a count instead: the number of responses on which
  a reward in worker processes failed.
  """
  metrics = {'eval/reward': mean(answers.rewards)}
  for name, scores in answers.parts.items():
    metrics[f'eval/rewards/{name}'] = mean(scores)
  metrics |= failure_counts(answers.failures)
  metrics['eval/completions/mean_length'] = answers.lengths.mean()
  metrics['eval/completions/clipped_ratio'] = 1.0 - answers.finished.mean()
  metrics['eval/distinct_bigrams'] = evaluation.distinct_ngrams(answers.tokens)
  if answers.kl is not None:
    metrics['eval/kl'] = answers.kl
  return {name: float(value) for name, value in metrics.items()}


def mean(scores: np.ndarray) -> float:
  """Returns the mean of the known scores; NaN if there are none."""
  known = scores[~np.isnan(scores)]
  return float(known.mean()) if known.size else np.nan


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


def _kl_sum(held_out: HeldOut, params, reference, responses) -> float:
  """Returns Σ log π − log π_ref over the responses' tokens, nats."""
  samples = responses.samples
  total = 0.0
  for start in range(0, len(responses.rows), held_out.micro_prompts):
    rows = slice(start, start + held_out.micro_prompts)
    prompts, tokens, mask = jax.tree.map(
      lambda x, rows=rows: x[rows],
      (responses.prompts, samples.tokens, samples.mask),
    )
    now, before = (
      rollouts.score_tokens(
        held_out.model.config,
        weights,
        prompts,
        tokens,
        held_out.generation.decoding,
        len(tokens),
        held_out.chunk,
      ).log_probs
      for weights in (params, reference)
    )
    total += float(jnp.where(mask, now - before, 0.0).sum())
  return total


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
