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
_NAMED = 'None True False int float str bool bytes complex object list tuple'
_NAMED = (*_NAMED.split(), 'set', 'frozenset', 'dict', 'type')
_NAMED = {name: getattr(builtins, name) for name in _NAMED}
_TAGS = {b'L': list, b'M': dict, b'E': set, b'A': bytearray}
_TAGS |= {b'U': tuple, b'Z': frozenset}
_SHARED = list, dict, set, bytearray, _collections.deque
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

  def __init__(self, shared, handle, classes):
    """Args: numbered objects, what describes a handle, classes by name."""
    self.data, self.shared = bytearray(), shared
    self._numbers = {id(value): i for i, value in enumerate(shared)}
    self._handle, self._classes = handle, classes

  def write(self, value):
    kind = type(value)
    if value is None or kind is bool:
      self._text(b'Y', repr(value))
    elif id(value) in self._numbers:
      self._text(b'R', str(self._numbers[id(value)]))
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
      self._items(_tag(value), value)
    elif isinstance(value, _VIEWS) or _is_iterator(kind):
      self.write(list(value))
    elif kind is type and _NAMED.get(value.__name__) is value:
      self._text(b'Y', value.__name__)
    elif self._by_value(value) or self._array(value):
      pass
    elif isinstance(value, _SHARED) or self._is_by_fields(value):
      self._numbers[id(value)] = len(self.shared)
      self.shared.append(value)
      self.write_content(value)
    else:
      self._items(b'H', self._handle(value))

  def write_content(self, value):
    """Writes a numbered object itself, not a reference to it."""
    if isinstance(value, _collections.deque):
      self._items(b'Q', [value.maxlen, *value])
    elif isinstance(value, dict):
      self._items(b'M', _flat(dict.items(value)))
    elif isinstance(value, _SHARED):
      self._items(_tag(value), value)
    else:
      self._items(b'O', [type(value).__name__, *_flat(vars(value).items())])

  def write_copy(self, value):
    """Writes the present content of an object that has a number."""
    self.shared.append(None)
    self.write_content(value)

  def _is_by_fields(self, value):
    return type(value).__name__ in self._classes and hasattr(value, '__dict__')

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

  def __init__(self, data, shared, handle, classes):
    """Args: bytes, numbered objects, what makes a handle, classes by name."""
    self._data, self._at, self.shared = data, 0, shared
    self._handle, self._classes = handle, classes

  def read(self):
    tag = self._data[self._at : self._at + 1]
    end = self._data.index(b':', self._at)
    size, self._at = int(self._data[self._at + 1 : end]), end + 1
    if tag in b'BRISDY':
      raw = self._data[self._at : self._at + size]
      self._at += size
      if tag == b'B':
        return raw
      return self._scalar(tag, raw.decode('utf-8', 'surrogatepass'))
    if tag in b'LAEMQO':
      return self._container(tag, size)
    items = [self.read() for _ in range(size)]
    if tag in _TAGS:
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

  def _scalar(self, tag, text):
    if tag == b'R':
      return self.shared[int(text)]
    if tag == b'Y':
      return _NAMED[text]
    reads = {b'S': str, b'I': lambda t: int(t, 16), b'D': float.fromhex}
    return reads[tag](text)

  def _container(self, tag, size):
    """Numbers the object before its content, which may refer to it."""
    at = len(self.shared)
    self.shared.append(None)
    if tag == b'O':
      value = object.__new__(self._classes[self.read()])
    elif tag == b'Q':
      value = _collections.deque((), self.read())
    else:
      value = _TAGS[tag]()
    self.shared[at] = value
    items = [self.read() for _ in range(size - (tag in b'OQ'))]
    pairs = zip(items[::2], items[1::2], strict=True)
    fill(value, dict(pairs) if tag in b'MO' else items)
    return value


def fill(value, content):
  """Replaces the content of a numbered object."""
  if not isinstance(value, _SHARED):
    value = vars(value)
  value.clear()
  add = getattr(value, 'extend', None) or value.update
  add(content if isinstance(content, _SHARED) else vars(content))


def _flat(pairs):
  return [part for pair in pairs for part in pair]


def _tag(value):
  return next(tag for tag, kind in _TAGS.items() if isinstance(value, kind))


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
