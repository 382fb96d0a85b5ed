"""Code that only a run's config.json names runs with --trust_code alone."""

import json

import mistakes
import pytest
import scripts
from mistakes import assert_refused as refused

from experiments import replay, stored_runs
from experiments.studies import audit_draws

# A file that a downloaded folder may hold; '{mark}' is created if it is run.
EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()


def score(completions, **kwargs):
  return [0.0] * len(completions)
"""
FILE = dict(name='evil.py:score')


@pytest.fixture
def mark(tmp_path):
  """A file that exists once code of the run's folder has been executed."""
  return tmp_path / 'executed'


@pytest.fixture
def folder(workdir, mark, monkeypatch):
  """The tiny run brings a file of code."""
  (workdir / 'evil.py').write_text(EVIL.format(mark=str(mark)))
  monkeypatch.chdir(workdir)
  return workdir


def store(folder, **sections):
  """Replaces sections of config.json."""
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | sections))


def command(mark):
  """The specification of a function that leaves the mark."""
  return dict(name='subprocess:getoutput', cmd=f'touch {mark}')


def test_neither_evaluation_nor_labelling_executes_code(folder, mark, tmp_path):
  for spec in (command(mark), FILE, FILE | dict(workers=1, timeout=5.0)):
    store(folder, rewards={'score': spec})
    refused(
      scripts.call('evaluate', f'--workdir={folder}'),
      f'{folder}/config.json: config.rewards.score.name is {spec["name"]!r}',
      '--trust_code',
    )
  store(folder, task=FILE, rewards={})
  flags = f'--workdir={folder}', f'--output={tmp_path / "output.jsonl"}'
  ended = scripts.call('label', '--what=pairs', *flags)
  refused(ended, "config.task.name is 'evil.py:score'", '--trust_code')
  assert not mark.exists()


@pytest.mark.parametrize('part', [False, True])
def test_neither_replay_nor_audit_executes_an_algorithm(part, folder, mark):
  spec = command(mark)
  algorithm = dict(name='grpo', kl=spec) if part else spec
  correct = dict(name='arithmetic_answer')
  store(folder, rewards={'correct': correct}, algorithm=algorithm)
  field = 'config.algorithm.kl.name' if part else 'config.algorithm.name'
  for read in (
    lambda: replay.replay(folder, scripts.TOTAL),
    lambda: audit_draws.of_run(str(folder), 'newest', 4),
  ):
    with mistakes.refused(f"{field} is 'subprocess:getout"):
      read()
  assert not mark.exists()
  # What executes no algorithm needs no trust in it.
  found = stored_runs.load(folder, untrusted=('task', 'rewards'))
  assert found.step == scripts.TOTAL


def test_with_trust_the_folders_code_is_executed(folder, mark):
  store(folder, rewards={'score': FILE})
  flags = f'--workdir={folder}', '--trust_code'
  ended = scripts.call('evaluate', *flags)
  assert ended.code == 0 and 'accuracy' in ended.out, ended
  assert mark.exists()
  mark.unlink()
  store(folder, rewards={'score': command(mark)})
  refused(scripts.call('evaluate', *flags), 'of the standard library')
  assert not mark.exists()
