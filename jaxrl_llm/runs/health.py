"""Whether a run is well: a line per step, and warnings with a likely cause.

Everything here is a function of the records that a run writes, so that a run
that is resumed, or looked at afterwards, is told the same.  `docs/metrics.md`
lists the metrics and their ranges.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.runs.records import cannot_write

Record = Mapping[str, float]

# Steps that a mean is over.  One step outside of a range is chance.
WINDOW = 10
# Steps of being well after which the same is told again.
_QUIET = 100


class Range(NamedTuple):
  """Healthy values of a metric, a mean over the last `WINDOW` steps.

  Attributes:
    label: what the line calls it.
    metrics: names in the records, whose values are added up.
    low, high: ends, themselves healthy.
    cause: what it may come from and what helps, where it is outside.
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
    'sampler and trainer compute another policy\n'
    "compare with config.model.attention='xla' and dtype='float32'",
  ),
  Range(
    'effective',
    ('sampler/effective_samples',),
    0.3,
    math.inf,
    'sampler and trainer differ so much that few responses carry the weights '
    "of all\ncompare with config.model.attention='xla' and dtype='float32'",
  ),
  Range(
    'flat',
    ('frac_reward_zero_std',),
    0.0,
    0.9,
    'most groups have equal rewards, of which nothing is learned\n'
    'choose prompts of medium pass rate (experiments.label), or raise '
    'config.rollout.samples',
  ),
  Range(
    'truncated',
    ('completions/clipped_ratio',),
    0.0,
    0.5,
    'most responses are cut off before they end\n'
    'raise config.rollout.max_tokens; see whether the model writes its end '
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

# Of its mean at the beginning, in nats, below which entropy has collapsed.
_COLLAPSED = 0.1
# Times the length at the beginning.
_GROWN = 2.0


class Health(NamedTuple):
  """How a run is at one step.

  Attributes:
    line: all of it in one line.
    warnings: by what is wrong: what, and in a second line what to do.
  """

  line: str
  warnings: dict[str, str]


def assess(first: Sequence[Record], recent: Sequence[Record]) -> Health:
  """How a run is at the last of its records.

  Args:
    first: records of its first steps, up to `WINDOW`.
    recent: of its last steps, up to `WINDOW`, oldest first; not empty.
  """
  now = recent[-1]
  found, shown = {}, []
  for check in _CHECKS:
    found |= check(first, recent)
  # Of which it is the consequence.
  unlearned = found.keys() & {'constant', 'unscored'}
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
      found[each.label] = (
        f'{" + ".join(each.metrics)} is {mean:.3g} over {WINDOW} steps, '
        f'healthy is {each.healthy}: {each.cause}'
      )
  for label, names in _counts(now).items():
    shown.append(f'{label} {sum(now[name] for name in names):g}')
  state = 'well' if not found else 'look: ' + ', '.join(found)
  return Health(f'{now["step"]} {state} | {", ".join(shown)}', found)


class Watch:
  """Follows a run: adds a line to `health.log`, tells what is new.

  Args:
    folder: of the run.
    records: those of the phase so far, of which the file is written again.

  Raises:
    UserError: the file cannot be written.
  """

  def __init__(self, folder, records: Sequence[Record] = ()):
    self._path = pathlib.Path(folder) / 'health.log'
    self._first, self._recent = [], []
    self._told = {}  # what was wrong → at which step last
    self._write('w', [self._take(record).line for record in records])

  def add(self, record: Record) -> list[str]:
    """Takes a step's record.

    Returns:
      Warnings that none of many steps before had, two lines each.
    """
    before = self._told.copy()
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
    self._told |= dict.fromkeys(health.warnings, record['step'])
    return health

  def _write(self, mode: str, lines: Sequence[str]) -> None:
    try:
      with open(self._path, mode, encoding='utf-8') as file:
        file.writelines(f'{line}\n' for line in lines)
    except OSError as error:
      raise cannot_write(self._path, error.strerror) from error


def _sum(record: Record, names: Sequence[str]) -> float | None:
  """The metrics' sum; None where none of them is recorded."""
  values = [float(record[name]) for name in names if name in record]
  return sum(values) if values else None


def _mean(records: Sequence[Record], names: Sequence[str]) -> float:
  """Over the records that have them and are numbers; NaN where none is."""
  values = [_sum(record, names) for record in records]
  values = [x for x in values if x is not None and math.isfinite(x)]
  return float(np.mean(values)) if values else math.nan


def _counts(record: Record) -> dict[str, list[str]]:
  """Numbers that should be 0, by label: which metrics they are."""
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
    'skipped': 'the update is not finite and was left out: parameters are '
    'those before\nlower the learning rate; a third one in a row ends the run'
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
    'unscored': f'no response has a score (None of {", ".join(without)}), and '
    'nothing is learned\none reward without a score leaves a response out: '
    'return 0.0 for an answer that cannot be read'
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
    'warm start, or mend how the answer is read'
  }


def _unpaid(first, recent) -> dict[str, str]:
  """One of several rewards, which the others' variation hides."""
  parts = _parts(recent[-1])
  if _constant(recent, 'reward', parts) is not None:
    return {}
  found = {}
  for part in parts:
    values = {
      _constant(records, f'{part}/mean', [part]) for records in (first, recent)
    }
    # It has never paid: a penalty that rests at 0 has been learned.
    if values == {0.0}:
      found['unpaid'] = (
        f'{part} is 0 for every response so far: if it is no penalty, it never '
        'pays\nlook at samples.html: begin with easier prompts or a warm '
        'start, or mend how the answer is read'
      )
  return found


def _parts(record: Record) -> list[str]:
  """Names of the rewards that a step records."""
  return [
    name.removesuffix('/std')
    for name in record
    if name.startswith('rewards/') and name.endswith('/std')
  ]


def _constant(records, name: str, parts: Sequence[str]) -> float | None:
  """The value of a metric that `WINDOW` steps share; None if they do not.

  Args:
    records: steps.
    name: of the metric, a mean over responses.
    parts: rewards of which it is made, which are to be constant as well.
  """
  values = {record.get(name) for record in records}
  spreads = [record.get(f'{p}/std', 0.0) for record in records for p in parts]
  # A reward that has no score in a step has no deviation either.
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
  of = ['completions/mean_length']
  before, now = _mean(first, of), _mean(recent, of)
  cut = _mean(recent, ['completions/clipped_ratio'])
  if len(recent) < WINDOW or not (now > _GROWN * before and cut > 0.1):
    return {}
  return {
    'length': f'responses have {now:.3g} tokens, {before:.3g} at the '
    f'beginning, and {cut:.0%} are cut off: length growth\n'
    'normalise the loss by a constant as dr_grpo does, or take a reward that '
    'longer responses do not raise'
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
