"""What chips send each other in a compiled program, and how long it takes."""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.planning import hlo
from experiments.planning.hardware import Chip

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


class Collective(NamedTuple):
  """All collectives of a kind among equal groups of chips.

  Attributes:
    kind: one of `KINDS`.
    group: ids of the first group, in the order of the mesh; of a
      `collective-permute` the pair that the first chip sends to.
    times: executions, of all such instructions together.
    sent: bytes that every chip sends in all of them, as a ring does.
  """

  kind: str
  group: tuple[int, ...]
  times: float
  sent: float


def find(module: hlo.Module, steps: tuple[float, ...] = ()) -> list[Collective]:
  """The collectives of a program, those that send most first.

  Args:
    module: the program.
    steps: as for `hlo.executed`.
  """
  totals = defaultdict(lambda: [0.0, 0.0])
  for place, found, times in hlo.executed(module, steps):
    kind = found.opcode.removesuffix('-start')
    if kind not in KINDS or not times:
      continue
    computation = module.computations[place.computation]
    given = sum(hlo.size(computation[x].type) for x in found.operands)
    group = first_group(found, kind)
    total = totals[kind, group]
    total[0] += times
    total[1] += times * given * _per_byte(kind, len(group))
  found = [
    Collective(kind, group, times, sent)
    for (kind, group), (times, sent) in totals.items()
    if sent
  ]
  return sorted(found, key=lambda collective: -collective.sent)


def _per_byte(kind: str, count: int) -> float:
  """Bytes that a chip of `count` sends per byte that it gives, in a ring."""
  if kind in ('collective-permute', 'collective-broadcast'):
    return 1.0
  if kind == 'all-gather':
    return count - 1.0
  return (count - 1) / count * (2 if kind == 'all-reduce' else 1)


def first_group(found: hlo.Instruction, kind: str) -> tuple[int, ...]:
  """The chips that the first one exchanges with, itself included."""
  if kind == 'collective-permute':
    pair = re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', found.rest)
    return int(pair[1]), int(pair[2])
  text = re.search(r'replica_groups=(.*)', found.rest)[1]
  listed = re.match(r'\{\{([\d,]+)\}', text)
  if listed:
    return hlo.dimensions(listed[1])
  iota = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    sizes = hlo.dimensions(iota[2])
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    if iota[3]:
      ids = ids.transpose(hlo.dimensions(iota[3]))
    return tuple(ids.reshape(hlo.dimensions(iota[1]))[0].tolist())
  return _mesh_group(text)


def _mesh_group(text: str) -> tuple[int, ...]:
  """Of `mesh['a'=16,'b'=16] {'b'}`, where an axis may stand as 'a':(2)4.

  'a':(2)4 is the part of size 4 of an axis of which 2 come before it.
  """
  mesh = re.match(r'mesh\[([^\]]*)\][^{]*\{([^}]*)\}', text)
  if mesh is None:
    raise ValueError(f'replica groups of an unknown form: {text[:80]}')
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
  ids = np.arange(np.prod(list(sizes.values()))).reshape(tuple(sizes.values()))
  taken = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[2])
  at = [[0]] * len(sizes)
  names = list(sizes)
  for name, before, part in taken:
    count = sizes[name]
    after = count // (int(before) * int(part)) if part else 1
    count = int(part) if part else count
    axis = names.index(name)
    at[axis] = [i + j * after for i in at[axis] for j in range(count)]
  return tuple(ids[np.ix_(*at)].reshape(-1).tolist())


def bandwidth(chip: Chip, shape: tuple[int, ...], places: np.ndarray) -> float:
  """Bytes/s that each chip of a group sends at most.

  A TPU uses the links of every axis of the torus along which the group lies,
  both ways where the axis is a ring; of a group of two each sends over one
  link.  GPUs of one machine use NVLink; those of several are as fast as the
  network of all members in a machine.

  Args:
    chip: what they are.
    shape: of the topology.
    places: [n, axes] of the group's chips, `topologies.coordinates`.
  """
  varied = [len(set(places[:, axis].tolist())) for axis in range(len(shape))]
  if chip.per_machine is not None:
    if varied[0] == 1:
      return chip.link
    each = len(places) // varied[0]
    return min(chip.link, chip.network * max(each, 1))
  if len(places) == 2:
    return chip.link
  rate = 0.0
  for count, whole in zip(varied, shape, strict=True):
    if count > 1:
      ring = count == whole and whole % chip.wraps == 0
      rate += chip.link * (2 if ring else 1)
  return rate or chip.link


def seconds(
  collectives: list[Collective],
  chip: Chip,
  shape: tuple[int, ...],
  locate: Callable[[tuple[int, ...]], np.ndarray],
) -> float:
  """Time of all collectives one after another at full bandwidth."""
  return sum(
    found.sent / bandwidth(chip, shape, locate(found.group))
    for found in collectives
  )
