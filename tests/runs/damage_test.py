"""Damage to a run's folder: found, named, and the step before restored."""

import hashlib
import logging
import pathlib
import random
import re
import shutil

import numpy as np
import pytest
import scripts

from experiments import run, stored_runs, train
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.runs.digests import named_leaves

NEWEST, BEFORE = scripts.TOTAL, scripts.TOTAL - scripts.EVERY
STEP = pathlib.Path('checkpoints') / f'{NEWEST:08d}'
REFERENCE = f'reference/{scripts.WARM:08d}'


@pytest.fixture
def workdir(tmp_path):
  """A copy of a run that has ended."""
  return shutil.copytree(scripts.undisturbed(), tmp_path / 'run')


@pytest.fixture(scope='module')
def resume():
  """Resumes a run up to where it would go on; gives the step."""
  reached = []
  config = stored_runs.read_config(scripts.undisturbed())

  def resume(workdir) -> int:
    assert train.train(config, workdir, resume=True) == 0
    return reached.pop().schedule.step

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run.Run, 'train', lambda self: reached.append(self))
    patch.setattr(run.Run, 'finish', lambda self: None)
    yield resume


@pytest.fixture(scope='module')
def restored(resume, tmp_path_factory):
  """Restores a folder as the run does; gives the step, the arrays checked."""
  whole = tmp_path_factory.mktemp('whole') / 'run'
  shutil.copytree(scripts.undisturbed(), whole)
  restore, asked = Checkpoints.restore, []

  def asking(self, template, *args):
    asked.append(template)
    return restore(self, template, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, 'restore', asking)
    assert resume(whole) == NEWEST
  template = asked[0]  # the reference's comes after it
  with Checkpoints(whole / 'checkpoints') as checkpoints:
    right = {
      step: hashes(checkpoints.restore(template, step)[1])
      for step in (BEFORE, NEWEST)
    }
  assert right[BEFORE] != right[NEWEST]

  def restored(folder) -> int:
    with Checkpoints(folder / 'checkpoints') as checkpoints:
      step, tree, _ = checkpoints.restore(template)
    assert hashes(tree) == right[step]
    return step

  return restored


def hashes(tree) -> dict[str, str]:
  """The sha256 of each leaf's bytes."""
  return {
    name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
    for name, leaf in named_leaves(tree).items()
  }


def files_of(workdir) -> list:
  """All files of the newest checkpoint that hold something."""
  files = [path for path in (workdir / STEP).rglob('*') if path.is_file()]
  return sorted(path for path in files if path.stat().st_size)


def is_read(path) -> bool:
  """Whether a restore has to read a file of a checkpoint."""
  if path.suffix == '.ocdbt':
    return path.parent.name == 'state'
  return path.parent.name in ('d', 'manifest')


def damage(path, kind: str, rng) -> None:
  content = bytearray(path.read_bytes())
  if kind == 'delete':
    path.unlink()
  elif kind.startswith('flip'):
    # The last fifth of what a process has written is an index of its own, of
    # which nothing is read once those of all processes are merged.
    skipped = kind == 'flip' and 'ocdbt.process_0' in path.parts
    bit = rng.randrange(8 * len(content) * (3 if skipped else 4) // 4)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
  else:
    keep = {'empty': 0, 'truncate': len(content) // 2}[kind]
    path.write_bytes(content[:keep])


def outcomes(restored, workdir, files, kind: str) -> list[tuple]:
  """(file, step restored) for each of the files, spoilt alone."""
  rng, found = random.Random(0), []
  for path in files:
    bad = workdir.with_name('bad')
    shutil.copytree(workdir / 'checkpoints', bad / 'checkpoints')
    damage(bad / path.relative_to(workdir), kind, rng)
    found.append((path.relative_to(workdir / STEP), restored(bad)))
    shutil.rmtree(bad)
  return found


@pytest.mark.parametrize('count', [6, pytest.param(24, marks=pytest.mark.slow)])
def test_each_flipped_bit_of_the_arrays_is_found(count, restored, workdir):
  """Flips over the files that hold the arrays and where they are."""
  arrays = [path for path in files_of(workdir) if path.parent.name == 'd']
  found = outcomes(restored, workdir, arrays * (count // len(arrays)), 'flip')
  assert [step for _, step in found] == [BEFORE] * count, found


@pytest.mark.slow
@pytest.mark.parametrize(
  'kind', ['flip', 'flip anywhere', 'delete', 'empty', 'truncate']
)
def test_damage_is_never_silently_wrong(kind, restored, workdir, capsys):
  """To every file of a checkpoint; `restored` compares the arrays."""
  files = files_of(workdir) * (16 if kind.startswith('flip') else 1)
  found = outcomes(restored, workdir, files, kind)
  with capsys.disabled():
    for name in dict.fromkeys(name for name, _ in found):
      steps = [step for other, step in found if other == name]
      print(f'\n{kind} {name}: {steps.count(BEFORE)} of {len(steps)} found')
  missed = [n for n, step in found if is_read(STEP / n) and step == NEWEST]
  assert missed == [] or kind == 'flip anywhere'


def lines(error) -> list[str]:
  return str(error.value).splitlines()


@pytest.mark.parametrize(
  'item, text',
  [
    ('config.json', 'config.json'),
    ('metrics.jsonl', 'metrics.jsonl'),
    ('checkpoints', 'checkpoints'),
    ('reference', 'reference'),
    (f'{REFERENCE}/state', 'reference.*\n.*state'),
    (f'{REFERENCE}/manifest', 'reference.*\n.*manifest'),
  ],
)
def test_what_is_missing_of_a_run_is_named(item, text, resume, workdir):
  remove(workdir / item)
  before = contents(workdir)
  with pytest.raises(UserError, match=text) as error:
    resume(workdir)
  assert len(lines(error)) <= 3
  assert contents(workdir) == before


def test_a_flipped_bit_of_the_reference_is_named(resume, workdir):
  """There is no other: refused, for its KL would be of another model."""
  folder = workdir / REFERENCE / 'state'
  path = max(folder.rglob('d/*'), key=lambda path: path.stat().st_size)
  damage(path, 'flip', random.Random(0))
  before = contents(workdir)
  with pytest.raises(UserError, match='reference') as error:
    resume(workdir)
  assert len(lines(error)) <= 3
  assert contents(workdir) == before


def contents(workdir) -> dict:
  """Of the files that hold what was computed."""
  return {
    path: path.read_bytes()
    for path in workdir.rglob('*')
    if path.is_file() and path.name not in ('lock', 'starts.jsonl')
  }


def remove(path) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
  'item, text',
  [
    ('state', 'its state: .*state'),
    ('manifest', 'its manifest: .*manifest'),
    ('state/ocdbt.process_0', 'its state: '),
    ('state/manifest.ocdbt', 'its state: '),
    ('state/_METADATA', 'its state: .*_METADATA'),
    ('_CHECKPOINT_METADATA', 'its state: .*_CHECKPOINT_METADATA'),
  ],
)
def test_what_is_missing_of_a_checkpoint_is_named(
  item, text, resume, workdir, caplog
):
  remove(workdir / STEP / item)
  with caplog.at_level(logging.WARNING):
    assert resume(workdir) == BEFORE
  (said,) = [
    each.getMessage() for each in caplog.records if 'jaxrl' in each.name
  ]
  assert f'step {NEWEST} does not verify' in said
  assert f'using step {BEFORE}' in said
  assert re.search(text, said), said
