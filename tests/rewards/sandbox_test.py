"""Hostile programs: none passes, none survives, none reaches anything."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import hostile
import mistakes
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import sandbox
from jaxrl_llm.rewards.sandbox import Isolation, Outcome

linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')

# With and without namespaces; the rest as this machine allows.
BOTH = pytest.mark.parametrize('namespaces', [True, False])

DATA = pathlib.Path(__file__).parents[3] / 'shared' / 'data'
RIGHT = 'def add(a, b):\n  return a + b\n'
WRONG = 'def add(a, b):\n  return a * b\n'
TESTS = ('assert add(2, 2) == 4', 'assert abs(add(2, 3) - 5) < 1e-6, "a sum"')


def run(program, tests=(), **settings):
  # Long enough for a loaded machine; what shall time out says so itself.
  return sandbox.run(program, tests, **dict(timeout=60.0) | settings)


def isolated(namespaces):
  found = sandbox.isolation()
  if namespaces and not found.namespaces:
    pytest.skip('this machine allows no namespaces (`unshare`)')
  return found if namespaces else found._replace(namespaces=False)


def needs(what):
  if what in sandbox.isolation().missing:
    pytest.skip(f'on this machine a program can {what}')


def test_each_test_has_its_verdict():
  assert run(RIGHT, TESTS) == (Outcome.PASSED, (True, True), '', '')
  result = run(WRONG, TESTS)
  assert result == (
    *(Outcome.FAILED, (True, False)),
    *('AssertionError: a sum', ''),
  )
  assert run(RIGHT) == (Outcome.PASSED, (), '', '')


def test_setup_runs_once_between_program_and_tests():
  result = run(
    'seen = []\nclass Node:\n  pass\n'
    'def see(x):\n  seen.append(x)\n  return [*seen]',
    ['assert see(2) == [1, node, 2]', 'assert see(3)[1] is node'],
    setup='node = Node(); see(1); see(node); print("set up")',
  )
  assert result == (Outcome.PASSED, (True, True), '', 'set up\n')
  assert run(RIGHT, TESTS, setup='1 / 0').passed == (False, False)


@pytest.mark.parametrize(
  'program, outcome, error',
  [
    ('def f(:', 'failed', 'SyntaxError: .*line 1'),
    ('x = "\ud800"', 'failed', 'UnicodeError|UnicodeEncodeError'),
    ('\0', 'failed', 'SyntaxError|ValueError'),
    ('raise KeyError("k\\nk")', 'failed', "KeyError: 'k"),
    ('raise ValueError("v" * 10**6)', 'failed', 'ValueError: v{280,300}$'),
    ('def f():\n  f()\nf()', 'failed', 'RecursionError'),
    ('input()', 'failed', 'EOFError'),
    ('import numpy', 'failed', 'ModuleNotFoundError'),
    ('open("f", "wb").write(bytes(2**25))', 'failed', 'OSError.*too large'),
    ('bytearray(4 * 2**30)', 'out_of_memory', 'MemoryError'),
    ('x = []\nwhile 1: x.append(bytes(10**6))', 'out_of_memory', 'MemoryErr'),
    ('import ctypes; ctypes.string_at(0)', 'crashed', 'signal 11'),
    ('import os; os.abort()', 'crashed', 'signal 6'),
    ('import os; os.kill(0, 9)', 'crashed', 'signal 9'),
    ('import os\nif os.fork(): os.abort()\nwhile 1: 0', 'crashed', 'signal 6'),
  ],
)
def test_how_programs_end(program, outcome, error):
  result = run(program, TESTS, memory=2**28)
  assert result.outcome.value == outcome
  assert re.search(error, result.error) and '\n' not in result.error
  assert result.passed == (False, False)


def test_a_program_may_kill_its_supervisor():
  """As the same user and without Landlock it can."""
  program = 'import os\nfor pid in os.getppid(), 0: os.kill(pid, 9)'
  result = run(program, TESTS, isolated=Isolation())
  assert result[:2] == (Outcome.CRASHED, (False, False))


@pytest.mark.parametrize(
  'program, namespaces',
  [
    ('while True: pass', True),
    ('while True:\n  try: time.sleep(9)\n  except BaseException: 0', True),
    ('def add(a, b):\n  10 ** 10 ** 10', True),
    ('os.fork()\nwhile True: pass', True),
    ('os.fork()\nwhile True: pass', False),
  ],
)
def test_time_is_limited(program, namespaces):
  start = time.monotonic()
  result = run(
    'import os, time\n' + program,
    TESTS,
    timeout=0.4,
    isolated=isolated(namespaces),
  )
  assert result[:2] == (Outcome.TIMED_OUT, (False, False))
  assert time.monotonic() - start < 20


def test_threads_that_never_end_do_not_matter():
  threads = 'import threading, time\nfor _ in range(3):\n  threading.Thread('
  threads += 'target=lambda: time.sleep(10**6)).start()\n'
  assert run(threads + RIGHT, TESTS).outcome is Outcome.PASSED
  assert run(threads + WRONG, TESTS).outcome is Outcome.FAILED


def test_output_is_bounded():
  flood = 'for i in range(80):\n  print("x" * 2**16)\n'
  result = run(flood + RIGHT, TESTS)
  assert result.outcome is Outcome.PASSED
  assert result.output == 'x' * 2**16
  both = run('import os\nprint("out", flush=True)\nos.write(2, b"err \\xff")')
  assert both.output == 'out\nerr \ufffd'


def test_the_directory_is_empty_and_removed():
  program = """
import os, shutil
assert os.listdir('.') == [] == os.listdir(os.environ['TMPDIR'])
print(os.getcwd(), end='')
os.mkdir('locked'); open('locked/file', 'w').close(); os.chmod('locked', 0)
open('gone', 'w').close(); os.remove('gone')
"""
  result = run(program)
  assert result.outcome is Outcome.PASSED
  assert 'sandbox-' in result.output
  assert not os.path.lexists(result.output)
  gone = run(
    'import os, shutil; print(os.getcwd(), end="")\nos.rmdir(os.getcwd())'
  )
  assert not os.path.lexists(gone.output)


@pytest.mark.slow
def test_a_directory_too_deep_for_recursion_is_removed():
  program = """
import os
print(os.getcwd(), end='')
for _ in range(1500):
  os.mkdir('deep'); os.chdir('deep')
"""
  result = run(program)
  assert result.outcome is Outcome.PASSED
  assert not os.path.lexists(result.output)


def test_environment_is_scrubbed(monkeypatch):
  monkeypatch.setenv('SECRET_TOKEN', 'hunter2')
  monkeypatch.setenv('PYTHONPATH', '/nowhere')
  result = run('import os, sys\nprint(dict(os.environ), sys.path, sys.argv)')
  assert "'HOME'" in result.output and 'hunter2' not in result.output
  assert '/nowhere' not in result.output
  assert str(pathlib.Path(sandbox.__file__).parent) not in result.output


@linux
@BOTH
def test_environment_of_other_processes_cannot_be_read(namespaces):
  needs('look into other processes')
  search = """
import glob
for path in glob.glob('/proc/[0-9]*/environ'):
  try: text = open(path, 'rb').read()
  except OSError: continue
  if b'SECRET_TOKEN=hunter2' in text: print('found')
"""
  victim = subprocess.Popen(
    [sys.executable, '-c', f'{search}\nprint(flush=True)\ninput()'],
    env={'SECRET_TOKEN': 'hunter2'},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  with victim:
    # It finds itself, so the search works.
    assert victim.stdout.readline() == b'found\n'
    result = run(search, isolated=isolated(namespaces))
    victim.stdin.close()
  assert result == (Outcome.PASSED, (), '', '')


def test_the_network_is_out_of_reach():
  needs('reach the network')
  found = sandbox.isolation()
  with socket.create_server(('127.0.0.1', 0)) as listener:
    listener.settimeout(10)
    address = listener.getsockname()
    connect = f'import socket; socket.create_connection({address}, 10)'
    # The listener does listen.
    subprocess.run([sys.executable, '-c', connect], check=True)
    listener.accept()[0].close()
    # The namespace alone, which hides more than TCP.
    result = run(connect, isolated=found._replace(landlock=0))
    assert result.outcome is Outcome.FAILED
    assert re.match(r'\w+Error: \[Errno', result.error)
    listener.settimeout(0)
    with pytest.raises(BlockingIOError):
      listener.accept()


@BOTH
def test_files_elsewhere_cannot_be_changed(tmp_path, namespaces):
  needs('change files of this user')
  path = tmp_path / 'mine'
  path.write_text('precious')
  program = f"""
import os, pathlib
path = pathlib.Path({str(path)!r})
for change in (
  lambda: path.write_text(''),
  lambda: os.truncate(path, 0),
  lambda: os.remove(path),
  lambda: os.rename(path, 'taken'),
  lambda: (path.parent / 'new').mkdir(),
  lambda: open('/tmp/sandbox_test_wrote_this', 'w'),
):
  try: change()
  except OSError: pass
  else: print('changed')
open('own', 'w').write('x'); os.rename('own', 'other')
"""
  result = run(program, isolated=isolated(namespaces))
  assert result == (Outcome.PASSED, (), '', '')
  assert path.read_text() == 'precious'
  assert os.listdir(tmp_path) == ['mine']


@BOTH
@pytest.mark.parametrize('who', ['program', 'tests'])
def test_files_elsewhere_cannot_be_read(tmp_path, namespaces, who):
  """A secret, the home folder and the data set, also as root."""
  needs('read files outside its directory')
  secret, public = tmp_path / '.ssh' / 'id', tmp_path / 'public'
  secret.parent.mkdir(mode=0o700)
  secret.write_text('hunter2')
  secret.chmod(0o600)
  public.write_text('hunter2')
  for folder in (tmp_path, *tmp_path.parents[:-2]):
    folder.chmod(folder.stat().st_mode | 0o055)
  home = pathlib.Path.home()
  closed = [secret, public, home, DATA, '/etc/passwd', '/proc/1/stat']
  closed += [DATA / 'mbpp' / 'mbpp.jsonl', '/', '/tmp']
  program = f"""
import os, random, secrets, ssl, sqlite3, zoneinfo
for path in {list(map(str, closed))}:
  try: print(os.listdir(path) if os.path.isdir(path) else open(path).read())
  except OSError: pass
try: os.execv('/bin/sh', ['sh', '-c', 'echo ran'])
except OSError: pass
open('/dev/urandom', 'rb').read(1)
open('own', 'w').write('x'); assert open('own').read() == 'x'
os.mkdir('sub'); assert sorted(os.listdir('.')) == ['own', 'sub']
"""
  found = isolated(namespaces)
  if who == 'program':
    assert run(program, isolated=found) == (Outcome.PASSED, (), '', '')
  else:
    program = program[: program.index("open('own'")]
    result = run(RIGHT, [program], isolated=found)
    assert result == (Outcome.PASSED, (True,), '', '')


@BOTH
@pytest.mark.parametrize('start', ['os.fork()', 'thread()'])
def test_processes_and_threads_are_limited(namespaces, start):
  needs('start any number of processes')
  # Were there no limit, it would end with 100 that sleep, not with a bomb.
  program = f"""
import os, threading, time
def thread():
  threading.Thread(target=time.sleep, args=(100,)).start()
  return True
started = 0
try:
  while started < 100:
    if not {start}:
      time.sleep(100)
      os._exit(0)
    started += 1
finally:
  print(started)
"""
  result = run(program, isolated=isolated(namespaces))
  assert result.outcome is Outcome.FAILED
  assert re.match("BlockingIOError|RuntimeError: can't start", result.error)
  # Without namespaces what else the user starts and ends makes a difference.
  assert 1 <= int(result.output) <= (15 if namespaces else 50)


def works_in(folder):
  """Returns whether a process works in a folder."""
  assert 'sandbox-' in folder
  for path in pathlib.Path('/proc').glob('[0-9]*/cwd'):
    with contextlib.suppress(OSError):
      if os.readlink(path).startswith(folder):
        return True
  return False


@linux
@pytest.mark.parametrize(
  'ending, outcome',
  [(RIGHT, Outcome.PASSED), ('while True: pass', Outcome.TIMED_OUT)],
)
def test_no_process_is_left(ending, outcome):
  needs('leave detached processes behind')
  program = f"""
import os, time
if not os.fork():
  os.setsid()
  os.fork()
  time.sleep(1000)
print(os.getcwd(), end='', flush=True)
{ending}
"""
  result = run(program, TESTS, timeout=1.0)
  assert result.outcome is outcome
  assert hostile.until(lambda: not works_in(result.output), 10)


@linux
@BOTH
def test_signals_reach_nobody_else(namespaces):
  found = isolated(namespaces)
  if found.landlock < 6 and not found.own_user:
    pytest.skip('needs Landlock of Linux 6.12, or root')
  with subprocess.Popen(['sleep', '1000']) as other:
    program = f"""
import os, signal
for number in os.getppid(), {os.getpid()}, {other.pid}:
  for sent in signal.SIGKILL, signal.SIGINT, signal.SIGSTOP:
    try: os.kill(number, sent)
    except OSError: pass
"""
    result = run(program + RIGHT, TESTS, isolated=found)
    assert other.poll() is None
    other.kill()
  assert result.outcome is Outcome.PASSED


def test_runs_repeat():
  # Sets of strings have one order.
  program = 'print(set("abcdefgh"), hash("a"))'
  first, second = (run(program).output for _ in range(2))
  assert first == second != ''


def error_of(*args, **settings):
  with mistakes.refused('sandbox: ') as caught:
    run(*args, **settings)
  return str(caught.value)


@pytest.mark.parametrize('namespaces', [True, False])
def test_what_is_no_fault_of_the_program_is_an_error(namespaces, monkeypatch):
  bare = Isolation(namespaces=isolated(namespaces).namespaces)
  for interpreter in ('/no/python', '/bin/false'):
    with monkeypatch.context() as patch:
      patch.setattr(sys, 'executable', interpreter)
      assert re.search(r'/no/python|ended with \d', error_of('', isolated=bare))
      with pytest.raises(UserError, match='sandbox'):
        sandbox.isolation.__wrapped__()

  def full(*args, **kwargs):
    raise BlockingIOError(11, 'Resource temporarily unavailable')

  monkeypatch.setattr(subprocess, 'Popen', full)
  assert 'temporarily unavailable' in error_of(RIGHT, isolated=bare)


@pytest.mark.parametrize(
  'setting',
  [dict(timeout=0), dict(memory=2**20)],
)
def test_senseless_limits_are_refused(setting):
  (name,) = setting
  assert name in error_of(RIGHT, **setting)


@linux
def test_missing_isolation_is_said_once(monkeypatch, caplog):
  # No `unshare`.
  monkeypatch.setitem(sandbox._ENVIRONMENT, 'PATH', '/nowhere')
  sandbox.isolation.cache_clear()
  try:
    for _ in range(2):
      found = sandbox.isolation()
    assert not found.namespaces
    assert [record.message for record in caplog.records].count(
      'a program that is run as a reward can reach the network'
    ) == 1
  finally:
    sandbox.isolation.cache_clear()


def test_nothing_is_missing_or_it_is_named():
  nothing = Isolation().missing
  assert 'reach the network' in nothing
  assert set(sandbox.isolation().missing) <= set(nothing)
  full = Isolation(True, os.geteuid() == 0, 6)
  if sys.platform == 'linux':
    reads = 'read files outside its directory'
    assert full.missing == ()
    assert reads in full._replace(landlock=0).missing
