"""The health of a run: a line per step, and warnings with a likely cause.

Everything here is a function of a run's records, so that a run that is resumed,
or inspected afterwards, gets the same reports.  `docs/metrics.md` lists the
metrics and their ranges.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.runs.metrics import cannot_write

Record = Mapping[str, float]

# Steps in a mean.  A single step outside a range is chance.
WINDOW = 10
# Healthy steps after which a warning is repeated.
_QUIET = 100


class Range(NamedTuple):
  """Healthy values of a metric, averaged over the last `WINDOW` steps.

  Attributes:
    label: the metric's name in the line.
    metrics: names in the records; their values are added up.
    low, high: bounds, themselves healthy.
    cause: likely cause and remedy of a value outside.
  """

  label: str
  metrics: tuple[str, ...]
  low: float
  high: float
  cause: str

  @property
  def healthy(self) -> str:
    """The range in words."""
    if math.isinf(self.high):
      return f'at least {self.low:g}'
    return f'{self.low:g} to {self.high:g}'


RANGES = (
  Range(
    'kl',
    ('approx_kl',),
    0.0,
    0.1,
    'KL run-away: one step moves the policy too far\n'
    'lower config.optimizer.learning_rate or config.training.epochs',
  ),
  Range(
    'reference_kl',
    ('kl',),
    -0.1,
    1.0,
    'KL run-away: the policy has left its reference\n'
    "lower the learning rate, or raise the algorithm's kl",
  ),
  Range(
    'clipped',
    ('clip_ratio/low', 'clip_ratio/high'),
    0.0,
    0.3,
    'most of a step is clipped away\n'
    'lower the learning rate, or take fewer updates per step',
  ),
  Range(
    'sampler',
    ('log_prob_difference/mean',),
    0.0,
    0.02,
    'sampler and trainer compute different policies\n'
    "compare with config.model.attention='xla' and dtype='float32'",
  ),
  Range(
    'effective',
    ('sampler/effective_samples',),
    0.3,
    math.inf,
    'sampler and trainer differ so much that few responses carry most of the '
    "weight\ncompare with config.model.attention='xla' and dtype='float32'",
  ),
  Range(
    'flat',
    ('frac_reward_zero_std',),
    0.0,
    0.9,
    'most groups have equal rewards and teach nothing\n'
    'choose prompts of medium pass rate (experiments.label), or raise '
    'config.rollout.samples',
  ),
  Range(
    'truncated',
    ('completions/clipped_ratio',),
    0.0,
    0.5,
    'most responses are cut off before they end\n'
    'raise config.rollout.max_tokens; check that the model writes its end '
    'token at all',
  ),
  Range(
    'explained',
    ('critic/explained_variance',),
    0.0,
    1.0,
    'the critic predicts worse than a constant\n'
    'raise config.critic.optimizer.learning_rate, or config.critic.warmup',
  ),
)

# Fraction of the initial mean entropy below which it has collapsed.
_COLLAPSED = 0.1
# Multiple of the initial length.
_GROWN = 2.0


class Health(NamedTuple):
  """A run's health at one step.

  Attributes:
    line: everything in one line.
    warnings: by problem: the problem and, in a second line, the remedy.
  """

  line: str
  warnings: dict[str, str]


def assess(first: Sequence[Record], recent: Sequence[Record]) -> Health:
  """Assesses a run at the last of its records.

  Args:
    first: records of its first steps, up to `WINDOW`.
    recent: of its last steps, up to `WINDOW`, oldest first; not empty.
  """
  now = recent[-1]
  warnings, shown = {}, []
  for check in _CHECKS:
    warnings |= check(first, recent)
  # Flat groups are a consequence of these.
  unlearned = warnings.keys() & {'constant', 'unscored'}
  if not _finite(now):
    shown.append('not finite')
  for each in RANGES:
    value = _sum(now, each.metrics)
    if value is None:
      continue
    shown.append(f'{each.label} {value:.3g}')
    mean = _mean(recent, each.metrics)
    if each.label == 'flat' and unlearned:
      continue
    if len(recent) == WINDOW and not each.low <= mean <= each.high:
      warnings[each.label] = (
        f'{" + ".join(each.metrics)} is {mean:.3g} over {WINDOW} steps, '
        f'healthy is {each.healthy}: {each.cause}'
      )
  for label, names in _counts(now).items():
    shown.append(f'{label} {sum(now[name] for name in names):g}')
  state = 'well' if not warnings else 'look: ' + ', '.join(warnings)
  return Health(f'{now["step"]} {state} | {", ".join(shown)}', warnings)


class Watch:
  """Follows a run: appends to `health.log` and returns new warnings.

  Args:
    folder: the run's folder.
    records: those of the phase so far, from which the file is rewritten.

  Raises:
    UserError: the file cannot be written.
  """

  def __init__(self, folder, records: Sequence[Record] = ()):
    self._path = pathlib.Path(folder) / 'health.log'
    self._first, self._recent = [], []
    self._warned = {}  # problem → last step that had it
    self._write('w', [self._take(record).line for record in records])

  def add(self, record: Record) -> list[str]:
    """Takes a step's record.

    Returns:
      Warnings that no recent step had, two lines each.
    """
    before = self._warned.copy()
    health = self._take(record)
    self._write('a', [health.line])
    return [
      f'step {record["step"]}: {text}'
      for name, text in health.warnings.items()
      if record['step'] - before.get(name, -math.inf) > _QUIET
    ]

  def _take(self, record: Record) -> Health:
    if len(self._first) < WINDOW:
      self._first.append(record)
    self._recent = [*self._recent, record][-WINDOW:]
    health = assess(self._first, self._recent)
    self._warned |= dict.fromkeys(health.warnings, record['step'])
    return health

  def _write(self, mode: str, lines: Sequence[str]) -> None:
    try:
      with open(self._path, mode, encoding='utf-8') as file:
        file.writelines(f'{line}\n' for line in lines)
    except OSError as error:
      raise cannot_write(self._path, error.strerror) from error


def _sum(record: Record, names: Sequence[str]) -> float | None:
  """Returns the sum of the metrics; None if none of them is recorded."""
  values = [float(record[name]) for name in names if name in record]
  return sum(values) if values else None


def _mean(records: Sequence[Record], names: Sequence[str]) -> float:
  """Averages the metrics' finite sums over records; NaN if there are none."""
  values = [_sum(record, names) for record in records]
  values = [x for x in values if x is not None and math.isfinite(x)]
  return float(np.mean(values)) if values else math.nan


def _counts(record: Record) -> dict[str, list[str]]:
  """Returns the names of metrics that should be 0, by label."""
  failed = [n for n in record if 'rewards/' in n and n.endswith('/failed')]
  counts = {'failed': failed, 'skipped': ['skipped']}
  return {k: v for k, v in counts.items() if v and v[0] in record}


def _finite(record: Record) -> bool:
  names = [n for n in record if n.split('/')[-1] in ('loss', 'grad_norm')]
  return all(math.isfinite(record[name]) for name in names)


def _not_finite(first, recent) -> dict[str, str]:
  del first
  now = recent[-1]
  if _finite(now) and not now.get('skipped'):
    return {}
  return {
    'skipped': 'the update is not finite and was skipped: parameters '
    'unchanged\nlower the learning rate; three in a row end the run'
  }


def _failing(first, recent) -> dict[str, str]:
  del first
  names = {n for r in recent for n in _counts(r).get('failed', ())}
  always = [n for n in sorted(names) if all(r.get(n) for r in recent)]
  if not always or len(recent) < WINDOW:
    return {}
  return {
    'failed': f'{always[0]} is above 0 in each of {WINDOW} steps: those '
    'responses are left out\nread the message of the first failure, or raise '
    "the reward's timeout and memory"
  }


def _unscored(first, recent) -> dict[str, str]:
  del first
  if not all(math.isnan(record.get('reward', 0.0)) for record in recent):
    return {}
  now = recent[-1]
  without = [
    name.removesuffix('/none')
    for name in now
    if name.startswith('rewards/') and name.endswith('/none') and now[name]
  ]
  return {
    'unscored': f'no response has a score ({", ".join(without)} returned '
    'None), and nothing is learned\none reward without a score leaves a '
    'response out: return 0.0 for an unreadable answer'
  }


def _constant_reward(first, recent) -> dict[str, str]:
  del first
  value = _constant(recent, 'reward', _parts(recent[-1]))
  if value is None:
    return {}
  if value > 0:
    return {
      'constant': f'the reward always pays: {value:g} for every response '
      f'of {WINDOW} steps\nlook at samples.html: the task is solved, or the '
      'reward accepts anything'
    }
  return {
    'constant': f'the reward never pays: {value:g} for every response of '
    f'{WINDOW} steps\nlook at samples.html: begin with easier prompts or a '
    'warm start, or fix how the answer is read'
  }


def _unpaid(first, recent) -> dict[str, str]:
  """Finds rewards that never pay, which the others' variation hides."""
  parts = _parts(recent[-1])
  if _constant(recent, 'reward', parts) is not None:
    return {}
  warnings = {}
  for part in parts:
    values = {
      _constant(records, f'{part}/mean', [part]) for records in (first, recent)
    }
    # It has never paid: a penalty that stays at 0 has been learned.
    if values == {0.0}:
      warnings['unpaid'] = (
        f'{part} is 0 for every response so far: unless it is a penalty, it '
        'never pays\nlook at samples.html: begin with easier prompts or a warm '
        'start, or fix how the answer is read'
      )
  return warnings


def _parts(record: Record) -> list[str]:
  """Returns the names of the rewards that a step records."""
  return [
    name.removesuffix('/std')
    for name in record
    if name.startswith('rewards/') and name.endswith('/std')
  ]


def _constant(records, name: str, parts: Sequence[str]) -> float | None:
  """Returns the value of a metric that `WINDOW` steps share, else None.

  Args:
    records: steps.
    name: the metric, a mean over responses.
    parts: its component rewards, which must be constant as well.
  """
  values = {record.get(name) for record in records}
  spreads = [record.get(f'{p}/std', 0.0) for record in records for p in parts]
  # A reward without a score in a step has no deviation either.
  if len(records) < WINDOW or any(x for x in spreads if not math.isnan(x)):
    return None
  value = values.pop()
  constant = not values and value is not None and math.isfinite(value)
  return value if constant else None


def _collapse(first, recent) -> dict[str, str]:
  before, now = _mean(first, ['entropy']), _mean(recent, ['entropy'])
  if len(recent) < WINDOW or not now < _COLLAPSED * before:
    return {}
  return {
    'entropy': f'entropy is {now:.3g} nats, {before:.3g} at the beginning: '
    'unless the task is solved the policy collapses onto a few responses\n'
    'lower the learning rate, clip higher above than below as dapo does, or '
    'sample at a temperature of 1'
  }


def _growth(first, recent) -> dict[str, str]:
  names = ['completions/mean_length']
  before, now = _mean(first, names), _mean(recent, names)
  cut = _mean(recent, ['completions/clipped_ratio'])
  if len(recent) < WINDOW or not (now > _GROWN * before and cut > 0.1):
    return {}
  return {
    'length': f'responses have {now:.3g} tokens, {before:.3g} at the '
    f'beginning, and {cut:.0%} are cut off: length growth\n'
    'normalise the loss by a constant as dr_grpo does, or choose a reward '
    'that longer responses do not raise'
  }


_Check = Callable[[Sequence[Record], Sequence[Record]], dict[str, str]]
_CHECKS: tuple[_Check, ...] = (
  _not_finite,
  _failing,
  _unscored,
  _constant_reward,
  _unpaid,
  _collapse,
  _growth,
)
