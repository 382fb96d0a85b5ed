"""Programs that stand for gcloud, Slurm, kubectl and xpk, with two machines."""

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
START = """#!{}
import runpy
runpy.run_path({!r})['main']({!r})
"""


def install(folder) -> dict[str, str]:
  """Writes the programs; returns the environment in which they are found."""
  programs = pathlib.Path(folder) / 'bin'
  programs.mkdir()
  for name in NAMES:
    (programs / name).write_text(START.format(sys.executable, __file__, name))
    (programs / name).chmod(0o755)
  path = [programs, pathlib.Path(sys.executable).parent, os.environ['PATH']]
  return {
    **os.environ,
    'PATH': ':'.join(map(str, path)),
    'FAKE_FOLDER': str(folder),
    'JAX_PLATFORMS': 'cpu',
    'JAX_COORDINATOR_PORT': str(free_port()),
  }


def free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def calls(folder) -> list[list[str]]:
  """What the programs were called with, in order."""
  path = pathlib.Path(folder) / 'calls.jsonl'
  return list(map(json.loads, open(path))) if path.exists() else []


def main(name: str) -> None:
  folder = pathlib.Path(os.environ['FAKE_FOLDER'])
  with open(folder / 'calls.jsonl', 'a') as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + '\n')
  sys.exit(globals()[name](folder, sys.argv[1:]))


def together(folder, command, variables) -> int:
  """Runs a process per machine, with `variables(index)`; the highest status."""
  environments = [{**os.environ, **variables(i)} for i in range(MACHINES)]
  running = [subprocess.Popen(command, env=each) for each in environments]
  (folder / 'pids').write_text(json.dumps([each.pid for each in running]))
  return max(each.wait() % 256 for each in running)


def terminate(folder) -> None:
  for pid in json.loads((folder / 'pids').read_text()):
    os.kill(pid, signal.SIGTERM)


def flags(arguments) -> dict[str, str]:
  parts = (a[2:].partition('=') for a in arguments if a.startswith('--'))
  return {name: value for name, _, value in parts}


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
  if verb in ('create', 'delete'):
    list(map(os.mkdir if verb == 'create' else shutil.rmtree, homes))
  elif verb == 'scp':
    source, _, path = words[0].rpartition(':')
    assert given['worker'] == ('0' if source else 'all')
    if source:
      shutil.copytree(homes[0] / path, words[1])
    else:
      for home in homes:
        shutil.copy(words[0], home / words[1].partition(':')[2])
  else:
    assert verb == 'ssh' and given['worker'] == 'all', arguments
    return together(
      folder,
      ['bash', '-c', given['command']],
      lambda i: {'HOME': str(homes[i]), **as_tpu_worker(i)},
    )
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
  return together(folder, arguments, lambda i: {'SLURM_PROCID': str(i), **step})


def scancel(folder, arguments) -> int:
  assert arguments == ['--signal=TERM', '77']
  return terminate(folder) or 0


def scontrol(folder, arguments) -> int:
  del folder
  return int(arguments != ['requeue', '77'])


def _start_job(folder, command, variables) -> int:
  """Runs in the background; `job` says how it stands."""
  (folder / 'job').write_text('Running')
  if os.fork():
    return 0
  os.setsid()
  log = os.open(folder / 'log', os.O_WRONLY | os.O_CREAT)
  os.dup2(log, 1)
  os.dup2(log, 2)
  status = together(folder, command, variables)
  (folder / 'job').write_text('Failed' if status else 'Complete')
  os._exit(0)


def _job(folder) -> str:
  """Waits for the end of the job; '' if there is none."""
  job = folder / 'job'
  while job.exists() and job.read_text() == 'Running':
    time.sleep(0.02)
  return job.read_text() if job.exists() else ''


def _end_job(folder) -> int:
  terminate(folder)
  _job(folder)
  (folder / 'job').unlink()
  return 0


def kubectl(folder, arguments) -> int:
  job = folder / 'job'
  if arguments == ['apply', '-f', '-']:
    return _apply(folder)
  if arguments[:2] == ['delete', 'job']:
    return _end_job(folder)
  if arguments[:2] == ['get', 'job']:
    print(f'found {job.read_text()}' if job.exists() else '', end='')
  else:
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
  return _start_job(folder, command, lambda i: {'JOB_COMPLETION_INDEX': str(i)})


def xpk(folder, arguments) -> int:
  given = flags(arguments)
  assert given['cluster'] and given['zone'], arguments
  if arguments[:2] == ['workload', 'create']:
    command = ['bash', '-c', given['command']]
    return _start_job(folder, command, as_tpu_worker)
  if arguments[:2] == ['workload', 'delete']:
    return _end_job(folder)
  assert arguments[:2] == ['workload', 'list'], arguments
  return 0 if _job(folder) == 'Complete' else 125
