"""The launch scripts on two local processes, by programs that stand for clouds.

What gcloud, Slurm, Kubernetes and xpk really do is not tested here.
"""

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


WAITS = """
trap 'sleep 0.3; mkdir -p "$1/saved_$$"; exit 143' TERM
mkdir -p "$1/ready_$$"
while true; do sleep 0.05; done
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
    repository = folder / 'repository'
    self.scripts = repository / 'experiments' / 'launch'
    shutil.copytree(SCRIPTS, self.scripts)
    for words in (
      ['init', '-q'],
      ['add', '.'],
      ['-c', 'user.name=a', '-c', 'user.email=a', 'commit', '-qm', 'a'],
    ):
      subprocess.run(['git', *words], cwd=repository, check=True)

  def open(self, *command):
    return subprocess.Popen(
      command,
      cwd=self.scripts,
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def pod(self, *words):
    """Status and output of `tpu_pod.sh`."""
    process = self.open('bash', 'tpu_pod.sh', *words)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said

  def start(self, launcher, *command):
    if launcher == 'tpu_pod':
      status, said = self.pod('up')
      assert status == 0, said
    return self.open(*LAUNCHERS[launcher], *command)

  def start_waiting(self, launcher):
    """Two processes that run until they get SIGTERM, and then save."""
    process = self.start(launcher, 'bash', '-c', WAITS, '_', str(self.folder))
    end = time.monotonic() + 60
    while len(list(self.folder.glob('ready_*'))) < 2:
      assert time.monotonic() < end, 'they do not start'
      time.sleep(0.02)
    return process

  def saved(self):
    return len(list(self.folder.glob('saved_*')))


@pytest.fixture
def cloud(tmp_path, marked):
  """`marked` ends what a failed test leaves running."""
  del marked
  return Cloud(tmp_path)


def test_shellcheck_is_content():
  shellcheck = shutil.which('shellcheck')
  if shellcheck is None:
    pytest.skip('needs shellcheck')
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


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_sigterm_reaches_the_processes(cloud, launcher):
  """And is waited for until they have saved."""
  ended = cloud.start_waiting(launcher)
  ended.send_signal(signal.SIGTERM)
  said, _ = ended.communicate(timeout=60)
  assert ended.returncode == 143 and cloud.saved() == 2, said
  assert ['scontrol', 'requeue', '77'] not in launchers.calls(cloud.folder)


def test_slurm_goes_back_into_the_queue_at_the_time_limit(cloud):
  ended = cloud.start_waiting('slurm')
  ended.send_signal(signal.SIGUSR1)
  said, _ = ended.communicate(timeout=60)
  assert ended.returncode == 143, said
  assert launchers.calls(cloud.folder)[-1] == ['scontrol', 'requeue', '77']


def test_a_lost_connection_leaves_a_tpu_pod_running(cloud):
  cloud.start_waiting('tpu_pod').kill()
  status, said = cloud.pod('run', 'true')
  assert status == 2 and 'under way' in said
  assert cloud.pod('stop')[0] == 0
  assert cloud.pod('attach')[0] == 143 and cloud.saved() == 2
  # What worker 0 wrote comes back.
  where = cloud.folder / 'fetched'
  assert cloud.pod('fetch', '.jaxrl_llm', str(where))[0] == 0
  assert (where / 'status').read_text() == '143\n'
  assert (cloud.folder / 'worker_1' / 'jaxrl_llm' / 'ready').exists()
  assert cloud.pod('down')[0] == 0
  assert not (cloud.folder / 'worker_0').exists()
