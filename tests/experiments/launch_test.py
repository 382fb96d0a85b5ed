"""The launch scripts on two local processes, by programs that stand for clouds.

What gcloud, Slurm, Kubernetes and xpk really do is not tested here.
"""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import launchers
import pytest
from selection import mostly_slow

SCRIPTS = pathlib.Path(__file__).parents[2] / 'experiments' / 'launch'
VARIABLES = dict(
  NAME='run',
  ZONE='zone',
  TYPE='v5litepod-8',
  VERSION='v2',
  CLUSTER='cluster',
  IMAGE='image',
  NODES='2',
  GPUS='8',
  CLAIM='runs',
  POLL='0.1',
  INSTALL='true',
  SETUP='touch ready',
)
LAUNCHERS = {
  'tpu_pod': ['bash', 'tpu_pod.sh', 'run'],
  'slurm': ['sbatch', '--nodes=2', 'slurm.sh'],
  'kubernetes': ['bash', 'kubernetes.sh'],
  'xpk': ['bash', 'xpk.sh'],
}
PROGRAM = """
import sys
from jaxrl_llm import processes
flags = dict(flag[2:].split('=') for flag in sys.argv[2:])
number = lambda name: int(flags[name]) if name in flags else None
processes.initialize(
  flags.get('coordinator'), number('num_processes'), number('process_id')
)
rank = processes.index()
with open(f'{sys.argv[1]}/{rank}', 'w') as file:
  print(processes.count(), *processes.gather_objects(rank), file=file)
processes.finish()
"""


class Cloud:
  """A folder with the stand-ins and a repository with the scripts."""

  def __init__(self, folder):
    self.folder = folder
    self.environment = {
      **launchers.install(folder),
      **VARIABLES,
      'PYTHONPATH': str(SCRIPTS.parents[1]),
    }
    self.repository = folder / 'repository'
    scripts = self.repository / 'experiments' / 'launch'
    shutil.copytree(SCRIPTS, scripts)
    for words in (
      ['init', '-q'],
      ['add', '.'],
      ['-c', 'user.name=a', '-c', 'user.email=a', 'commit', '-qm', 'a'],
    ):
      subprocess.run(['git', *words], cwd=self.repository, check=True)
    self.scripts = scripts

  def run(self, *command, **settings):
    return subprocess.run(
      command,
      cwd=self.scripts,
      env=self.environment,
      timeout=120,
      text=True,
      capture_output=True,
      **settings,
    )

  def prepare(self, launcher):
    if launcher == 'tpu_pod':
      done = self.run('bash', 'tpu_pod.sh', 'up')
      assert done.returncode == 0, done.stderr

  def start(self, launcher, *command):
    self.prepare(launcher)
    return subprocess.Popen(
      [*LAUNCHERS[launcher], *command],
      cwd=self.scripts,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )


@pytest.fixture
def cloud(tmp_path, marked):
  """`marked` ends what a failed test leaves running."""
  del marked
  return Cloud(tmp_path)


@pytest.fixture(scope='module')
def shellcheck():
  found = shutil.which('shellcheck')
  if found is None:
    pytest.skip('needs shellcheck')
  return found


def test_shellcheck_is_content(shellcheck):
  scripts = sorted(map(str, SCRIPTS.glob('*.sh')))
  assert len(scripts) == 5
  done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('launcher', mostly_slow(LAUNCHERS, 'slurm'))
def test_two_processes_find_each_other(cloud, launcher):
  out = cloud.folder / 'out'
  out.mkdir()
  ended = cloud.start(launcher, sys.executable, '-c', PROGRAM, str(out))
  said, _ = ended.communicate(timeout=120)
  assert ended.returncode == 0, said
  written = {path.name: path.read_text() for path in out.iterdir()}
  assert written == {'0': '2 0 1\n', '1': '2 0 1\n'}


@pytest.mark.parametrize(
  'launcher, status',
  [('tpu_pod', 3), ('slurm', 3), ('kubernetes', 1), ('xpk', 125)],
)
def test_one_failure_fails_all(cloud, launcher, status):
  """Arguments come whole, with spaces and quotes."""
  program = """
    [ "$1" = "a 'b\\" \\$c" ] || exit 9
    mkdir "$2" 2>/dev/null || exit 3
  """
  second = str(cloud.folder / 'first')
  ended = cloud.start(launcher, 'bash', '-c', program, '_', 'a \'b" $c', second)
  said, _ = ended.communicate(timeout=60)
  assert ended.returncode == status, said


WAITS = """
trap 'sleep 0.3; mkdir -p "$1/saved_$$"; exit 143' TERM
mkdir -p "$1/ready_$$"
while true; do sleep 0.05; done
"""


def wait_for(folder, pattern):
  end = time.monotonic() + 60
  while len(list(folder.glob(pattern))) < 2:
    assert time.monotonic() < end, f'no two {pattern}'
    time.sleep(0.02)


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_sigterm_reaches_the_processes(cloud, launcher):
  """And is waited for until they have saved."""
  ended = cloud.start(launcher, 'bash', '-c', WAITS, '_', str(cloud.folder))
  wait_for(cloud.folder, 'ready_*')
  ended.send_signal(signal.SIGTERM)
  said, _ = ended.communicate(timeout=60)
  assert ended.returncode == 143, said
  assert len(list(cloud.folder.glob('saved_*'))) == 2
  assert ['scontrol', 'requeue', '77'] not in launchers.calls(cloud.folder)


def test_slurm_goes_back_into_the_queue_at_the_time_limit(cloud):
  ended = cloud.start('slurm', 'bash', '-c', WAITS, '_', str(cloud.folder))
  wait_for(cloud.folder, 'ready_*')
  ended.send_signal(signal.SIGUSR1)
  said, _ = ended.communicate(timeout=60)
  assert ended.returncode == 143, said
  assert launchers.calls(cloud.folder)[-1] == ['scontrol', 'requeue', '77']


def test_a_lost_connection_leaves_a_tpu_pod_running(cloud):
  ended = cloud.start('tpu_pod', 'bash', '-c', WAITS, '_', str(cloud.folder))
  wait_for(cloud.folder, 'ready_*')
  ended.kill()
  pod = lambda *words: cloud.run('bash', 'tpu_pod.sh', *words)
  again = pod('run', 'true')
  assert again.returncode == 2 and 'under way' in again.stderr
  assert pod('stop').returncode == 0
  assert pod('attach').returncode == 143
  assert len(list(cloud.folder.glob('saved_*'))) == 2
  # What worker 0 wrote comes back.
  where = cloud.folder / 'fetched'
  assert pod('fetch', '.jaxrl_llm', str(where)).returncode == 0
  assert (where / 'status').read_text() == '143\n'
  assert (cloud.folder / 'worker_1' / 'jaxrl_llm' / 'ready').exists()
  assert pod('down').returncode == 0
  assert not (cloud.folder / 'worker_0').exists()


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_without_a_command_they_say_how(cloud, launcher):
  done = cloud.run(*LAUNCHERS[launcher])
  assert done.returncode == 2 and 'COMMAND' in done.stderr.upper()
  kinds = {call[0] for call in launchers.calls(cloud.folder)} - {'sbatch'}
  assert not kinds, json.dumps(sorted(kinds))
