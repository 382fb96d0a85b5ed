"""Parts that a run's folder lacks: named, and the step before restored.

`checkpoints_failures_test` damages every file of a checkpoint.
"""

import logging
import pathlib
import re
import shutil

import pytest
import scripts

from experiments import run, stored_runs, train
from jaxrl_llm.errors import UserError

NEWEST, BEFORE = scripts.TOTAL, scripts.TOTAL - scripts.EVERY
STEP = pathlib.Path('checkpoints') / f'{NEWEST:08d}'
REFERENCE = f'reference/{scripts.WARM:08d}'


@pytest.fixture
def workdir(tmp_path):
  """A copy of a run that has ended."""
  return shutil.copytree(scripts.undisturbed(), tmp_path / 'run')


@pytest.fixture(scope='module')
def resume():
  """Resumes a run up to its first step; returns that step's number."""
  reached = []
  config = stored_runs.read_config(scripts.undisturbed())

  def resume(workdir) -> int:
    assert train.train(config, workdir, resume=True) == 0
    return reached.pop().schedule.step

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run.Run, 'train', lambda self: reached.append(self))
    patch.setattr(run.Run, 'finish', lambda self: None)
    yield resume


def contents(workdir) -> dict:
  """Returns the content of the files that hold results."""
  return {
    path: path.read_bytes()
    for path in workdir.rglob('*')
    if path.is_file() and path.name not in ('lock', 'starts.jsonl')
  }


def remove(path) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip(folder) -> None:
  path = max(folder.rglob('d/*'), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 16
  path.write_bytes(content)


@pytest.mark.parametrize(
  'damage, item, text',
  [
    (remove, 'config.json', 'config.json'),
    (remove, 'metrics.jsonl', 'metrics.jsonl'),
    (remove, 'checkpoints', 'checkpoints'),
    (remove, 'reference', 'reference'),
    (remove, f'{REFERENCE}/state', 'reference.*\n.*state'),
    (remove, f'{REFERENCE}/manifest', 'reference.*\n.*manifest'),
    # There is no other, and the KL would be another model's.
    (flip, f'{REFERENCE}/state', 'reference'),
  ],
)
def test_what_a_run_lacks_is_named(damage, item, text, resume, workdir):
  damage(workdir / item)
  before = contents(workdir)
  with pytest.raises(UserError, match=text) as error:
    resume(workdir)
  assert len(str(error.value).splitlines()) <= 3
  assert contents(workdir) == before


@pytest.mark.parametrize(
  'item, text',
  [
    ('state', 'its state: .*state'),
    ('manifest', 'its manifest: .*manifest'),
    ('state/ocdbt.process_0', 'its state: '),
    ('state/_METADATA', 'its state: .*_METADATA'),
  ],
)
def test_what_a_checkpoint_lacks_is_named(item, text, resume, workdir, caplog):
  remove(workdir / STEP / item)
  with caplog.at_level(logging.WARNING):
    assert resume(workdir) == BEFORE
  (said,) = [x.getMessage() for x in caplog.records if 'jaxrl' in x.name]
  assert f'step {NEWEST} does not verify' in said
  assert f'using step {BEFORE}' in said
  assert re.search(text, said), said
