"""The two ends of a program under test; runs in processes of `sandbox_child`.

`serve` loads the program and answers requests; `judge`, in another process that
never loads the program, runs the tests.  Names of the program that tests use
are handles there: calling one sends the arguments and receives plain data (see
`sandbox_values`).  So a program can only lie about data, and a test compares
data with Python's own operators.

A message is a length, a kind (q a request, r a reply, x an exception) and a
tuple; a reply ends with the content of each mutable object that was sent.
"""

import _operator
import builtins
import os
import sys

import sandbox_values as values

_LONGEST = 2**28  # bytes of a message
_LONGEST_ERROR = 300  # characters
# Packages besides the standard library that may be imported.
PACKAGES = []


class OpaqueValue(BaseException):
  """A test uses an object of the program as if it were plain data."""


class ProgramEnded(BaseException):
  """The program's process is gone, or wrote into the pipe of its results."""


def read(descriptor, size):
  """Reads bytes: fewer at the end."""
  data = bytearray()
  while len(data) < size:
    chunk = os.read(descriptor, size - len(data))
    if not chunk:
      break
    data += chunk
  return bytes(data)


class _Peer:
  """One end of the pipes between a program and its tests."""

  def __init__(self, reads, writes, space):
    self._reads, self._writes, self.space = reads, writes, space
    self._streams = sys.stdout, sys.stderr
    self._objects, self._numbers, self._handles = [], {}, {}
    self.serves = {'call': self.call}  # What answers requests, by name.
    self.classes = {}  # Those whose objects go by value, by name.

  def call(self, function, args, kwargs):
    """Calls a function of this end."""
    return function(*args, **kwargs)

  def handle(self, own, number, name, fields):
    """Returns the object that a handle stands for."""
    if own:
      return self._objects[number]
    handle = self._handles.setdefault(number, object.__new__(Handle))
    vars(handle).update(_peer=self, _number=number, _name=name, _fields=fields)
    return handle

  def hand_out(self, value):
    """Returns whether an object is the other side's, its number, and fields."""
    if type(value) is Handle:
      return True, value._number, '', None
    number = self._numbers.setdefault(id(value), len(self._objects))
    if number == len(self._objects):
      self._objects.append(value)
    names = getattr(type(value), '__dataclass_fields__', None)
    fields = names and {name: getattr(value, name) for name in names}
    return False, number, type(value).__name__, fields

  def ask(self, *request):
    """Sends a request, answers those that come meanwhile; returns the reply."""
    shared = []
    self._send(b'q', request, shared)
    while True:
      kind, data = self._receive()
      if kind == b'q':
        self._answer(data)
        continue
      sent = list(shared)
      reader = values.Reader(data, shared, self.handle, self.classes)
      reply = reader.read()
      for value, content in zip(sent, reader.read(), strict=True):
        values.fill(value, content)
      if kind == b'x':
        raise self._exception(*reply)
      return reply[0]

  def serve(self):
    """Answers requests until the other end is gone."""
    try:
      while True:
        self._answer(self._receive()[1])
    except ProgramEnded:
      pass

  def _answer(self, data):
    shared = []
    reader = values.Reader(data, shared, self.handle, self.classes)
    try:
      what, *rest = reader.read()
      sent = list(shared)
      reply = (self.serves[what](*rest),)
      self._flush()
      self._send(b'r', reply, shared, sent)
    except BaseException as error:
      self._flush()
      names = [base.__name__ for base in type(error).__mro__]
      self._send(b'x', (names, _text(error)), list(sent), sent)

  def _flush(self):
    """Leaves no output to a buffer that dies with the process."""
    for stream in self._streams:
      try:
        stream.flush()
      except BaseException:
        continue

  def _exception(self, names, text):
    for name in names:
      cls = self.space.get(name, getattr(builtins, name, None))
      if isinstance(cls, type) and issubclass(cls, BaseException):
        try:
          return cls(text)
        except TypeError:
          continue
    return Exception(text)

  def _send(self, kind, value, shared, sent=()):
    writer = values.Writer(shared, self.hand_out, self.classes)
    writer.write(value)
    writer.data += b'U%d:' % len(sent)
    for each in sent:
      writer.write_copy(each)
    data = kind + writer.data
    data = len(data).to_bytes(4, 'big') + data
    while data:
      try:
        data = data[os.write(self._writes, data) :]
      except BrokenPipeError:
        raise ProgramEnded from None

  def _receive(self):
    size = int.from_bytes(read(self._reads, 4), 'big')
    data = read(self._reads, size) if size <= _LONGEST else b''
    if not 0 < len(data) == size:
      raise ProgramEnded
    return data[:1], data[1:]


class Handle:
  """An object of the other process: it can be used, but not compared."""

  def __call__(self, *args, **kwargs):
    return self._peer.ask('call', self, args, kwargs)

  def __getattr__(self, name):
    if name[:2] == '__':
      raise AttributeError(name)
    return self._peer.ask('getattr', self, name)

  def __hash__(self):
    return self._number

  def __eq__(self, other):
    if other is self:
      return True
    if self._fields is None:
      return self._opaque()
    same = type(other) is Handle and self._name == other._name
    return same and self._fields == other._fields

  def __iter__(self):
    return iter(self._peer.ask('list', self))

  def __instancecheck__(self, value):
    return self._peer.ask('isinstance', value, self)

  def _opaque(self, *_):
    raise OpaqueValue(f'opaque value of class {self._name}')

  def _forward(name):
    return lambda self, *args: self._peer.ask(name, self, *args)

  __bool__, __len__ = _forward('bool'), _forward('len')
  __str__, __repr__ = _forward('str'), _forward('repr')
  __getitem__, __setitem__ = _forward('getitem'), _forward('setitem')
  __setattr__ = _forward('setattr')
  # The program would see what it is compared with.
  __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _opaque
  __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _opaque
  __mod__ = __rmod__ = __truediv__ = __rtruediv__ = __abs__ = _opaque
  __floordiv__ = __rfloordiv__ = __pow__ = __round__ = _opaque


# Requests of a handle.
_OPERATIONS = getattr, setattr, bool, len, str, repr, list, isinstance
_OPERATIONS += _operator.getitem, _operator.setitem


class _Tests(_Peer):
  """The end that holds the tests; the program may call their functions."""

  def call(self, function, args, kwargs):
    if id(function) not in self._numbers:
      raise OpaqueValue('a function that no test has passed')
    return function(*args, **kwargs)

  def hand_out(self, value):
    if not callable(value) or isinstance(value, type):
      raise OpaqueValue(f'opaque value of class {type(value).__name__}')
    return super().hand_out(value)


def serve(reads, writes, source):
  """Runs the program's end until the tests' end is gone."""
  module = type(sys)('program')
  sys.modules.update(dict.fromkeys(('program', '__main__'), module))
  sys.argv = ['program.py']
  space = vars(module)

  def load():
    exec(compile(source, 'program.py', 'exec'), space)

  def names(wanted):
    return {name: space[name] for name in wanted if name in space}

  def classes(wanted):
    """Objects of these classes go by value, as in the tests."""
    found = names(wanted).items()
    peer.classes = {name: cls for name, cls in found if isinstance(cls, type)}

  peer = _Peer(reads, writes, space)
  peer.serves |= {each.__name__: each for each in _OPERATIONS}
  peer.serves |= dict(load=load, names=names, classes=classes)
  peer.serves['stdin'] = lambda text: _with_input(source, text)
  peer.serve()


def judge(reads, writes, entry_point, setup, tests):
  """Runs the tests, which are sources.

  Returns:
    The first exception or None, and a bool per test.
  """
  space = {'__name__': 'tests'}
  peer = _Tests(reads, writes, space)
  try:
    peer.ask('load')
    _define(peer, '\n'.join([setup, *tests]), entry_point)
    exec(compile(setup, 'setup.py', 'exec'), space)
    peer.classes = {
      name: value
      for name, value in space.items()
      if isinstance(value, type) and value.__module__ == 'tests'
    }
    peer.ask('classes', list(peer.classes))
  except BaseException as error:
    return error, [False] * len(tests)
  run = lambda test: exec(compile(test, 'tests.py', 'exec'), space)
  return _each(run, tests)


def judge_output(reads, writes, tests):
  """Runs the program once per test, a pair of its input and its output."""
  peer = _Tests(reads, writes, {})

  def run(test):
    code, output, error = peer.ask('stdin', test[0])
    assert code == 0, f'it ended with status {code}: {error}'
    assert _lines(output) == _lines(test[1]), f'it printed {output!r}'

  return _each(run, tests)


def verdict(failure, passed):
  """Formats one line: outcome, a digit per test or -, the exception."""
  if isinstance(failure, ProgramEnded):
    return 'ended\n'
  digits = ''.join('01'[p] for p in passed) or '-'
  if failure is None:
    return f'passed {digits} \n'
  outcome = 'out_of_memory' if isinstance(failure, MemoryError) else 'failed'
  text = ' '.join(f'{type(failure).__name__}: {failure}'.split())
  return f'{outcome} {digits} {text.removesuffix(":")[:_LONGEST_ERROR]}\n'


def _text(error):
  try:
    one = len(error.args) == 1 and isinstance(error.args[0], str)
    return (error.args[0] if one else str(error))[:_LONGEST_ERROR]
  except BaseException:
    return ''


def _each(run, tests):
  failure, passed = None, []
  for test in tests:
    try:
      run(test)
      passed.append(True)
    except BaseException as error:
      failure = failure or error
      passed.append(False)
  return failure, passed


def _lines(text):
  return [line.rstrip() for line in text.rstrip().split('\n')]


def _define(peer, source, entry_point):
  """Gives tests the names of the program that they use.

  Built-in functions and modules are never the program's.
  """
  words = ''.join(c if c.isalnum() or c in '_.' else ' ' for c in source)
  parts = {tuple(word.split('.')) for word in words.split()}
  used = {part for word in parts for part in word if part[:2] != '__'}
  used = {name for name in used if not hasattr(builtins, name)} | {entry_point}
  for name, value in peer.ask('names', used).items():
    module = ''
    dotted = any(word[0] == name and word[1:] for word in parts)
    if dotted and name in sys.stdlib_module_names:
      module = name
    elif type(value) is Handle and value._name == 'module':
      module = peer.ask('getattr', value, '__name__')
    if name != entry_point and _known(module):
      value = __import__(module, fromlist=['*'])
    peer.space[name] = value


def _known(module):
  """Returns True for modules that tests may import on their own."""
  name = module.partition('.')[0]
  # Objects of `unittest.mock` equal everything.
  return name != 'unittest' and name in {*sys.stdlib_module_names, *PACKAGES}


def _with_input(source, text):
  """Runs the program as a script; returns its status, output and error."""
  import tempfile

  sys.stdout.flush()
  new = lambda: tempfile.TemporaryFile(dir='.')  # noqa: SIM115
  files = [new() for _ in range(3)]
  files[0].write(text.encode('utf-8', 'surrogatepass'))
  files[0].seek(0)
  pid = os.fork()
  if not pid:
    status = 1
    try:
      for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
      os.closerange(3, 1024)  # The pipes are not the program's.
      space = vars(sys.modules['__main__'])
      space |= {'__name__': '__main__', 'exit': sys.exit, 'quit': sys.exit}
      exec(compile(source, 'program.py', 'exec'), space)
      status = 0
    except SystemExit as error:
      status = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException as error:
      name = type(error).__name__
      os.write(2, f'{name}: {error}'.encode('utf-8', 'replace'))
    finally:
      _finish()
      os._exit(status)
  status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  texts = []
  for file in files[1:]:
    file.seek(0)
    texts.append(file.read().decode('utf-8', 'replace'))
  return status, *texts


def _finish():
  """Ends a script as Python would, in a fifth of the time."""
  import atexit

  if 'threading' in sys.modules:
    sys.modules['threading']._shutdown()
  atexit._run_exitfuncs()
  sys.stdout.flush()
