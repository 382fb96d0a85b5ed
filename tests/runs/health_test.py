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
  record = {'step': 7, 'loss': 0.3, 'grad_norm': 1.0, 'skipped': 0}
  assert assess([record], [record]).line == '7 well | skipped 0'


@pytest.mark.parametrize('name', FAULTS)
def test_each_fault_is_told_alone_and_only_when_it_lasts(name):
  found = told((WINDOW, {}), (WINDOW, FAULTS[name]))
  assert list(found) == [name]
  assert len(found[name].split('\n')) == 2
  # One step outside is chance, and what was fixed is forgotten.
  assert told((2 * WINDOW, {}), (1, FAULTS[name])) == {}
  assert told((WINDOW, FAULTS[name]), (WINDOW, {})) == {}


@pytest.mark.parametrize(
  'reward, word', [(0.0, 'never'), (-1.0, 'never'), (1.0, 'always')]
)
def test_a_constant_reward_is_told_without_its_consequence(reward, word):
  flat = {'reward': reward, 'rewards/correct/std': 0.0, **FAULTS['flat']}
  found = told((WINDOW, flat))
  assert list(found) == ['constant'] and f'{word} pays' in found['constant']
  flat['frac_reward_zero_std'] = 0.5
  assert told((WINDOW - 1, flat), (1, {**flat, 'reward': 0.5})) == {}


def test_a_reward_that_never_pays_beside_one_that_does():
  unpaid = {
    **{'rewards/correct/mean': 0.0, 'rewards/correct/std': 0.0},
    **{'rewards/format/mean': 0.4, 'rewards/format/std': 0.4},
  }
  found = told((3 * WINDOW, unpaid))
  assert list(found) == ['unpaid']
  assert found['unpaid'].startswith('rewards/correct is 0 for every response')
  # It pays once; a penalty rests at 0 once it is learned; formats are right.
  paid = unpaid | {'rewards/correct/mean': 0.01, 'rewards/correct/std': 0.1}
  assert told((WINDOW - 1, unpaid), (1, paid)) == {}
  assert told((WINDOW, paid), (WINDOW, unpaid)) == {}
  right = paid | {'rewards/format/mean': 1.0, 'rewards/format/std': 0.0}
  assert told((2 * WINDOW, right)) == {}


@pytest.mark.parametrize(
  'failed, cause, remedy',
  [
    (0, '(rewards/correct returned None)', 'return 0.0 for'),
    (32, '(rewards/correct failed)', "read the first failure's message"),
  ],
)
def test_no_score_is_told_at_once_with_its_cause(failed, cause, remedy):
  unscored = {
    **{'reward': math.nan, 'rewards/correct/none': 32},
    **{'rewards/correct/mean': math.nan, 'rewards/correct/std': math.nan},
    **{'rewards/format/none': 0, 'rewards/format/std': 0.4},
    **{'frac_reward_zero_std': math.nan, 'rewards/correct/failed': failed},
  }
  for steps in (1, WINDOW):
    found = told((steps, unscored))
    lasts = failed and steps == WINDOW
    assert list(found) == ['unscored', *['failed'] * bool(lasts)]
    problem, advice = found['unscored'].split('\n')
    assert cause in problem and remedy in advice
  assert told((WINDOW - 1, unscored), (1, {})) == {}


def test_names_in_warnings_act_on_no_terminal():
  name = 'rewards/\x1b[2J\u202e\n'
  bad = {f'{name}/failed': 2, f'{name}/none': 2, f'{name}/std': 0.0}
  bad |= {f'{name}/mean': 0.0, 'rewards/format/std': 0.4}
  found = told((2 * WINDOW, bad)) | told((1, bad | {'reward': math.nan}))
  assert list(found) == ['failed', 'unpaid', 'unscored']
  for text in found.values():
    assert 'rewards/␛[2J\\u202e␊' in text
    assert all(line.isprintable() for line in text.split('\n'))


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


@pytest.mark.parametrize(
  'changes',
  [{'skipped': 1}, {'loss': math.nan}, {'critic/grad_norm': math.inf}],
)
def test_what_is_not_finite_is_told_at_once(changes):
  found = assess(run((1, {})), run((1, changes)))
  assert list(found.warnings) == ['skipped']
  assert found.line.startswith('1 look: skipped | ')


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
