"""Measures what trees can gain on a model: shared prefixes and credit."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments import build
from experiments.studies import audit_draws, audit_values
from jaxrl_llm import audit, rollouts

_SAMPLES = 16  # responses per prompt whose prefixes are counted
ORACLE = 'exact Q − V'  # label of the estimator that the rule reads
_PLACES = 32  # most states per response


def measure(
  subject: audit_draws.Subject, config: ConfigDict, count: int
) -> dict[str, Any]:
  """Measures shared prefixes, profiles along responses and the trees' cap.

  Args:
    subject: the model, its task and the prompts.
    config: of the reference: its sampling settings hold.
    count: branches from each state.

  Returns:
    JSON values: `distinct`, the share of distinct tokens among 8 responses;
    `tokens`, to decode for 1, 2, … 16 responses to a prompt with each prefix
    once, and `length`, of one response; `cap`; `profile`: `starts`, and of each
    segment from there δ and S, both as shares of their totals.
  """
  measured = audit_values.measure(
    subject, config, count, min(config.rollout.max_tokens - 1, _PLACES)
  )
  drawn = measured.further[:, :_SAMPLES]
  tokens = audit.distinct_tokens(drawn, drawn >= 0)
  length = float((drawn >= 0).sum(axis=2).mean())
  profile = _profile(subject, config, measured)
  starts = _starts(measured)
  shares = lambda x: (x[:, 0] / x[:, 0].sum()).tolist()
  return {
    'distinct': float(tokens[7] / (8 * length)),
    'tokens': tokens.tolist(),
    'length': length,
    'cap': audit.cap(profile)._asdict(),
    'profile': {
      'starts': starts.tolist(),
      'uncertainty': shares(profile.squares),
      'scores': (profile.scores[:, 0] / profile.scores[-1, 0]).tolist(),
    },
  }


def _starts(measured: audit_values.Measured) -> np.ndarray:
  places = np.unique(measured.positions)
  return np.append(0, places[places > 0])


def _profile(subject, config, measured: audit_values.Measured):
  """Returns the profile of the responses whose states were valued."""
  rl, state = audit_draws.begin(subject, config, 'trees')
  starts, known = _starts(measured), measured.positions > 0
  shape = *known.shape[:2], len(starts)
  values, noise = np.full((2, *shape), np.nan)
  along = audit_values.mean_and_noise(measured.others)
  values[..., 0], noise[..., 0] = (x[:, None] for x in along)
  rows = (
    *np.nonzero(known)[:2],
    np.searchsorted(starts, measured.positions[known]),
  )
  values[rows], noise[rows] = audit_values.mean_and_noise(
    measured.returns[known]
  )
  statistics = rollouts.score_tokens(
    subject.model.config,
    state.trainable['policy'],
    measured.responses.prompts,
    measured.responses.samples.tokens,
    rl.generation.decoding,
    build.micro_prompts(config),
    config.training.chunk,
  )
  mask = np.asarray(measured.responses.samples.mask)
  norms = np.where(mask, np.asarray(statistics.score_norms), 0.0)
  scored = np.isfinite(measured.rewards) & np.isfinite(values[..., 0])
  return audit.profile(
    values[scored],
    np.nan_to_num(noise[scored]),
    measured.rewards[scored],
    norms[scored],
    mask.sum(axis=2)[scored],
    starts,
    np.nonzero(scored)[0],
  )


def over_prompts(result: dict[str, Any], between: audit.Estimate) -> None:
  """Adds to an audit what the choice of prompts adds to the noise.

  Args:
    result: of the audit; its estimators get `within`, the variance of one
      prompt's gradient, and `overall`, signal to noise per 1,000 tokens.
    between: variance of one prompt's true gradient.
  """
  trees, rows = result['trees'], result['estimators']
  prompts = result['prompts']
  trees['between'] = between._asdict()
  b = max(between.value, 0.0)
  for row in rows.values():
    signal = max(row['signal']['value'], 0.0)
    noise = 1000 / (row['tokens'] * signal) if signal else np.inf
    # Of the mean gradient of all prompts, not of these.
    row['within'] = float(prompts * noise * (1 + b / prompts))
    row['overall'] = 1000 * prompts / (row['tokens'] * (b + row['within']))
  whole = np.arange(1, _SAMPLES + 1) * trees['length']
  trees['best'] = {
    f'{name}{once}': audit.best_samples(
      b,
      rows[name]['within'],
      rows[name]['samples'],
      tokens,
      name == 'RLOO',
    )
    for name in ('RLOO', 'REINFORCE')
    for once, tokens in (('', whole), (', prefixes once', trees['tokens']))
    if name in rows
  }
  oracle, usual = (rows.get(name) for name in (ORACLE, 'RLOO'))
  if oracle and usual:
    credit = oracle['signal']['value'] / usual['signal']['value']
    trees['credit'] = credit
    trees['advice'] = audit.advice(
      trees['distinct'], trees['cap']['value'], credit
    )


def to_markdown(trees: dict[str, Any]) -> list[str]:
  """Returns the numbers as lines of Markdown."""
  between, said = trees['between'], trees.get('advice')
  profile = trees['profile']
  cells = zip(
    profile['starts'], profile['uncertainty'], profile['scores'], strict=True
  )
  best = ', '.join(f'{k} for {name}' for name, k in trees['best'].items())
  return [
    f'Of the tokens of 8 responses to a prompt {trees["distinct"]:.0%} are '
    "distinct.  The variance of a prompt's true gradient is "
    f'{between["value"]:.3g} ± {between["error"]:.2g} ‖E g‖².  Least noise per '
    f'token at G = {best}.  Cap of trees with exact baselines: '
    f'{trees["cap"]["value"]:.2f} ± {trees["cap"]["error"]:.2f} × RLOO.'
    + (f'  The rule says: {said}.' if said else ''),
    '',
    '| from token | share of Σδ | S, of its last |',
    '| ---: | ---: | ---: |',
    *(f'| {n} | {a:.3f} | {b:.3f} |' for n, a, b in cells),
  ]
