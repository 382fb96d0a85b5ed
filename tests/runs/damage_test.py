"""Parts that a run's folder lacks are named.

`checkpoints_failures_test` damages every file of a checkpoint.
"""

import shutil

import pytest
import scripts

from experiments import stored_runs, train
from jaxrl_llm.errors import UserError

REFERENCE = f'reference/{scripts.WARM:08d}'


@pytest.fixture(scope='module')
def config():
  return stored_runs.read_config(scripts.undisturbed())


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
def test_what_a_run_lacks_is_named(damage, item, text, config, workdir):
  damage(workdir / item)
  before = contents(workdir)
  with pytest.raises(UserError, match=text) as error:
    train.train(config, workdir, resume=True)
  assert len(str(error.value).splitlines()) <= 3
  assert contents(workdir) == before
