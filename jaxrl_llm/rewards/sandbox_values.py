"""Plain data between a program and its tests, as bytes.

Used by `sandbox_harness` in the sandbox's processes.  A value becomes a letter
and its content; decoding calls the constructors of `_TAGS` and nothing else, so
no bytes can run code.  Lists, dictionaries, sets, deques and bytearrays are
numbered in the order in which they occur: a second occurrence is a reference,
which preserves identity and cycles.  Subclasses of built-in types go by the
value of the built-in type, iterators and views as lists.  Whatever else an
object is, only a handle (a number) crosses.
"""

import _collections
import builtins
import sys

# Modules such as `fractions` are imported only where a value needs them.
_TAGS = {
  **{b'N': None, b'T': True, b'F': False},
  **{b'I': int, b'D': float, b'S': str, b'B': bytes, b'A': bytearray},
  **{b'L': list, b'U': tuple, b'E': set, b'Z': frozenset, b'M': dict},
}
_SCALARS = 'int', 'float', 'str', 'bool', 'bytes', 'complex', 'object'
_TYPES = (*_SCALARS, 'list', 'tuple', 'set', 'frozenset', 'dict', 'type')
# By value: module, class, and the arguments that rebuild an object.
_BY_VALUE = {
  'collections.Counter': lambda v: (dict(v),),
  'collections.OrderedDict': lambda v: (list(v.items()),),
  'collections.ChainMap': lambda v: tuple(map(dict, v.maps)),
  'fractions.Fraction': lambda v: (int(v.numerator), int(v.denominator)),
  'decimal.Decimal': lambda v: (str(v),),
  'builtins.complex': lambda v: (v.real, v.imag),
  'builtins.range': lambda v: (v.start, v.stop, v.step),
  'datetime.datetime': lambda v: v.timetuple()[:6] + (v.microsecond,),
  'datetime.date': lambda v: v.timetuple()[:3],
  'datetime.time': lambda v: (v.hour, v.minute, v.second, v.microsecond),
  'datetime.timedelta': lambda v: (v.days, v.seconds, v.microseconds),
}
_records = {}
_ARGUMENTS = {int, float, str, dict, list}
_DTYPES = 'biufcSU'
_VIEWS = type({}.keys()), type({}.values()), type({}.items())


class Writer:
  """Encodes values.

  Attributes:
    data: the bytes so far.
    shared: the numbered objects, which both sides number alike.
  """

  def __init__(self, shared, handle, classes=()):
    """Args: numbered objects, a function from others to (number, fields)."""
    self.data, self.shared = bytearray(), shared
    self._numbers = {id(value): i for i, value in enumerate(shared)}
    self._handle, self._classes = handle, classes

  def write(self, value):
    kind = type(value)
    if value is None or kind is bool:
      self.data += {None: b'N', True: b'T', False: b'F'}[value]
    elif id(value) in self._numbers:
      self._text(b'R', str(self._numbers[id(value)]))
    elif isinstance(value, (list, dict, set, bytearray, _collections.deque)):
      if not self._by_value(value):
        self._numbers[id(value)] = len(self.shared)
        self.shared.append(value)
        self.write_content(value)
    elif isinstance(value, str):
      self._text(b'S', str.__str__(value))
    elif isinstance(value, int):
      self._text(b'I', f'{int(value):x}')
    elif isinstance(value, float):
      self._text(b'D', float(value).hex())
    elif isinstance(value, bytes):
      self._bytes(b'B', bytes(value))
    elif isinstance(value, tuple) and hasattr(kind, '_fields'):
      self._items(b'P', [kind.__name__, *kind._fields, *value])
    elif isinstance(value, (tuple, frozenset)):
      self._items(b'U' if isinstance(value, tuple) else b'Z', value)
    elif isinstance(value, _VIEWS) or _is_iterator(kind):
      self.write(list(value))
    elif (
      isinstance(value, type) and vars(builtins).get(value.__name__) is value
    ):
      self._text(b'Y', value.__name__)
    elif not self._by_value(value) and not self._array(value):
      self._object(value)

  def write_content(self, value):
    """Writes a numbered object itself, not a reference to it."""
    if isinstance(value, bytearray):
      self._bytes(b'A', bytes(value))
    elif isinstance(value, dict):
      pairs = [part for pair in dict.items(value) for part in pair]
      self._items(b'M', pairs)
    elif isinstance(value, _collections.deque):
      self._items(b'Q', [value.maxlen, *value])
    elif isinstance(value, (list, set)):
      self._items(b'L' if isinstance(value, list) else b'E', value)
    else:
      fields = vars(value)
      parts = [part for pair in fields.items() for part in pair]
      self._items(b'O', [type(value).__name__, *parts])

  def write_copy(self, value):
    """Writes the present content of an object that has a number."""
    self.shared.append(None)
    self.write_content(value)

  def _object(self, value):
    if type(value).__name__ in self._classes and hasattr(value, '__dict__'):
      self._numbers[id(value)] = len(self.shared)
      self.shared.append(value)
      self.write_content(value)
    else:
      self._items(b'H', self._handle(value))

  def _by_value(self, value):
    for base in type(value).__mro__:
      name = f'{base.__module__}.{base.__qualname__}'
      if name in _BY_VALUE:
        self._items(b'V', [name, *_BY_VALUE[name](value)])
        return True
    return False

  def _array(self, value):
    numpy = sys.modules.get('numpy')
    if not numpy or not isinstance(value, (numpy.ndarray, numpy.generic)):
      return False
    if value.dtype.kind not in _DTYPES:
      return False
    parts = value.dtype.str, list(value.shape), value.ravel().tolist()
    self._items(b'G', [isinstance(value, numpy.generic), *parts])
    return True

  def _items(self, tag, items):
    items = list(items)
    self.data += b'%b%d:' % (tag, len(items))
    for item in items:
      self.write(item)

  def _text(self, tag, text):
    self._bytes(tag, text.encode('utf-8', 'surrogatepass'))

  def _bytes(self, tag, data):
    self.data += b'%b%d:' % (tag, len(data)) + data


class Reader:
  """Decodes values; raises ValueError if the bytes are not a value's."""

  def __init__(self, data, shared, handle, classes=None):
    """Args: bytes, numbered objects, what makes a handle, classes by name."""
    self._data, self._at, self.shared = data, 0, shared
    self._handle, self._classes = handle, classes or {}

  def read(self):
    tag = self._data[self._at : self._at + 1]
    self._at += 1
    if tag in (b'N', b'T', b'F'):
      return _TAGS[tag]
    end = self._data.index(b':', self._at)
    size, self._at = int(self._data[self._at : end]), end + 1
    if tag in b'ISDRYBA':
      return self._scalar(tag, size)
    if tag in b'LEMQO':
      return self._container(tag, size)
    items = [self.read() for _ in range(size)]
    if tag in (b'U', b'Z'):
      return _TAGS[tag](items)
    if tag == b'H':
      return self._handle(*items)
    if tag == b'V' and items[0] in _BY_VALUE:
      if not {type(item) for item in items} <= _ARGUMENTS:
        raise ValueError(f'not the parts of a {items[0]}')
      return _class_of(items[0])(*items[1:])
    if tag == b'P':
      name, *fields = items[: size // 2 + 1]
      return _record(name, *fields)(*items[size // 2 + 1 :])
    if tag == b'G':
      numpy = __import__('numpy')
      if numpy.dtype(items[1]).kind not in _DTYPES:
        raise ValueError('not an array of plain data')
      array = numpy.array(items[3], items[1]).reshape(items[2])
      return array[()] if items[0] else array
    raise ValueError(f'not a value: {tag!r}')

  def _scalar(self, tag, size):
    raw = bytes(self._data[self._at : self._at + size])
    self._at += size
    if tag == b'B':
      return raw
    if tag == b'A':
      self.shared.append(bytearray(raw))
      return self.shared[-1]
    text = raw.decode('utf-8', 'surrogatepass')
    if tag == b'Y' and text in _TYPES:
      return getattr(builtins, text)
    reads = {b'S': str, b'I': lambda t: int(t, 16), b'D': float.fromhex}
    return self.shared[int(text)] if tag == b'R' else reads[tag](text)

  def _container(self, tag, size):
    """Numbers the object before its content, which may refer to it."""
    at = len(self.shared)
    self.shared.append(None)
    if tag == b'O':
      cls = self._classes[self.read()]
      value = self.shared[at] = object.__new__(cls)
      rest = [self.read() for _ in range(size - 1)]
      vars(value).update(_pairs(rest))
    elif tag == b'Q':
      value = self.shared[at] = _collections.deque((), self.read())
      value.extend([self.read() for _ in range(size - 1)])
    else:
      value = self.shared[at] = _TAGS[tag]()
      items = [self.read() for _ in range(size)]
      fill(value, _pairs(items) if tag == b'M' else items)
    return value


def fill(value, content):
  """Replaces the content of a numbered object."""
  if isinstance(value, list):
    value[:] = content
  elif isinstance(value, (dict, set, bytearray, _collections.deque)):
    value.clear()
    add = getattr(value, 'extend', None) or value.update
    add(content)
  else:
    vars(value).clear()
    vars(value).update(vars(content))


def _pairs(items):
  return dict(zip(items[::2], items[1::2], strict=True))


def _record(*names):
  """Returns one class for equal names, so that types agree."""
  if names not in _records:
    namedtuple = __import__('collections').namedtuple
    _records[names] = namedtuple(names[0], names[1:])
  return _records[names]


def _class_of(name):
  module, _, name = name.rpartition('.')
  return getattr(__import__(module), name)


def _is_iterator(kind):
  """Returns True for Python's own iterators, such as a generator."""
  standard = kind.__module__ in ('builtins', 'itertools', '_collections')
  return standard and hasattr(kind, '__next__')
