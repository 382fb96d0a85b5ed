"""Samples and scores responses to held-out prompts.

held = HeldOut(trainer.setting, encoded, batch=64, key=jax.random.key(1))
answers = answer(held, state.trainable['policy'])
print(summary(answers)['eval/reward'])
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import rollouts, sharding
from jaxrl_llm.evaluation.estimates import distinct_bigrams
from jaxrl_llm.models import transformer
from jaxrl_llm.rewards.scoring import Failures, merge_failures
from jaxrl_llm.rollouts.collect import failure_counts
from jaxrl_llm.tasks import prompts as prompts_lib


class HeldOut(NamedTuple):
  """Held-out prompts, and how responses to them are sampled and scored.

  Attributes:
    setting: model, tokenizer, rewards and generation; a KL is measured if it
      has a reference and the responses are not greedy.
    encoded: N prompts.
    batch: number of prompts sampled at one time.
    key: PRNG key, the same in every evaluation.
  """

  setting: rollouts.Setting
  encoded: prompts_lib.EncodedPrompts
  batch: int
  key: Any


class Answers(NamedTuple):
  """Responses to N held-out prompts, n each, in the prompts' order.

  Attributes:
    responses: the same in batches, with everything that was sampled.
    completions: N·n texts.
    rewards: [N, n] weighted sums; NaN where the scores are not valid.
    parts: [N, n] rewards by reward function.
    lengths: [N, n] numbers of tokens, EOS included.
    finished: [N, n] bool, True if the response ended with EOS.
    tokens: N·n lists of token ids.
    kl: mean of log π − log π_ref over the tokens, nats; None without a
      reference.
    failures: failures of rewards in worker processes, by name in the record.
  """

  responses: list[rollouts.Responses]
  completions: list[str]
  rewards: np.ndarray
  parts: dict[str, np.ndarray]
  lengths: np.ndarray
  finished: np.ndarray
  tokens: list[list[int]]
  kl: float | None
  failures: Mapping[str, Failures]


def answer(held_out: HeldOut, params: Any, stop: Any = None) -> Answers:
  """Samples and scores responses to the whole set.

  Args:
    held_out: the set.
    params: the model's parameters.
    stop: object whose `check()` is called between batches and may raise.
  """
  setting, encoded = held_out.setting, held_out.encoded
  measures_kl = (
    setting.reference is not None and not setting.generation.decoding.greedy
  )
  sampled_by = transformer.sampling_layout(setting.model, params)
  count, pieces, kl_sum = len(encoded.rows), [], 0.0
  for start in range(0, count, held_out.batch):
    if stop is not None:
      stop.check()
    chosen = range(start, min(start + held_out.batch, count))
    responses = rollouts.respond(
      setting.model,
      sampled_by,
      prompts_lib.gather(encoded, chosen),
      setting.generation,
      setting.tokenizer,
      setting.rewards,
      jax.random.fold_in(held_out.key, start),
    )
    pieces.append(responses)
    if measures_kl:
      kl_sum += _kl_sum(setting, params, responses)
  return _joined(setting, pieces, kl_sum if measures_kl else None)


def _joined(
  setting: rollouts.Setting, pieces: list, kl_sum: float | None
) -> Answers:
  """Joins the batches' responses."""
  shape = (-1, setting.generation.samples)
  host = [sharding.to_host(piece.samples) for piece in pieces]
  tokens = [
    row[mask].tolist()
    for piece in host
    for row, mask in zip(
      np.concatenate(piece.tokens), np.concatenate(piece.mask), strict=True
    )
  ]
  lengths = np.array([len(row) for row in tokens]).reshape(shape)
  rewards = [
    np.where(piece.scores.valid, piece.scores.total, np.nan) for piece in pieces
  ]
  parts = {
    part.name: np.concatenate(
      [piece.scores.parts[part.name] for piece in pieces]
    ).reshape(shape)
    for part in setting.rewards
  }
  failures = merge_failures(piece.scores.failures for piece in pieces)
  finished = [piece.finished.reshape(shape) for piece in host]
  return Answers(
    pieces,
    [text for piece in pieces for text in piece.completions],
    np.concatenate(rewards).reshape(shape),
    parts,
    lengths,
    np.concatenate(finished),
    tokens,
    None if kl_sum is None else kl_sum / max(lengths.sum(), 1),
    {f'eval/rewards/{name}': each for name, each in failures.items()},
  )


def summary(answers: Answers) -> dict[str, float]:
  """Returns means over the held-out responses, named as in the record.

  eval/rewards/NAME/failed and …/failed/KIND are counts instead: of responses on
  which a reward in worker processes failed.
  """
  metrics = {'eval/reward': _mean(answers.rewards)}
  for name, scores in answers.parts.items():
    metrics[f'eval/rewards/{name}'] = _mean(scores)
  metrics |= failure_counts(answers.failures)
  metrics['eval/completions/mean_length'] = answers.lengths.mean()
  metrics['eval/completions/clipped_ratio'] = 1.0 - answers.finished.mean()
  metrics['eval/distinct_bigrams'] = distinct_bigrams(answers.tokens)
  if answers.kl is not None:
    metrics['eval/kl'] = answers.kl
  return {name: float(value) for name, value in metrics.items()}


def _mean(scores: np.ndarray) -> float:
  """Returns the mean of the known scores; NaN if there are none."""
  known = scores[~np.isnan(scores)]
  return float(known.mean()) if known.size else np.nan


def _kl_sum(setting: rollouts.Setting, params, responses) -> float:
  """Returns Σ log π − log π_ref over the responses' tokens, nats."""
  samples, total = responses.samples, 0.0
  for start in range(0, len(responses.rows), setting.micro_prompts):
    rows = slice(start, start + setting.micro_prompts)
    prompts, tokens, mask = jax.tree.map(
      lambda x, rows=rows: x[rows],
      (responses.prompts, samples.tokens, samples.mask),
    )
    now, before = (
      rollouts.score_tokens(
        setting.model,
        weights,
        prompts,
        tokens,
        setting.generation.decoding,
        len(tokens),
        setting.chunk,
      ).log_probs
      for weights in (params, setting.reference)
    )
    total += float(jnp.where(mask, now - before, 0.0).sum())
  return total
