"""What lies in a chip's memory while a compiled program runs."""

import math
import re
from typing import Any, NamedTuple

import jax

from experiments.planning import hlo
from experiments.planning.hardware import GIB


class Resident(NamedTuple):
  """Bytes on each chip that an iteration keeps throughout.

  Attributes:
    parameters: of all that is trained.
    optimizer: of the optimiser's state.
    reference: of the reference policy.
  """

  parameters: int
  optimizer: int
  reference: int

  @classmethod
  def of(cls, state: Any, reference: Any) -> 'Resident':
    return cls(local(state.trainable), local(state.opt_state), local(reference))

  @property
  def state(self) -> int:
    return self.parameters + self.optimizer

  @property
  def all(self) -> int:
    return sum(self)


class Memory(NamedTuple):
  """Bytes on one chip while a program runs.

  Attributes:
    resident: of parameters, optimiser and reference.
    cache: keys and values of prompts and responses.
    other: arguments of the program, besides the resident ones and the cache.
    temporary: results and scratch, besides the cache.
    peak: their sum.
  """

  resident: Resident
  cache: int
  other: int
  temporary: int
  peak: int


class TooLarge(Exception):
  """A program does not fit.

  Attributes:
    program: its name.
    missing: bytes that one chip lacks.
  """

  def __init__(self, program: str, missing: float):
    super().__init__(f'{program}: {missing / GIB:.1f} GiB')
    self.program, self.missing = program, missing

  @classmethod
  def of(cls, program: str, held: int, limit: int, error) -> 'TooLarge':
    """Reads a compiler's refusal; raises the error again if it is another."""
    text = str(error)
    needed = re.search(r'(?:\(|Used |Attempting to use )([\d.]+)([KMGT])', text)
    if 'RESOURCE_EXHAUSTED' not in text or not needed:
      raise error
    unit = 1024 ** (' KMGT'.index(needed[2]))
    return cls(program, float(needed[1]) * unit + held - limit)


def account(compiled, resident: Resident, cache: int, held: int) -> Memory:
  """Reads what the compiler says of a program.

  Args:
    compiled: the program.
    resident: what the iteration keeps.
    cache: bytes of the cache, wherever the program has it.
    held: bytes of the resident that are no arguments of the program.
  """
  told = compiled.memory_analysis()
  given = told.argument_size_in_bytes
  made = told.output_size_in_bytes + told.temp_size_in_bytes
  made -= told.alias_size_in_bytes
  peak = held + given + made
  own = given - (resident.all - held)
  if own >= cache and cache:
    own -= cache
  else:
    made -= cache
  return Memory(resident, cache, own, made, peak)


def local(tree: Any) -> int:
  """Bytes of a tree on each chip: its largest shards."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def gradient(tree: Any) -> int:
  """Bytes on each chip of the gradient of a tree, summed up in float32."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * max(x.dtype.itemsize, 4)
    for x in jax.tree.leaves(tree)
  )


def held_cache(module: hlo.Module) -> int:
  """Bytes of keys and values that the loop of a decoding program holds.

  They are the only arrays of four dimensions in its state.  Of several loops,
  the later ones for fewer rows, the one that holds most counts.
  """
  found = [0]
  for instruction in module.computations[module.entry].values():
    if instruction.opcode == 'while':
      arrays = [
        array
        for array in hlo.arrays(instruction.type)
        if len(hlo.shape(array)) == 4
      ]
      found.append(sum(map(hlo.size, arrays)))
  return max(found)
