"""Runs that are killed, stopped or copied while they run.

Their output equals an undisturbed run's bit for bit: losses, rewards and a hash
of the tokens of every step, samples, the exported model.
"""

import contextlib
import os
import re
import shutil
import signal
import threading
import time

import faults
import pytest
import scripts

KILL, TERM = signal.SIGKILL, signal.SIGTERM
TREPO = scripts.CONFIG.replace(
  "dict(name='grpo', kl=0.04)",
  repr(dict(name='trepo', kl=0.04, count=2, samples=2)),
)

# 200 steps of RL, a checkpoint every 5, and 20 kills: (phase, records that are
# written before).  The first three find nothing compiled.
STEPS = 200
KILLS = [
  *(('compile', 0), ('warm start', 3), ('compile', scripts.WARM)),
  *(('branches', 17), ('reward', 29), ('update', 36), ('save', 48)),
  *(('rollout', 57), ('evaluation', 67), ('branches', 77), ('reward', 88)),
  *(('save', 97), ('update', 109), ('rollout', 119), ('save', 131)),
  *(('reward', 144), ('update', 157), ('branches', 171), ('evaluation', 187)),
  ('export', scripts.WARM + STEPS),
]


def finish(workdir, config, **options) -> None:
  ended = scripts.train(workdir, config, **options).wait()
  assert ended.code == 0, ended.err


def interruptions_leave_the_same(plan, folder, text=scripts.CONFIG) -> None:
  """Kills and stops a tiny run, and compares its output at the end."""
  workdir, whole = folder / 'run', None
  config = scripts.write_config(folder / 'config', text)
  ends = faults.interrupt(plan, workdir, config)
  for (number, _, _), ended in zip(plan, ends, strict=True):
    if number == KILL:
      assert ended.code == -KILL, ended
    else:
      stopped(ended)
  finish(workdir, config)
  if text != scripts.CONFIG:
    whole = folder / 'whole'
    finish(whole, config)
  scripts.assert_same_run(workdir, whole)


def stopped(ended) -> None:
  """Asserts an orderly stop, with a checkpoint of the last step."""
  assert ended.code == 128 + TERM, ended
  assert ended.seconds < 30
  assert 'Traceback' not in ended.err
  (step,) = re.findall(r'stopped by SIGTERM after step (\d+);', ended.err)
  assert int(step) == ended.records
  # A run that has done nothing saves nothing.
  assert ended.newest == (f'{int(step):08d}' if int(step) else '')


def test_five_kills_and_a_stop_leave_the_same_records(tmp_path):
  """Only a few: each start compiles again."""
  plan = [
    (KILL, 'compile', 0),
    (KILL, 'save', 4),
    (KILL, 'rollout', scripts.WARM + 1),
    (TERM, 'evaluation', scripts.WARM + 1),
    (KILL, 'reward', scripts.WARM + 5),
    (KILL, 'update', scripts.WARM + 7),
  ]
  interruptions_leave_the_same(plan, tmp_path)


@pytest.mark.slow
def test_twenty_kills_in_two_hundred_steps(tmp_path):
  """With XLA's optimisations, which the other tests do without."""
  text = TREPO.replace(
    '  return config\n',
    f'  config.steps = {STEPS}\n  config.evaluation.every = 20\n'
    '  return config\n',
  )
  reward = scripts.REWARD.replace('sleep(0.03)', 'sleep(0.003)')
  config = scripts.write_config(tmp_path / 'config', text, reward)
  workdir, whole = tmp_path / 'run', tmp_path / 'whole'
  # Compiled once for both, in the runs that are killed.
  shared = dict(compiled=tmp_path / 'cache', before=scripts.optimize)
  plan = [(KILL, *moment) for moment in KILLS]
  ends = faults.interrupt(plan, workdir, config, **shared)
  assert [ended.code for ended in ends] == [-KILL] * 20
  finish(workdir, config, **shared)
  finish(whole, config, **shared)
  scripts.assert_same_run(workdir, whole)
  records = scripts.records(workdir)[scripts.WARM :]
  assert len(records) == STEPS
  # Equal bits mean nothing if the numbers do not move.
  for name in ('completions/hash', 'loss', 'kl'):
    assert len({record[name] for record in records}) > 0.9 * STEPS, name
  forked = [record for record in records if record['branches/forks']]
  assert len(forked) > 0.9 * STEPS


LAST = scripts.TOTAL - 1
# Between the last record, the last checkpoint and hf/.
AT_THE_END = [
  *(('record', LAST), ('save', LAST), ('save', scripts.TOTAL)),
  *[('export', scripts.TOTAL)] * 3,
]
IN_EVERY_PHASE = [
  *(('model', 0), ('compile', 0), ('warm start', 3)),
  *(('rollout', scripts.WARM + 1), ('branches', scripts.WARM + 1)),
  *(('reward', scripts.WARM + 3), ('update', scripts.WARM + 6)),
  *(('branches', scripts.WARM + 7), ('evaluation', scripts.WARM + 9)),
  ('record', scripts.WARM + 11),
  *(('save', scripts.WARM + 12), ('save', scripts.TOTAL)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  'number, moments, text',
  [(KILL, AT_THE_END, scripts.CONFIG), (TERM, IN_EVERY_PHASE, TREPO)],
)
def test_interruptions_leave_the_same_records(number, moments, text, tmp_path):
  plan = [(number, *each) for each in moments]
  interruptions_leave_the_same(plan, tmp_path, text)


@pytest.mark.slow
def test_a_stop_in_the_export_lets_it_end(tmp_path):
  """Everything is saved before, and the rest is short."""
  workdir = tmp_path / 'run'
  config = scripts.write_config(tmp_path / 'config')
  plan = [(TERM, 'export', scripts.TOTAL)]
  (ended,) = faults.interrupt(plan, workdir, config)
  assert ended.code == 0 and ended.seconds < 30, ended
  scripts.assert_same_run(workdir)


def copy_slowly(source, target, files_first) -> None:
  """Copies file by file; what vanishes meanwhile is skipped."""
  target.mkdir()
  names = []
  with contextlib.suppress(FileNotFoundError):
    names = sorted(os.listdir(source))
  if files_first:
    names.sort(key=lambda name: (source / name).is_dir())
  for name in names:
    if (source / name).is_dir():
      copy_slowly(source / name, target / name, files_first)
      continue
    with contextlib.suppress(FileNotFoundError):
      shutil.copyfile(source / name, target / name)
    time.sleep(0.03)


@pytest.mark.slow
def test_copies_of_a_running_folder_resume_the_same(tmp_path):
  """Each takes a few steps, fewer than the two latest checkpoints last.

  Half copy files before folders, as rsync does: their checkpoints may be newer
  than their records.
  """
  slower = scripts.REWARD.replace('sleep(0.03)', 'sleep(0.2)')
  config = scripts.write_config(tmp_path / 'config', reward=slower)
  workdir, copies = tmp_path / 'run', []
  script = scripts.train(workdir, config)
  for number in range(10):
    due = 2 + number * (scripts.TOTAL - 3) // 10
    scripts.wait_until(
      lambda due=due: scripts.steps_written(workdir) >= due, script
    )
    given = workdir, tmp_path / f'copy{number}', number % 2 == 0
    copies.append(threading.Thread(target=copy_slowly, args=given))
    copies[-1].start()
  assert script.wait().code == 0
  for copy in copies:
    copy.join()
  scripts.assert_same_run(workdir)
  scripts.write_config(tmp_path / 'config')
  for number in range(10):
    finish(tmp_path / f'copy{number}', config)
    scripts.assert_same_run(tmp_path / f'copy{number}')
