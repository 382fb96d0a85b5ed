"""Landlock: a process reads, runs and changes only the files that it needs.

Readable are Python's library, the system's shared libraries and the packages
that are named; the working directory is its own.  Since Linux 6.7 no TCP, since
6.12 no signals to processes outside.
"""

import ctypes
import os
import sys

_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1, 2, 4, 8, 1 << 14
# Removing and making files, directories, sockets and links; no devices.
_MAKE = sum(1 << bit for bit in (4, 5, 7, 8, 9, 10, 12))
_FILE = _EXECUTE | _WRITE | _READ | _TRUNCATE  # What holds for a file.
_NO_NEW_PRIVS = 38  # prctl(2)


def readable(packages=()):
  """Returns the paths that a program needs besides its directory."""
  library = os.path.dirname(os.path.realpath(os.__file__))
  system = '/lib', '/lib64', '/usr/lib', '/usr/lib64', '/etc/ld.so.cache'
  paths = library, os.path.join(sys.base_prefix, 'lib'), '/dev/urandom'
  paths = *paths, os.path.realpath(sys.executable), *system, *packages
  paths = *paths, '/usr/share/zoneinfo', '/etc/localtime'
  return [path for path in paths if os.path.exists(path)]


def restrict(version, paths):
  """Restricts this process and those that it starts to these paths.

  Raises:
    OSError: the kernel refuses.
  """
  libc = ctypes.CDLL(None, use_errno=True)

  def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
      code = ctypes.get_errno()
      raise OSError(code, f'Landlock: {os.strerror(code)}')
    return result

  handled = 2**13 - 1 | 2**13 * (version >= 2) | _TRUNCATE * (version >= 3)
  network, scopes = 3 * (version >= 4), 3 * (version >= 6)
  size = 24 if version >= 6 else 16 if version >= 4 else 8
  parts = [n.to_bytes(8, sys.byteorder) for n in (handled, network, scopes)]
  attributes = b''.join(parts)[:size]
  rules = call(444, attributes, size, 0)
  rights = dict.fromkeys(paths, _EXECUTE | _READ | _LIST)
  rights |= {os.devnull: _FILE, '.': _FILE | _LIST | _MAKE | 1 << 13}
  for path, allowed in rights.items():
    descriptor = os.open(path, os.O_PATH)
    allowed &= handled if os.path.isdir(path) else handled & _FILE
    rule = allowed.to_bytes(8, sys.byteorder)
    call(445, rules, 1, rule + descriptor.to_bytes(4, sys.byteorder), 0)
    os.close(descriptor)
  libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
  call(446, rules, 0)
  os.close(rules)
