"""Reader of a compiled program's text: instructions and how often each runs.

XLA's own `cost_analysis` counts the body of a loop once and is absent for
GPUs; here every computation counts as often as it is executed.
"""

import math
import re
from typing import NamedTuple

_BYTES = {'pred': 1, 's4': 1, 'u4': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2}
_BYTES |= {'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8}
_BYTES |= {'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}

_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?[\w.\-]+ = ')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
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
  computations, entry, current = {}, {}, None
  for line in text.splitlines():
    if current is None:
      match = _HEADER.match(line)
      if match:
        current = computations.setdefault(match[2], {})
        entry = current if match[1] else entry
    elif re.match(r'\}(?!\})', line):
      current = None
    elif _INSTRUCTION.match(line):
      # Other lines, such as `}}, metadata=…`, continue a kernel's description.
      instruction = _instruction(line)
      current[instruction.name] = instruction
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  name, _, rest = line.strip().removeprefix('ROOT ').partition(' = ')
  end = _closing(rest) if rest.startswith('(') else rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition('(')
  rest = rest[len(opcode) :]
  end = _closing(rest)
  inside, rest = rest[1 : end - 1], rest[end:]
  operands = (inside,)
  if opcode not in ('constant', 'parameter'):
    operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  return Instruction(name.lstrip('%'), kind, opcode, operands, rest)


def _closing(text: str) -> int:
  """Returns the end of the parenthesis that a text begins with."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      return i + 1
  raise ValueError(f'parentheses do not match: {text[:80]}')


def arrays(kind: str) -> list[tuple[tuple[int, ...], int]]:
  """Shape and bytes, without padding, of each array of a type."""
  return [
    (dimensions(text), width * math.prod(dimensions(text)))
    for dtype, text in _ARRAY.findall(kind)
    for width in [_BYTES.get(dtype, int(dtype.startswith('f8')))]
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
      for name in _callees(instruction):
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


def _callees(instruction: Instruction) -> list[str]:
  """Names of the computations that an instruction executes as a whole."""
  if instruction.opcode not in _CALLS:
    return []
  return re.findall(r'[\w.\-]+', ' '.join(_CALLED.findall(instruction.rest)))


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
