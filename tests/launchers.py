"""Programs that stand for gcloud, Slurm, kubectl and xpk, with two machines.

Each is a name on the PATH, made by `install`, that does what the launch scripts
ask of it with two local processes, in the environment that the real one gives
them.  Its calls are written to the folder's calls.jsonl.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

MACHINES = 2
NAMES = ('gcloud', 'sbatch', 'srun', 'scancel', 'scontrol', 'kubectl', 'xpk')


def install(folder) -> dict[str, str]:
  """Writes the programs; returns the environment in which they are found."""
  programs = pathlib.Path(folder) / 'bin'
  programs.mkdir()
  for name in NAMES:
    path = programs / name
    path.write_text(f'#!{sys.executable}\n{START.format(__file__, name)}')
    path.chmod(0o755)
  return {
    **os.environ,
    'PATH': f'{programs}:{pathlib.Path(sys.executable).parent}'
    f':{os.environ["PATH"]}',
    'FAKE_FOLDER': str(folder),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COORDINATOR_PORT': str(free_port()),
  }


START = """
import runpy
runpy.run_path({!r})['main']({!r})
"""


def free_port() -> int:
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    return server.getsockname()[1]


def calls(folder) -> list[list[str]]:
  """What the programs were called with, in order."""
  path = pathlib.Path(folder) / 'calls.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def main(name: str) -> None:
  folder = pathlib.Path(os.environ['FAKE_FOLDER'])
  with open(folder / 'calls.jsonl', 'a') as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + '\n')
  sys.exit(globals()[name](folder, sys.argv[1:]))


def together(folder, commands, environments) -> int:
  """Runs one process per machine; the highest status.

  Their numbers lie in `pids` as long as they run, for `terminate`.
  """
  running = [
    subprocess.Popen(command, env={**os.environ, **environment})
    for command, environment in zip(commands, environments, strict=True)
  ]
  (folder / 'pids').write_text(json.dumps([each.pid for each in running]))
  return max(each.wait() % 256 for each in running)


def terminate(folder) -> None:
  for pid in json.loads((folder / 'pids').read_text()):
    os.kill(pid, signal.SIGTERM)


def flags(arguments) -> dict[str, str]:
  pairs = (a[2:].split('=', 1) for a in arguments if a.startswith('--'))
  return {pair[0]: pair[1] if pair[1:] else '' for pair in pairs}


def as_tpu_worker(index: int) -> dict[str, str]:
  """Of a slice; JAX then believes that it is on a TPU VM."""
  return {
    'JAX_FORCE_TPU_INIT': '1',
    'TPU_WORKER_ID': str(index),
    'TPU_WORKER_HOSTNAMES': ','.join(['localhost'] * MACHINES),
    # As for several slices, so that JAX asks no metadata server.
    'MEGASCALE_COORDINATOR_ADDRESS': 'localhost',
    'MEGASCALE_NUM_SLICES': '1',
    'MEGASCALE_SLICE_ID': '0',
  }


def gcloud(folder, arguments) -> int:
  assert arguments[:3] == ['compute', 'tpus', 'tpu-vm'], arguments
  verb, given = arguments[3], flags(arguments)
  words = [a for a in arguments[4:] if not a.startswith('--')]
  homes = [folder / f'worker_{i}' for i in range(MACHINES)]
  assert given['zone'], arguments
  if verb == 'describe':
    return int(not homes[0].exists())
  if verb == 'create':
    for home in homes:
      home.mkdir()
    return 0
  if verb == 'delete':
    for home in homes:
      shutil.rmtree(home)
    return 0
  if verb == 'scp':
    return _copy(words, homes, given)
  assert verb == 'ssh' and given['worker'] == 'all', arguments
  return together(
    folder,
    [['bash', '-c', given['command']]] * MACHINES,
    [{'HOME': str(home), **as_tpu_worker(i)} for i, home in enumerate(homes)],
  )


def _copy(words, homes, given) -> int:
  source, _, path = words[0].rpartition(':')
  if source:
    assert given['worker'] == '0' and 'recurse' in given
    shutil.copytree(homes[0] / path, words[1])
  else:
    assert given['worker'] == 'all'
    for home in homes:
      shutil.copy(words[0], home / words[1].partition(':')[2])
  return 0


def sbatch(folder, arguments) -> int:
  """Runs the script at once, and waits for it as no sbatch does."""
  del folder
  first = next(i for i, a in enumerate(arguments) if not a.startswith('--'))
  os.environ.update(SLURM_JOB_ID='77', SLURM_NTASKS=str(MACHINES))
  os.execvp('bash', ['bash', *arguments[first:]])


def srun(folder, arguments) -> int:
  while arguments[0].startswith('--'):
    arguments = arguments[1:]
  step = {
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_STEP_NUM_TASKS': str(MACHINES),
    'SLURM_STEP_TASKS_PER_NODE': f'1(x{MACHINES})',
    'SLURM_LOCALID': '0',
  }
  return together(
    folder,
    [arguments] * MACHINES,
    [{'SLURM_PROCID': str(i), **step} for i in range(MACHINES)],
  )


def scancel(folder, arguments) -> int:
  assert arguments == ['--signal=TERM', '77']
  terminate(folder)
  return 0


def scontrol(folder, arguments) -> int:
  del folder
  assert arguments == ['requeue', '77']
  return 0


def _start_job(folder, commands, environments) -> int:
  """Runs in the background; `job` says how it stands."""
  (folder / 'job').write_text('Running')
  if os.fork():
    return 0
  os.setsid()
  log = os.open(folder / 'log', os.O_WRONLY | os.O_CREAT)
  os.dup2(log, 1)
  os.dup2(log, 2)
  status = together(folder, commands, environments)
  (folder / 'job').write_text('Failed' if status else 'Complete')
  os._exit(0)


def _end_job(folder) -> int:
  terminate(folder)
  while (folder / 'job').read_text() == 'Running':
    time.sleep(0.02)
  (folder / 'job').unlink()
  return 0


def kubectl(folder, arguments) -> int:
  job = folder / 'job'
  if arguments == ['apply', '-f', '-']:
    return _apply(folder)
  if arguments[:2] == ['get', 'job']:
    print(f'found {job.read_text()}' if job.exists() else '', end='')
    return 0
  if arguments[:2] == ['delete', 'job']:
    return _end_job(folder)
  assert arguments[0] == 'logs', arguments
  print((folder / 'log').read_text())
  return 0


def _apply(folder) -> int:
  import yaml

  service, job = yaml.safe_load_all(sys.stdin)
  name = service['metadata']['name']
  assert service['spec']['selector'] == {'job-name': job['metadata']['name']}
  spec, pod = job['spec'], job['spec']['template']['spec']
  assert spec['parallelism'] == spec['completions'] == MACHINES
  assert spec['completionMode'] == 'Indexed' and pod['subdomain'] == name
  (container,) = pod['containers']
  # What the cluster's DNS does.
  first, here = f'{name}-0.{name}:8476', f'127.0.0.1:{free_port()}'
  command = container['command'] + container['args']
  assert any(first in word for word in command)
  command = [word.replace(first, here) for word in command]
  return _start_job(
    folder,
    [command] * MACHINES,
    [{'JOB_COMPLETION_INDEX': str(i)} for i in range(MACHINES)],
  )


def xpk(folder, arguments) -> int:
  given = flags(arguments)
  assert given['cluster'] and given['zone'], arguments
  if arguments[:2] == ['workload', 'create']:
    return _start_job(
      folder,
      [['bash', '-c', given['command']]] * MACHINES,
      [as_tpu_worker(i) for i in range(MACHINES)],
    )
  if arguments[:2] == ['workload', 'delete']:
    return _end_job(folder)
  assert arguments[:2] == ['workload', 'list'], arguments
  job = folder / 'job'
  while job.exists() and job.read_text() == 'Running':
    time.sleep(0.02)
  return 0 if job.exists() and job.read_text() == 'Complete' else 125
