"""Health lines and warnings, of records made up for one fault each."""

import math
import pathlib
import re

import pytest

from experiments import checks
from experiments.configs import base
from jaxrl_llm.errors import UserError
from jaxrl_llm.estimators import algorithms
from jaxrl_llm.runs import WINDOW, Watch, assess, health

WELL = {
  **{'completions/clipped_ratio': 0.05, 'completions/mean_length': 20.0},
  **{'frac_reward_zero_std': 0.3, 'reward': 0.4, 'rewards/correct/std': 0.49},
  **{'rewards/correct/failed': 0, 'approx_kl': 0.003, 'kl': 0.02},
  **{'clip_ratio/low': 0.01, 'clip_ratio/high': 0.02, 'entropy': 1.2},
  **{'critic/explained_variance': 0.5, 'sampler/effective_samples': 0.9},
  **{'grad_norm': 0.7, 'loss': 0.01, 'log_prob_difference/mean': 2e-7},
  'skipped': 0,
}
FAULTS = {
  **{'kl': {'approx_kl': 0.4}, 'reference_kl': {'kl': 3.0}},
  'clipped': {'clip_ratio/low': 0.2, 'clip_ratio/high': 0.2},
  'sampler': {'log_prob_difference/mean': 0.1},
  'effective': {'sampler/effective_samples': 0.05},
  'flat': {'frac_reward_zero_std': 1.0},
  'truncated': {'completions/clipped_ratio': 0.9},
  'explained': {'critic/explained_variance': -0.5},
  'failed': {'rewards/correct/failed': 2},
  'entropy': {'entropy': 0.01},
  'length': {'completions/mean_length': 50.0, 'completions/clipped_ratio': 0.3},
}


def run(*parts):
  """Records of (steps, changes of `WELL`), one part after the other."""
  changes = [changes for steps, changes in parts for _ in range(steps)]
  return [{'step': i, **WELL, **x} for i, x in enumerate(changes, 1)]


def told(*parts):
  records = run(*parts)
  return assess(records[:WINDOW], records[-WINDOW:]).warnings


def test_a_healthy_run_is_well_and_shows_what_it_records():
  found = assess(run((WINDOW, {})), run((3 * WINDOW, {}))[-WINDOW:])
  assert found.warnings == {}
  assert found.line == (
    '30 well | kl 0.003, reference_kl 0.02, clipped 0.03, sampler 2e-07, '
    'effective 0.9, flat 0.3, truncated 0.05, explained 0.5, failed 0, '
    'skipped 0'
  )


@pytest.mark.parametrize('name', FAULTS)
def test_each_fault_is_told_alone_and_only_when_it_lasts(name):
  found = told((WINDOW, {}), (WINDOW, FAULTS[name]))
  assert list(found) == [name]
  assert len(found[name].split('\n')) == 2
  # One step outside is chance, and what was fixed is forgotten.
  assert told((2 * WINDOW, {}), (1, FAULTS[name])) == {}
  assert told((WINDOW, FAULTS[name]), (WINDOW, {})) == {}


FLAT = {'rewards/correct/std': 0.0, **FAULTS['flat']}
UNPAID = {
  **{'rewards/correct/mean': 0.0, 'rewards/correct/std': 0.0},
  **{'rewards/format/mean': 0.4, 'rewards/format/std': 0.4},
}
PAID = UNPAID | {'rewards/correct/mean': 0.01, 'rewards/correct/std': 0.1}
UNSCORED = {
  **{'reward': math.nan, 'rewards/correct/none': 32},
  **{'rewards/correct/mean': math.nan, 'rewards/correct/std': math.nan},
  **{'rewards/format/none': 0, 'frac_reward_zero_std': math.nan},
}


@pytest.mark.parametrize(
  'parts, name, text',
  [
    # Flat groups, its consequence, are not reported beside it.
    ([(WINDOW, {**FLAT, 'reward': -1.0})], 'constant', 'never pays'),
    ([(WINDOW, {**FLAT, 'reward': 1.0})], 'constant', 'always pays'),
    ([(3 * WINDOW, UNPAID)], 'unpaid', 'rewards/correct is 0 for every'),
    # At once, with its cause.
    ([(1, UNSCORED)], 'unscored', r'\(rewards/correct returned None\)'),
    (
      [(1, {**UNSCORED, 'rewards/correct/failed': 32})],
      'unscored',
      r"\(rewards/correct failed\)(?s:.*)first failure's message",
    ),
    ([(1, {'skipped': 1})], 'skipped', 'parameters unchanged'),
    ([(1, {'loss': math.nan})], 'skipped', ''),
    ([(1, {'critic/grad_norm': math.inf})], 'skipped', ''),
  ],
)
def test_what_is_wrong_is_told_with_its_cause(parts, name, text):
  found = told(*parts)
  assert list(found) == [name]
  assert re.search(text, found[name])


@pytest.mark.parametrize(
  'parts',
  [
    # It pays once; a penalty rests at 0 once it is learned.
    [(WINDOW - 1, UNPAID), (1, PAID)],
    [(WINDOW, PAID), (WINDOW, UNPAID)],
    [(WINDOW - 1, UNSCORED), (1, {})],
    # Left out of the mean; rounding; long but not cut off.
    [(WINDOW, {}), (1, {'critic/explained_variance': math.nan})],
    [(WINDOW, {'sampler/effective_samples': 1.0000001})],
    [(WINDOW, {}), (WINDOW, {'completions/mean_length': 50.0})],
  ],
)
def test_what_is_well(parts):
  assert told(*parts) == {}


def test_names_in_warnings_act_on_no_terminal():
  name = 'rewards/\x1b[2J\u202e\n'
  found = told((WINDOW, {f'{name}/failed': 2}))
  assert '\nrewards/␛[2J\\u202e␊' in '\n' + found['failed']


def test_advice_and_docs_name_what_there_is():
  docs = (pathlib.Path(__file__).parents[2] / 'docs/metrics.md').read_text()
  for each in health.RANGES:
    names = ' + '.join(f'`{name}`' for name in each.metrics)
    assert f'| {each.label} | {names} | {each.healthy} |' in docs
  fields = {name for name, _ in checks.leaves(base.get_config())}
  texts = list(health.CAUSES.values())
  for fault in FAULTS.values():
    texts += told((10, {}), (10, fault)).values()
  named = re.findall(r'config\.([\w.]+\w)', ' '.join(texts))
  assert len(named) > 5 and not set(named) - fields, set(named) - fields
  for recipe in re.findall(r'as (\w+) does', ' '.join(texts)):
    assert hasattr(algorithms, recipe)


def test_a_watch_reports_once_and_continues_from_records(tmp_path):
  now_and_then = [(WINDOW, {}), (WINDOW, FAULTS['kl'])] * 4
  records = run(*now_and_then, (150, {}), (WINDOW, FAULTS['kl']))
  log, watch = tmp_path / 'health.log', Watch(tmp_path)
  heard = [line for record in records for line in watch.add(record)]
  assert [line.split(':')[0] for line in heard] == ['step 13', 'step 233']
  whole = log.read_bytes()
  assert whole.count(b'\n') == len(records)
  # It was killed behind step 25, and its checkpoint is of step 17.
  log.write_text('left over\n' * 25)
  watch = Watch(tmp_path, records[:17])
  assert [m for r in records[17:] for m in watch.add(r)] == heard[1:]
  assert log.read_bytes() == whole


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path):
  target, log = tmp_path / 'target', tmp_path / 'health.log'
  target.write_text('precious')
  for link in (log.symlink_to, log.hardlink_to):
    link(target)
    watch = Watch(tmp_path, run((1, {})))
    assert not log.is_symlink() and log.read_text().startswith('1 well')
    log.unlink()
  log.symlink_to(target)
  with pytest.raises(UserError, match='health.log cannot be written'):
    watch.add(run((1, {}))[0])
  assert target.read_text() == 'precious'
