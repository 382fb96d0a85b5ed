"""Collectives of a compiled program: bytes that chips send, and seconds."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.planning import hlo
from experiments.planning.topologies import Topology

_PAIRWISE = ('collective-permute', 'collective-broadcast')
KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all')
KINDS += ('ragged-all-to-all', *_PAIRWISE)


def find(
  executions: list[hlo.Execution], rate: Callable[[tuple[int, ...]], float]
) -> tuple[list[dict], float]:
  """Adds up a program's collectives by kind and size of their groups.

  Args:
    executions: from `hlo.executions`.
    rate: bytes/s that each chip of a group can send.

  Returns:
    The sums, largest first: `kind`, `chips` of a group, `times` executed and
    bytes `sent` by each chip along a ring; and the seconds of all, in turn.
  """
  totals, rate = defaultdict(lambda: np.zeros(3)), functools.cache(rate)
  for computation, x, times in executions:
    kind = x.opcode.removesuffix('-start')
    if kind in KINDS and times:
      group = first_group(x, kind)
      count = sum(hlo.size(computation[y].type) for y in x.operands)
      sent = times * count * _per_byte(kind, len(group))
      if sent:
        totals[kind, len(group)] += times, sent, sent / rate(group)
  sums = [
    dict(kind=kind, chips=chips, times=float(times), sent=float(sent))
    for (kind, chips), (times, sent, _) in totals.items()
  ]
  seconds = float(sum(total[2] for total in totals.values()))
  return sorted(sums, key=lambda x: -x['sent']), seconds


def _per_byte(kind: str, count: int) -> float:
  """Bytes that each of `count` chips sends per byte of its operand."""
  if kind in _PAIRWISE:
    return 1.0
  if kind == 'all-gather':
    return count - 1.0
  return (count - 1) / count * (2 if kind == 'all-reduce' else 1)


def first_group(instruction: hlo.Instruction, kind: str) -> tuple[int, ...]:
  """Positions in the mesh of the chips in a collective's first group."""
  if kind == 'collective-permute':
    pair = instruction.attribute(r'source_target_pairs=\{\{(\d+,\d+)\}')
    return hlo.dimensions(pair)
  text = instruction.attribute('replica_groups=(.*)')
  if braces := re.match(r'\{\{([\d,]+)\}', text):
    return hlo.dimensions(braces[1])
  if iota := re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    groups, sizes, axes = (hlo.dimensions(x or '') for x in iota.groups())
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    ids = ids.transpose(axes or range(len(sizes)))
    return tuple(ids.reshape(groups)[0].tolist())
  # mesh['a'=16,'b'=16] {'b'}, or {'b':(2)4} for a part of axis b, of size 4,
  # which parts of size 2 precede.
  mesh = re.match(r'mesh\[([^\]]*)\][^{]*\{([^}]*)\}', text)
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
  ids = np.arange(np.prod(list(sizes.values()))).reshape(tuple(sizes.values()))
  index = {name: [0] for name in sizes}
  for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[2]):
    count = int(part or sizes[name])
    after = sizes[name] // (int(before or 1) * count)
    index[name] = [i + j * after for i in index[name] for j in range(count)]
  return tuple(ids[np.ix_(*index.values())].reshape(-1).tolist())


def bandwidth(topology: Topology, devices: Sequence[Any]) -> float:
  """Bytes/s that each chip of a group can send.

  A TPU uses the links of every axis of the torus along which the group lies,
  in both directions where the axis is a ring; in a pair, one link.  GPUs of
  one machine use NVLink; those of several share their machine's network.
  """
  chip = topology.chip
  if chip.network is not None:
    machines = len({device.id // topology.shape[1] for device in devices})
    each = len(devices) // machines
    return chip.link if machines == 1 else min(chip.link, chip.network * each)
  if len(devices) == 2:
    return chip.link
  counts = [
    len(set(axis)) for axis in zip(*(x.coords for x in devices), strict=True)
  ]
  links = sum(
    2 if count == size and size % chip.wraps == 0 else 1
    for count, size in zip(counts, topology.shape, strict=False)
    if count > 1
  )
  return chip.link * max(links, 1)
