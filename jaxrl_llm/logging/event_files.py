"""Scalars as TensorBoard reads them, without TensorBoard's libraries.

An event file is a TFRecord of `Event` messages in the wire format of protocol
buffers (https://protobuf.dev/programming-guides/encoding/); the fields are
those of tensorboard/compat/proto/event.proto and summary.proto.
"""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping

from jaxrl_llm.logging.records import cannot_write


class EventFile:
  """An event file of scalars.

  Args:
    folder: where TensorBoard looks; made where missing.
    resume_step: TensorBoard drops what earlier files of the folder have from
      this step on.

  Raises:
    OSError: the file cannot be made.
  """

  def __init__(self, folder, resume_step: int = 0):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    name = f'events.out.tfevents.{now:.6f}.{socket.gethostname()}'
    self._path = folder / name
    self._file = open(self._path, 'ab', buffering=0)  # noqa: SIM115
    self._write(_event(now, 0, _field(3, b'brain.Event:2')))
    start = _field(7, _varint(1 << 3) + _varint(1))  # SessionLog.START
    self._write(_event(now, resume_step, start))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Adds a step's scalars, by name.

    Raises:
      UserError: the disk is full.
    """
    values = b''.join(
      _field(1, _field(1, name.encode()) + _simple_value(value))
      for name, value in scalars.items()
    )
    self._write(_event(time.time(), step, _field(5, values)))

  def close(self) -> None:
    self._file.close()

  def _write(self, event: bytes) -> None:
    length = struct.pack('<Q', len(event))
    record = length + _checksum(length) + event + _checksum(event)
    try:
      written = self._file.write(record)
    except OSError as error:
      raise cannot_write(self._path, error.strerror) from error
    if written != len(record):
      raise cannot_write(self._path, 'the disk is full')


def _event(wall_time: float, step: int, content: bytes) -> bytes:
  """`Event`: wall_time = 1 (double), step = 2 (int64), and what it is about."""
  return (
    _varint(1 << 3 | 1)
    + struct.pack('<d', wall_time)
    + _varint(2 << 3)
    + _varint(step)
    + content
  )


def _field(number: int, content: bytes) -> bytes:
  """A field of bytes, text or an embedded message."""
  return _varint(number << 3 | 2) + _varint(len(content)) + content


def _simple_value(value: float) -> bytes:
  """`Summary.Value.simple_value` = 2, a float32; beyond its range ±inf."""
  try:
    packed = struct.pack('<f', value)
  except OverflowError:
    packed = struct.pack('<f', float('inf') if value > 0 else float('-inf'))
  return _varint(2 << 3 | 5) + packed


def _varint(value: int) -> bytes:
  """An unsigned integer, seven bits at a time, the lowest first."""
  groups = bytearray()
  while value > 0x7F:
    groups.append(value & 0x7F | 0x80)
    value >>= 7
  groups.append(value)
  return bytes(groups)


def _crc_table() -> tuple[int, ...]:
  """CRC-32C (Castagnoli, reflected: 0x82F63B78) of each byte."""
  table = []
  for value in range(256):
    for _ in range(8):
      value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    table.append(value)
  return tuple(table)


_CRC = _crc_table()


def _checksum(content: bytes) -> bytes:
  """The masked CRC-32C of a TFRecord."""
  crc = 0xFFFFFFFF
  for byte in content:
    crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
  crc ^= 0xFFFFFFFF
  masked = (crc >> 15 | crc << 17) + 0xA282EAD8
  return struct.pack('<I', masked & 0xFFFFFFFF)
