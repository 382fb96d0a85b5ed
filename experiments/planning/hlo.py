"""Reads the text of a compiled program: its instructions and its loops.

XLA's own `cost_analysis` counts the body of a loop once and is absent for
GPUs; here every computation counts as often as it is executed.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {'pred': 1, 's4': 1, 'u4': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2}
_BYTES |= {'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8}
_BYTES |= {'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}

_HEADER = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?[\w.\-]+ = ')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_CALLED = re.compile(
  r'\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'\b(?:branch|called)_computations=\{([^}]*)\}')
# What passes a number on unchanged.
_COPIES = ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'copy-start')


class Instruction(NamedTuple):
  """One instruction.

  Attributes:
    name: unique within its computation.
    type: its result's, as text.
    opcode: such as 'all-gather'.
    operands: their names; of a constant or parameter the text in parentheses.
    rest: attributes, as text.
  """

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str

  def attribute(self, pattern: str) -> str | None:
    """What the first group of a pattern matches among the attributes."""
    match = re.search(pattern, self.rest)
    return match and match[1]


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program.

  Attributes:
    computations: {name: {name: instruction}}, in their order.
    entry: the name of the first.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str


class Place(NamedTuple):
  """A computation and how it was called.

  Attributes:
    computation: its name.
    caller: the place of the call; None of the entry.
    call: the instruction there.
  """

  computation: str
  caller: 'Place | None' = None
  call: Instruction | None = None


def parse(text: str) -> Module:
  """Reads `jax.stages.Compiled.as_text`."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if current is None:
      match = _HEADER.match(line)
      if match:
        current = computations.setdefault(match[2], {})
        entry = match[2] if match[1] else entry
    elif re.match(r'\}(?!\})', line):
      current = None
    elif _INSTRUCTION.match(line):
      # Others, such as `}}, metadata=…`, go on with a kernel's description.
      found = _instruction(line)
      current[found.name] = found
  return Module(computations, entry)


def _instruction(line: str) -> Instruction:
  name, _, rest = line.strip().removeprefix('ROOT ').partition(' = ')
  end = _closing(rest) if rest.startswith('(') else rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode, _, inside = rest.partition('(')
  end = _closing(rest[len(opcode) :]) + len(opcode)
  inside, rest = rest[len(opcode) + 1 : end - 1], rest[end:]
  operands = (inside,)
  if opcode not in ('constant', 'parameter'):
    operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  return Instruction(name.lstrip('%'), kind, opcode, operands, rest)


def _closing(text: str) -> int:
  """Where the parenthesis that a text begins with has been closed."""
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      return i + 1
  raise ValueError(f'parentheses do not match: {text[:80]}')


def size(kind: str) -> int:
  """Bytes of a type, tuples included, without a layout's padding."""
  return sum(
    _BYTES.get(dtype, 1) * math.prod(dimensions(shape))
    for dtype, shape in _ARRAY.findall(kind)
    if dtype in _BYTES or dtype.startswith('f8')
  )


def arrays(kind: str) -> list[str]:
  """The types of a tuple's arrays."""
  return [match[0] for match in _ARRAY.finditer(kind)]


def dimensions(shape: str) -> tuple[int, ...]:
  """'8,128' → (8, 128)."""
  return tuple(int(x) for x in shape.split(',') if x)


def shape(kind: str) -> tuple[int, ...]:
  """The dimensions of an array's type, of a tuple those of its first array."""
  return dimensions(_ARRAY.search(kind)[2])


def executed(
  module: Module, steps: tuple[float, ...] = ()
) -> Iterator[tuple[Place, Instruction, float]]:
  """Every instruction, with how often it is executed.

  A conditional's branches count once each.

  Args:
    module: the program.
    steps: of the loops that multiply matrices and do not tell how often, the
      innermost such, in their order; those left over count as never executed.
      Other loops that do not tell count once.
  """
  left = list(steps)

  def walk(place: Place, times: float):
    for found in module.computations[place.computation].values():
      yield place, found, times
      factor = times
      if found.opcode == 'while':
        trips = trip_count(module, place, found)
        body = found.attribute(r'\bbody=%?([\w.\-]+)')
        if trips is None and _is_innermost(module, place, found, body):
          trips = left.pop(0) if left else 0
        factor *= 1 if trips is None else trips
      for name in called(found):
        yield from walk(Place(name, place, found), factor)

  yield from walk(Place(module.entry), 1.0)


def called(found: Instruction) -> list[str]:
  """Computations that an instruction executes as a whole."""
  if found.opcode in ('while', 'call', 'fusion', 'conditional', 'async-start'):
    names = _CALLED.findall(found.rest)
    for listed in _BRANCHES.findall(found.rest):
      names += re.findall(r'%([\w.\-]+)', listed)
    return names
  return []


def _is_innermost(module, place, loop: Instruction, body: str) -> bool:
  """Whether a loop multiplies matrices, and no unknown loop within it does."""
  inner = Place(body, place, loop)
  return _multiplies(module, inner, loops=True) and not _multiplies(
    module, inner, loops=False
  )


def _multiplies(module: Module, place: Place, loops: bool) -> bool:
  """Whether matrices are multiplied: anywhere, or within unknown loops."""
  for found in module.computations[place.computation].values():
    if loops and found.opcode in ('dot', 'convolution'):
      return True
    if loops and '$gemm' in found.rest:
      return True
    anywhere = loops or (
      found.opcode == 'while' and trip_count(module, place, found) is None
    )
    for name in called(found):
      if _multiplies(module, Place(name, place, found), anywhere):
        return True
  return False


def trip_count(module: Module, place: Place, loop: Instruction) -> int | None:
  """How often a loop's body is executed, at most; None if it is not told.

  XLA's own finding where it wrote it down.  Otherwise the condition is looked
  through for a counter that stays below a constant; other conditions may end
  the loop before.
  """
  told = loop.attribute(r'known_trip_count\W+n\W+(\d+)')
  if told:
    return int(told)
  condition = loop.attribute(r'\bcondition=%?([\w.\-]+)')
  body = Place(loop.attribute(r'\bbody=%?([\w.\-]+)'), place, loop)
  for at, found in _reached(module, Place(condition, place, loop)):
    if found.opcode != 'compare' or 'direction=LT' not in found.rest:
      continue
    counter, bound = (_source(module, at, name) for name in found.operands)
    last = _constant(module, *bound)
    if last is None or counter[1].opcode != 'get-tuple-element':
      continue
    index = int(counter[1].attribute(r'index=(\d+)'))
    first = _constant(module, place, _element(module, place, loop, index))
    step = _step(module, body, index)
    if first is not None and step:
      return max(math.ceil((last - first) / step), 0)
  return None


def _reached(module: Module, place: Place):
  for found in module.computations[place.computation].values():
    yield place, found
    for name in called(found):
      yield from _reached(module, Place(name, place, found))


def _element(module, place, holder: Instruction, index: int):
  """The instruction that makes an element of a tuple, or of a loop's first."""
  made = module.computations[place.computation].get(holder.operands[0])
  if holder.opcode != 'while':
    made = holder
  while made and made.opcode in ('copy', 'opt-barrier', 'copy-done'):
    made = module.computations[place.computation].get(made.operands[0])
  if made is None or made.opcode != 'tuple':
    return None
  return module.computations[place.computation].get(made.operands[index])


def _source(module: Module, place: Place, name: str):
  """(place, instruction) that a number comes from, copies and calls undone."""
  found = module.computations[place.computation][name]
  while True:
    if found.opcode in _COPIES:
      found = module.computations[place.computation][found.operands[0]]
    elif found.opcode == 'parameter' and place.call and place.call.operands:
      if place.call.opcode == 'while':
        return place, found
      name = place.call.operands[int(found.operands[0])]
      place = place.caller
      found = module.computations[place.computation][name]
    else:
      return place, found


def _constant(module: Module, place: Place, found: Instruction | None):
  """The integer that an instruction gives, or None; loops' constants too."""
  while found is not None:
    place, found = _source(module, place, found.name)
    if found.opcode == 'constant':
      text = found.operands[0]
      return int(text) if re.fullmatch(r'-?\d+', text) else None
    if found.opcode != 'get-tuple-element':
      return None
    index = int(found.attribute(r'index=(\d+)'))
    holder = module.computations[place.computation][found.operands[0]]
    if holder.opcode == 'tuple':
      found = _element(module, place, holder, index)
    elif holder.opcode == 'parameter' and place.call is not None:
      loop, place = place.call, place.caller
      if loop.opcode != 'while' or not _is_kept(module, loop, index):
        return None
      found = _element(module, place, loop, index)
    else:
      return None
  return None


def _is_kept(module: Module, loop: Instruction, index: int) -> bool:
  """Whether a loop's body passes an element on as it is."""
  body = module.computations[loop.attribute(r'\bbody=%?([\w.\-]+)')]
  root = list(body.values())[-1]
  if root.opcode != 'tuple':
    return False
  found = body[root.operands[index]]
  while found.opcode in _COPIES:
    found = body[found.operands[0]]
  return found.attribute(r'index=(\d+)') == str(index)


def _step(module: Module, body: Place, index: int) -> int | None:
  """What a loop's body adds to an element of its state."""
  instructions = module.computations[body.computation]
  root = list(instructions.values())[-1]
  if root.opcode != 'tuple':
    return None
  place, found = _source(module, body, root.operands[index])
  while found.opcode == 'fusion':
    place = Place(called(found)[0], place, found)
    root = list(module.computations[place.computation].values())[-1]
    place, found = _source(module, place, root.name)
  if found.opcode != 'add':
    return None
  for name in found.operands:
    step = _constant(module, *_source(module, place, name))
    if step is not None:
      return step
  return None
