"""A run of two processes: one owns the folder, a signal to one stops both."""

import pathlib
import re
import signal

import peers
import pytest
import scripts


def start(workdir, *arguments, count=2, devices=1):
  """Processes, of so many devices each, that train in one folder."""
  workdir = pathlib.Path(workdir)
  config = workdir.parent / 'config/config.py'
  if not config.exists():
    scripts.write_config(config.parent)
  address = peers.free_address()
  return [
    scripts.Script(
      'train',
      f'--config={config}',
      f'--workdir={workdir}',
      f'--coordinator={address}',
      f'--num_processes={count}',
      f'--process_id={index}',
      *arguments,
      cache=scripts.cache(),
      devices=devices,
    )
    for index in range(count)
  ]


def assert_like_one_process(workdir):
  """The records are the first ones of the run that one process makes."""
  found, whole = (scripts.records(x) for x in (workdir, scripts.undisturbed()))
  for number, (one, other) in enumerate(zip(whole, found, strict=False), 1):
    missing = one.keys() ^ other.keys()
    # The stop may come in an evaluation, which a resumed run repeats.
    last = number == len(found) and one.keys() > other.keys()
    assert not missing or last and all(x.startswith('eval/') for x in missing)
    for name in one.keys() - missing:
      value = one[name]
      assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
  return len(found)


def quiet(ended):
  """A process that says nothing of its own: gloo writes to standard output."""
  return ended.err == '' and not re.search('error|step|SIG', ended.out)


def test_a_signal_to_one_saves_both(tmp_path):
  workdir = tmp_path / 'run'
  processes = start(workdir)
  scripts.wait_until(lambda: scripts.steps_written(workdir) >= 3, processes[0])
  second = [process.wait(60) for process in start(workdir, '--resume')]
  assert [ended.code for ended in second] == [2, 2]
  said = [ended.err for ended in second if ended.err]
  assert len(said) == 1 and 'is in use by another run' in said[0]
  processes[1].signal(signal.SIGTERM)
  first, other = (process.wait(60) for process in processes)
  assert first.code == other.code == 128 + signal.SIGTERM
  assert 'stopped by SIGTERM after step' in first.err and quiet(other)
  count = assert_like_one_process(workdir)
  saved = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
  assert saved[-1] == f'{count:08d}'


@pytest.mark.slow
@pytest.mark.parametrize('count, devices', [(2, 4), (4, 2)])
def test_eight_devices_of_several_processes(tmp_path, count, devices):
  workdir = tmp_path / 'run'
  mesh = '--config.mesh.data=2', '--config.mesh.fsdp=4'
  processes = start(workdir, *mesh, count=count, devices=devices)
  first, *others = (process.wait() for process in processes)
  assert first.code == 0, first.err
  for other in others:
    assert other.code == 0 and quiet(other), other
  assert assert_like_one_process(workdir) == scripts.TOTAL


@pytest.mark.slow
def test_a_killed_run_resumes_to_its_end(tmp_path):
  workdir = tmp_path / 'run'
  processes = start(workdir)
  scripts.wait_until(lambda: scripts.steps_written(workdir) >= 12, processes[0])
  processes[1].signal(signal.SIGKILL)
  survivor = processes[0].wait(30)
  processes[1].wait()
  assert survivor.code == 1
  assert 'error: process 1 of 2 was lost' in survivor.err
  first, other = (process.wait() for process in start(workdir, '--resume'))
  assert first.code == other.code == 0, (first, other)
  assert quiet(other)
  assert assert_like_one_process(workdir) == scripts.TOTAL
  assert (workdir / 'hf/model.safetensors').exists()
