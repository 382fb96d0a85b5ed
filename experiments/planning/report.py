"""Tables of a plan's numbers, in Markdown."""

from typing import Any

from experiments.planning.topologies import GIB

ASSUMPTIONS = (
  'responses have their full length, and branches write half of one',
  'matrix products, memory and links run at their peak',
  'computing overlaps with reading parameters and cache, not with sending',
  'reading activations, rewards and the host cost nothing',
)


def text(numbers: dict[str, Any]) -> str:
  """Everything about a plan, from `Plan.numbers`."""
  mesh = ', '.join(f'{name}={size}' for name, size in numbers['mesh'].items())
  rate = numbers['tokens'] / numbers['seconds']
  return '\n\n'.join(
    [
      f'{numbers["model"]} on {numbers["topology"]}, {numbers["chips"]} chips: '
      f'mesh {mesh}; a step of {numbers["prompts"]} prompts with '
      f'{numbers["samples"]} responses, {numbers["micro_prompts"]} prompts per '
      'micro-batch.',
      'GiB per chip:',
      markdown(_memory(numbers)),
      'One iteration:',
      markdown(_times(numbers)),
      'GB that a chip sends in one run of a program:',
      markdown(_collectives(numbers)),
      f'At best {numbers["seconds"]:.1f} s per iteration, {rate:,.0f} '
      f'generated tokens/s, {rate / numbers["chips"]:,.1f} per chip.',
      f'Assumptions: {"; ".join(ASSUMPTIONS)}.',
    ]
  )


def _memory(numbers) -> list[list[str]]:
  names = 'parameters', 'optimizer', 'reference', 'cache', 'other', 'temporary'
  rows = [['program', *names, 'peak', 'limit']]
  for program in numbers['programs']:
    sizes = [program['memory'][name] for name in (*names, 'peak')]
    cells = [f'{size / GIB:.2f}' for size in (*sizes, numbers['limit'])]
    rows.append([program['name'], *cells])
  return rows


def _times(numbers) -> list[list[str]]:
  head = 'program,runs,TFLOP/chip,repeated,compute s,memory s,network s,'
  rows = [f'{head}seconds,compile s'.split(',')]
  for program in numbers['programs']:
    times, repeated = program['times'], '–'
    if program['asked']:
      computed = program['computed'] * numbers['chips']
      repeated = f'{computed / program["asked"]:.2f}'
    parts = [program[name] for name in ('compute', 'traffic', 'network')]
    rows.append(
      [
        program['name'],
        f'{times:g}',
        f'{times * program["computed"] / 1e12:.1f}',
        repeated,
        *(f'{times * part:.2f}' for part in parts),
        f'{program["seconds"]:.2f}',
        f'{program["compile_seconds"]:.0f}',
      ]
    )
  return rows


def _collectives(numbers) -> list[list[str]]:
  rows = [['program', 'collective', 'chips', 'times', 'GB']]
  for program in numbers['programs']:
    for x in program['collectives']:
      if x['sent'] >= 1e7:
        cells = f'{x["times"]:,.0f}', f'{x["sent"] / 1e9:,.2f}'
        rows.append([program['name'], x['kind'], str(x['chips']), *cells])
  return rows


def markdown(rows: list[list[str]]) -> str:
  """Aligns a table; columns after the first align to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

  def line(cells: list[str]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += map(str.rjust, cells[1:], widths[1:])
    return f'| {" | ".join(padded)} |'

  rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
  return '\n'.join([line(rows[0]), line(rule), *map(line, rows[1:])])
