"""Reader of a compiled program's text: instructions and how often each runs.

XLA's own `cost_analysis` counts the body of a loop once and is absent for
GPUs; here every computation counts as often as it is executed.
"""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(
  r'^(ENTRY )?%?([\w.\-]+) \(.*\{\n((?:.*\n)*?)\}(?!\})', re.MULTILINE
)
# Other lines, such as `}}, metadata=…`, continue a kernel's description.
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)'
  r'\((.*?)\)(?:, (?=[\w\-]+=)|$)(.*)',
  re.MULTILINE,
)
_ARRAY = re.compile(r'\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'\b(?:calls|body|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)'
)
_CALLS = ('while', 'call', 'fusion', 'conditional', 'async-start')
# Instructions that pass a number on unchanged.
_COPIES = ('bitcast', 'convert', 'copy', 'copy-done', 'copy-start')
_COPIES += ('opt-barrier', 'reshape')


class Instruction(NamedTuple):
  """An instruction; `type` and `rest`, the attributes, are texts.

  Operands are names, or the text of a constant or parameter.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of a pattern in the attributes, or None."""
    match = re.search(pattern, self.rest)
    return match and match[1]

  @property
  def multiplies(self) -> bool:
    """True for a matrix product."""
    return self.opcode in ('dot', 'convolution') or '$gemm' in self.rest


# The instructions of a computation by name, in their order.
Computation = dict[str, Instruction]


class Module(NamedTuple):
  """A compiled program: its computations by name, and the first of them."""

  computations: dict[str, Computation]
  entry: Computation


def parse(text: str) -> Module:
  """Reads the result of `jax.stages.Compiled.as_text`."""
  computations, entry = {}, {}
  for first, label, body in _COMPUTATION.findall(text):
    computations[label] = instructions = {}
    for name, kind, opcode, inside, rest in _INSTRUCTION.findall(body):
      operands = (inside,)
      if opcode not in ('constant', 'parameter'):
        operands = tuple(re.findall(r'%([\w.\-]+)', inside))
      instructions[name] = Instruction(name, kind, opcode, operands, rest)
    entry = instructions if first else entry
  return Module(computations, entry)


def arrays(kind: str) -> list[tuple[tuple[int, ...], int]]:
  """Shape and bytes, without padding, of each array of a type."""
  return [
    (shape, max(int(bits or 8) // 8, 1) * math.prod(shape))
    for bits, text in _ARRAY.findall(kind)
    for shape in [dimensions(text)]
  ]


def size(kind: str) -> int:
  """Bytes of a type, which may be a tuple."""
  return sum(count for _, count in arrays(kind))


def shape(kind: str) -> tuple[int, ...]:
  """Dimensions of an array's type."""
  return arrays(kind)[0][0]


def dimensions(text: str) -> tuple[int, ...]:
  """'8,128' → (8, 128)."""
  return tuple(int(x) for x in text.split(',') if x)


Execution = tuple[Computation, Instruction, float]


def executions(
  module: Module, steps: tuple[float, ...] = ()
) -> list[Execution]:
  """Returns each instruction, its computation and how often it is executed.

  Every branch of a conditional counts.

  Args:
    module: the program.
    steps: iterations of the innermost loops that multiply matrices and have no
      known count, in their order; 0 for further ones.  Other loops without a
      known count count once.
  """
  counts, loops = list(steps), 0

  def walk(computation: Computation) -> list[Execution]:
    nonlocal loops
    result = []
    for instruction in computation.values():
      result.append((computation, instruction, 1.0))
      outer, inner, times = loops, [], 1
      if instruction.opcode in _CALLS:
        called = ' '.join(_CALLED.findall(instruction.rest))
        for name in re.findall(r'[\w.\-]+', called):
          inner += walk(module.computations[name])
      if instruction.opcode == 'while':
        times = trip_count(module, computation, instruction)
        if times is None:
          times = 1
          if loops == outer and any(x.multiplies for _, x, _ in inner):
            loops += 1
            times = counts.pop(0) if counts else 0
      result += [(within, x, times * count) for within, x, count in inner]
    return result

  return walk(module.entry)


def trip_count(
  module: Module, computation: Computation, loop: Instruction
) -> int | None:
  """Returns how often a loop's body is executed at most; None if unknown.

  XLA records it for CPUs and GPUs.  For TPUs it is the range of the counter
  that the condition compares with a constant; in JAX's loops it grows by 1.
  """
  known = loop.attribute(r'known_trip_count\W+n\W+(\d+)')
  if known:
    return int(known)
  condition = module.computations[loop.attribute(r'condition=%?([\w.\-]+)')]
  state = _origin(computation, loop.operands[0])
  for compare in condition.values():
    if compare.opcode == 'compare' and 'direction=LT' in compare.rest:
      counter, last = (_origin(condition, x) for x in compare.operands)
      index = counter.attribute(r'index=(\d+)')
      if last.opcode == 'constant' and index and state.opcode == 'tuple':
        first = _origin(computation, state.operands[int(index)])
        if first.opcode == 'constant':
          return max(int(last.operands[0]) - int(first.operands[0]), 0)
  return None


def _origin(computation: Computation, name: str) -> Instruction:
  """Returns the instruction that computes a value, looking through copies."""
  while computation[name].opcode in _COPIES:
    name = computation[name].operands[0]
  return computation[name]
