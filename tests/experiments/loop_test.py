"""Runs that fail between an update and its record, and go on bit for bit."""

import errno
import functools
import json
import os
import shutil
import signal
import types

import numpy as np
import pytest
from mistakes import refused

from experiments import loop, run
from experiments.schedule import Script
from jaxrl_llm.runs import Sample, checkpoints, orbax_io
from jaxrl_llm.runs import folder as run_folder
from jaxrl_llm.runs.metrics import RecordFile, cannot_write
from tests.experiments import boundaries_test

# Of its 9 steps it evaluates 0, 4, 8 and 9, and saves every second one.
PROMPTS = 5


def samples(step, advantage=None):
  texts = [f'{step}: {i}' for i in range(3)]
  return [
    Sample(step, f'prompt {i}', text, {'a': 0.1}, 0.1, advantage, 3, True)
    for i, text in enumerate(texts)
  ]


class Writing(boundaries_test.Reading):
  """A main phase with samples, of its steps and of its evaluations."""

  in_evaluation = types.MappingProxyType({})
  scored = staticmethod(lambda number: True)

  def step(self, state, number, stop):
    found = super().step(state, number, stop)
    scores = types.SimpleNamespace(valid=np.array(self.scored(number)))
    responses = types.SimpleNamespace(number=number + 1, scores=scores)
    return found._replace(responses=responses)

  def evaluate(self, trainable, step, stop):
    self.in_evaluation.pop(step, lambda: None)()
    stop.check()
    found = super().evaluate(trainable, step, stop)
    return found._replace(samples=samples(step))


SCRIPT = Script(lambda config: None, Writing)


def train(workdir, in_evaluation=None, every=2) -> int:
  """Trains to the end, or to what cuts it short; gives the status."""
  config = boundaries_test.configuration(PROMPTS).lock()
  config.checkpoints.every = every
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Writing, 'interrupts', {})
    patch.setattr(Writing, 'in_evaluation', in_evaluation or {})
    patch.setattr(
      loop,
      'to_samples',
      lambda of, step, *rest: samples(step, float(of.number)),
    )
    return run.train(SCRIPT, config, workdir, resume=True)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """The folder of an undisturbed run."""
  folder = tmp_path_factory.mktemp('whole') / 'run'
  assert train(folder) == 0
  return folder


@pytest.fixture
def workdir(whole, tmp_path):
  """A copy of it."""
  return shutil.copytree(whole, tmp_path / 'run')


def left(workdir) -> dict:
  names = ('metrics.jsonl', 'samples.jsonl', 'number')
  return {name: (workdir / name).read_text() for name in names}


def newest(workdir) -> dict:
  """The manifest of the newest checkpoint."""
  folder = max((workdir / 'checkpoints').iterdir())
  return json.loads((folder / 'manifest' / 'data.json').read_text())


def fail_once(monkeypatch, name: str, step: int, place: int) -> None:
  """The disk is full at a step's line number `place` (from 0) of a file."""
  write, seen = RecordFile.write, []

  def full(self, record, *again):
    if self.path.name == name and record['step'] == step:
      seen.append(record)
      if len(seen) == place + 1:
        raise cannot_write(self.path, os.strerror(errno.ENOSPC))
    write(self, record, *again)

  monkeypatch.setattr(RecordFile, 'write', full)


def test_a_step_whose_record_fails_is_repeated(whole, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  for name, step, place, saved in (
    ('timings.jsonl', 3, 0, 2),
    ('samples.jsonl', 5, 1, 4),
    ('samples.jsonl', 8, 4, 8),  # in its evaluation, which alone is repeated
  ):
    with monkeypatch.context() as patch:
      fail_once(patch, name, step, place)
      with refused(f'{name} cannot be written: No space'):
        train(workdir)
    found = newest(workdir)
    assert found['step'] == saved
    assert found['metadata']['evaluated'] == (saved != 8)
  assert train(workdir) == 0
  assert left(workdir) == left(whole)


def test_samples_of_an_evaluation_that_runs_again_are_not_doubled(
  whole, tmp_path, monkeypatch
):
  """Stopped in it; then killed behind it, before that is saved."""
  workdir = tmp_path / 'run'
  stop = {4: lambda: os.kill(os.getpid(), signal.SIGTERM)}
  assert train(workdir, in_evaluation=stop) == 143
  assert not newest(workdir)['metadata']['evaluated']
  with monkeypatch.context() as patch:
    # Like SIGKILL, this is caught by nothing on its way.
    ends = lambda self: boundaries_test.end_at_once()
    patch.setattr(loop.Run, '_save', ends)
    assert train(workdir) == 130
  assert train(workdir) == 0
  assert left(workdir) == left(whole)


def test_a_dead_reward_ends_the_run_saved(whole, tmp_path, monkeypatch):
  workdir = tmp_path / 'run'
  monkeypatch.setattr(Writing, 'scored', lambda self, number: number in (0, 3))
  dead = 'no response had a score in 3 steps', 'up to step 7:', '--resume'
  with refused(*dead):
    train(workdir)
  assert newest(workdir)['step'] == 7
  monkeypatch.undo()
  assert train(workdir) == 0
  assert left(workdir) == left(whole)


@pytest.mark.parametrize('lost', [1, 2])
def test_records_that_end_before_the_newest_checkpoint(
  lost, whole, workdir, capsys
):
  """The run continues from the newest checkpoint that the records reach."""
  records = (workdir / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
  (workdir / 'metrics.jsonl').write_bytes(b''.join(records[:-lost]))
  if lost == 2:  # before every checkpoint that is kept
    with refused('ends at step 7, but the checkpoint'):
      train(workdir)
    return
  assert train(workdir) == 0
  said = ' '.join(capsys.readouterr().err.split())
  assert 'no record of step 9' in said and 'checkpoint 8, not 9' in said
  assert left(workdir) == left(whole)


def test_fields_that_may_change_on_request(workdir):
  config = boundaries_test.configuration(PROMPTS)
  config.optimizer.learning_rate /= 2
  resume = functools.partial(run.train, SCRIPT, config, workdir, resume=True)
  with refused('allow_change=optimizer.learning_rate'):
    resume()
  assert resume(allow_change=['optimizer.learning_rate']) == 0
  start = run_folder.read_starts(workdir)[-1]
  new = config.optimizer.learning_rate
  assert start['changed'] == {'optimizer.learning_rate': [2 * new, new]}
  assert start['step'] == 9
  with refused('optimizer.rate: the config'):
    resume(allow_change=['optimizer.rate'])


def test_a_save_that_fails_is_repeated(whole, tmp_path, monkeypatch, capsys):
  workdir, start, names = tmp_path / 'run', orbax_io.start_save, ['00000004']

  class Full:
    def result(self):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def start_save(path, *args):
    if path.name in names:
      names.remove(path.name)
      return Full()
    return start(path, *args)

  monkeypatch.setattr(orbax_io, 'start_save', start_save)
  monkeypatch.setattr(checkpoints, '_AFTERMATH', 0.0)
  assert train(workdir) == 0
  assert 'the state is saved again' in capsys.readouterr().err
  assert left(workdir) == left(whole)


def test_a_resume_that_is_refused_leaves_the_configuration(workdir, tmp_path):
  kept = shutil.move(workdir / 'checkpoints', tmp_path / 'kept')
  files = [workdir / name for name in ('config.json', 'starts.jsonl')]
  before = [file.read_bytes() for file in files]
  with refused('checkpoints is missing'):
    train(workdir, every=3)
  assert [file.read_bytes() for file in files] == before
  shutil.move(kept, workdir / 'checkpoints')
  (workdir / 'samples.jsonl').unlink()  # Nothing is computed from it.
  assert train(workdir, every=3) == 0
  stored = json.loads((workdir / 'config.json').read_text())
  assert stored['checkpoints']['every'] == 3
