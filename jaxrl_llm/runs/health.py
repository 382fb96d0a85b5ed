"""The health of a run: a line per step, and warnings with a likely cause.

Everything here is a function of a run's records, so that a run that is resumed,
or inspected afterwards, gets the same reports.  `docs/metrics.md` lists the
metrics and their ranges.
"""

import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxrl_llm.runs.metrics import cannot_write
from jaxrl_llm.runs.progress import visible

Record = Mapping[str, float]

# Steps in a mean.  A single step outside a range is chance.
WINDOW = 10
# Healthy steps after which a warning is repeated.
_QUIET = 100

# Remedies of several warnings.
_COMPARE = "compare with config.model.attention='xla' and dtype='float32'"
_EASIER = (
  'begin with easier prompts or a warm start, or fix how the answer is read'
)
_READ = (
  "read the first failure's message, or raise the reward's timeout and memory"
)


class Range(NamedTuple):
  """Healthy values of a metric, averaged over the last `WINDOW` steps.

  Attributes:
    label: the metric's name in the line.
    metrics: names in the records; their values are added up.
    low, high: bounds, themselves healthy.
  """

  label: str
  metrics: tuple[str, ...]
  low: float
  high: float

  @property
  def healthy(self) -> str:
    """The range in words."""
    if math.isinf(self.high):
      return f'at least {self.low:g}'
    return f'{self.low:g} to {self.high:g}'


RANGES = (
  Range('kl', ('approx_kl',), 0.0, 0.1),
  Range('reference_kl', ('kl',), -0.1, 1.0),
  Range('clipped', ('clip_ratio/low', 'clip_ratio/high'), 0.0, 0.3),
  Range('sampler', ('log_prob_difference/mean',), 0.0, 0.02),
  Range('effective', ('sampler/effective_samples',), 0.3, math.inf),
  Range('flat', ('frac_reward_zero_std',), 0.0, 0.9),
  Range('truncated', ('completions/clipped_ratio',), 0.0, 0.5),
  Range('explained', ('critic/explained_variance',), 0.0, 1.0),
)
# Likely cause of a value outside, and remedy, by label.
CAUSES = {
  'kl': 'KL run-away: one step moves the policy too far\n'
  'lower config.optimizer.learning_rate or config.training.epochs',
  'reference_kl': 'KL run-away: the policy has left its reference\n'
  "lower the learning rate, or raise the algorithm's kl",
  'clipped': 'most of a step is clipped away\n'
  'lower the learning rate, or take fewer updates per step',
  'sampler': 'sampler and trainer compute different policies\n' + _COMPARE,
  'effective': 'sampler and trainer differ so much that few responses carry '
  f'most of the weight\n{_COMPARE}',
  'flat': 'most groups have equal rewards and teach nothing\n'
  'choose prompts of medium pass rate (experiments.label), or raise '
  'config.rollout.samples',
  'truncated': 'most responses are cut off before they end\n'
  'raise config.rollout.max_tokens; check that the model writes its end token '
  'at all',
  'explained': 'the critic predicts worse than a constant\n'
  'raise config.critic.optimizer.learning_rate, or config.critic.warmup',
}


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
  now, lasting = recent[-1], len(recent) == WINDOW
  checks = _CHECKS if lasting else _AT_ONCE
  warnings = {k: x for k, f in checks.items() if (x := f(first, recent))}
  # Flat groups are a consequence of these.
  unlearned = warnings.keys() & {'constant', 'unscored'}
  shown = [] if _finite(now) else ['not finite']
  for each in RANGES:
    value = _sum(now, each.metrics)
    if value is None:
      continue
    shown.append(f'{each.label} {value:.3g}')
    mean = _mean(recent, each.metrics)
    consequence = each.label == 'flat' and unlearned
    if lasting and not each.low <= mean <= each.high and not consequence:
      warnings[each.label] = (
        f'{" + ".join(each.metrics)} is {mean:.3g} over {WINDOW} steps, '
        f'healthy is {each.healthy}: {CAUSES[each.label]}'
      )
  for label, names in (('failed', _failed(now)), ('skipped', ['skipped'])):
    count = _sum(now, names)
    shown += [] if count is None else [f'{label} {count:g}']
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
    lines = [self._take(record).line for record in records]
    self._write(lines, replace=True)

  def add(self, record: Record) -> list[str]:
    """Takes a step's record.

    Returns:
      Warnings that no recent step had, two lines each.
    """
    before = self._warned.copy()
    health = self._take(record)
    self._write([health.line])
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

  def _write(self, lines: Sequence[str], replace: bool = False) -> None:
    # A folder from elsewhere may link the name to another file.
    opener = lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666)
    try:
      if replace:
        self._path.unlink(missing_ok=True)
      with open(self._path, 'a', encoding='utf-8', opener=opener) as file:
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
  return sum(values) / len(values) if values else math.nan


def _failed(record: Record) -> list[str]:
  """Returns the names of the counts of failed rewards."""
  return [n for n in record if 'rewards/' in n and n.endswith('/failed')]


def _rewards(record: Record, end: str) -> list[str]:
  """Returns `rewards/NAME` for each metric `rewards/NAME/<end>`."""
  names = [n.removesuffix(f'/{end}') for n in record if n.endswith(f'/{end}')]
  return [name for name in names if name.startswith('rewards/')]


def _finite(record: Record) -> bool:
  names = [n for n in record if n.split('/')[-1] in ('loss', 'grad_norm')]
  return all(math.isfinite(record[name]) for name in names)


def _not_finite(_, recent) -> str | None:
  if not _finite(recent[-1]) or recent[-1].get('skipped'):
    return (
      'the update is not finite and was skipped: parameters unchanged\n'
      'lower the learning rate; three in a row end the run'
    )


def _failing(_, recent) -> str | None:
  for name in sorted({name for record in recent for name in _failed(record)}):
    if all(record.get(name) for record in recent):
      return (
        f'{visible(name, keep="")} is above 0 in each of {WINDOW} steps: those '
        f'responses are left out\n{_READ}'
      )


def _unscored(_, recent) -> str | None:
  if not all(math.isnan(record.get('reward', 0.0)) for record in recent):
    return None
  failed, without = (_counted(recent[-1], end) for end in ('failed', 'none'))
  cause = f'{failed} failed' if failed else f'{without} returned None'
  remedy = (
    'None means that a reward does not apply to a response: return 0.0 for an '
    'unreadable answer'
  )
  return (
    f'no response has a score ({cause}), and nothing is learned\n'
    f'{_READ if failed else remedy}'
  )


def _counted(record: Record, end: str) -> str:
  """Returns the rewards for which the metric counts any response."""
  names = [n for n in _rewards(record, end) if record[f'{n}/{end}']]
  return visible(', '.join(names), keep='')


def _constant_reward(_, recent) -> str | None:
  value = _constant(recent, 'reward', _rewards(recent[-1], 'std'))
  if value is None:
    return None
  word = 'always' if value > 0 else 'never'
  solved = 'the task is solved, or the reward accepts anything'
  return (
    f'the reward {word} pays: {value:g} for every response of {WINDOW} steps\n'
    f'look at samples.html: {solved if value > 0 else _EASIER}'
  )


def _unpaid(first, recent) -> str | None:
  """Finds a reward that never pays, which the others' variation hides."""
  parts = _rewards(recent[-1], 'std')
  if _constant(recent, 'reward', parts) is not None:
    return None
  for part in parts:
    values = {_constant(x, f'{part}/mean', [part]) for x in (first, recent)}
    # It has never paid: a penalty that stays at 0 has been learned.
    if values == {0.0}:
      return (
        f'{visible(part, keep="")} is 0 for every response so far: unless it '
        f'is a penalty, it never pays\nlook at samples.html: {_EASIER}'
      )


def _constant(records, name: str, parts: Sequence[str]) -> float | None:
  """Returns a mean that all records share, with constant parts; else None."""
  value, *others = {record.get(name) for record in records}
  spreads = [record.get(f'{p}/std', 0.0) for record in records for p in parts]
  # A reward without a score in a step has no deviation either.
  varies = others or any(x for x in spreads if not math.isnan(x))
  return None if varies or not math.isfinite(value or 0.0) else value


def _collapse(first, recent) -> str | None:
  before, now = _mean(first, ['entropy']), _mean(recent, ['entropy'])
  if now < 0.1 * before:
    return (
      f'entropy is {now:.3g} nats, {before:.3g} at the beginning: unless the '
      'task is solved the policy collapses onto a few responses\n'
      'lower the learning rate, clip higher above than below as dapo does, or '
      'sample at a temperature of 1'
    )


def _growth(first, recent) -> str | None:
  names = ['completions/mean_length']
  before, now = _mean(first, names), _mean(recent, names)
  cut = _mean(recent, ['completions/clipped_ratio'])
  if now > 2 * before and cut > 0.1:
    return (
      f'responses have {now:.3g} tokens, {before:.3g} at the beginning, and '
      f'{cut:.0%} are cut off: length growth\n'
      'normalise the loss by a constant as dr_grpo does, or choose a reward '
      'that longer responses do not raise'
    )


_AT_ONCE: dict[str, Callable] = {'skipped': _not_finite, 'unscored': _unscored}
# The others need `WINDOW` steps.
_CHECKS = _AT_ONCE | {
  'failed': _failing,
  'constant': _constant_reward,
  'unpaid': _unpaid,
  'entropy': _collapse,
  'length': _growth,
}
