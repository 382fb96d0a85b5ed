"""Tables, verdicts and advice of `experiments.plan`."""

import math
from collections import defaultdict
from typing import Any

from jaxrl_llm.planning.hardware import GIB
from jaxrl_llm.planning.memory import TooLarge
from jaxrl_llm.planning.programs import Plan, Program

ASSUMPTIONS = (
  'responses have their full length, and branches write half of one',
  'matrix products, memory and links run at their peak',
  'computing overlaps with reading parameters and cache, not with sending',
  'activations, rewards, the host and resharding between layouts cost nothing',
)

Table = list[list[str]]


def text(plan: Plan) -> str:
  """Everything that a plan found, as Markdown."""
  topology = plan.topology
  mesh = ', '.join(f'{name}={size}' for name, size in plan.mesh.shape.items())
  chips = len(topology.devices)
  rate = plan.tokens / plan.seconds
  return '\n\n'.join(
    [
      f'{topology.name}: {chips} chips, mesh {mesh}',
      'GiB per chip:',
      markdown(memory_table(plan)),
      'One iteration:',
      markdown(time_table(plan)),
      'Bytes that a chip sends in one run of a program:',
      markdown(collective_table(plan)),
      f'At best {plan.seconds:.1f} s per iteration, {rate:,.0f} generated '
      f'tokens/s, {rate / chips:,.1f} per chip.',
      f'Assumptions: {"; ".join(ASSUMPTIONS)}.',
    ]
  )


def memory_table(plan: Plan) -> Table:
  """GiB per chip, a program per row, under a head."""
  head = 'program,parameters,optimizer,reference,cache,other,temporary,peak,'
  rows = [f'{head}limit'.split(',')]
  for program in plan.programs.values():
    found = program.memory
    numbers = [*found.resident, found.cache, found.arguments, found.temporary]
    numbers += [found.peak, plan.limit]
    rows.append([program.name, *(f'{number / GIB:.2f}' for number in numbers)])
  return rows


def time_table(plan: Plan) -> Table:
  """FLOPs and seconds per iteration, a program per row, under a head."""
  head = 'program,runs,TFLOP/chip,repeated,compute s,memory s,network s,'
  rows = [f'{head}seconds,compile s'.split(',')]
  chips = len(plan.topology.devices)
  for program in plan.programs.values():
    times = program.times
    share = '–'
    if program.asked:
      share = f'{program.computed * chips / program.asked:.2f}'
    parts = program.compute, program.traffic, program.network
    rows.append(
      [
        program.name,
        f'{times:g}',
        f'{times * program.computed / 1e12:.1f}',
        share,
        *(f'{times * part:.2f}' for part in parts),
        f'{program.seconds:.2f}',
        f'{program.compile_seconds:.0f}',
      ]
    )
  return rows


def collective_table(plan: Plan) -> Table:
  """What a chip sends in one run of each program, by kind, under a head."""
  rows = [['program', 'collective', 'chips', 'times', 'GB']]
  for program in plan.programs.values():
    for (kind, chips), (times, sent) in by_kind(program).items():
      if sent >= 1e7:
        cells = kind, str(chips), f'{times:,.0f}', f'{sent / 1e9:,.2f}'
        rows.append([program.name, *cells])
  return rows


def by_kind(program: Program) -> dict[tuple[str, int], tuple[float, float]]:
  """{(kind, chips of a group): (executions, bytes that a chip sends)}."""
  totals = defaultdict(lambda: (0.0, 0.0))
  for found in program.collectives:
    times, sent = totals[found.kind, len(found.group)]
    totals[found.kind, len(found.group)] = (
      times + found.times,
      sent + found.sent,
    )
  return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def markdown(rows: Table) -> str:
  """A table; all columns but the first are right-aligned."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

  def line(cells: list[str]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += map(str.rjust, cells[1:], widths[1:])
    return f'| {" | ".join(padded)} |'

  rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
  return '\n'.join([line(rows[0]), line(rule), *map(line, rows[1:])])


def refusal(plan: Plan, error: TooLarge) -> str:
  """Three lines: what does not fit and by how much, why, and what to change."""
  # One decimal, never less than what is missing.
  missing = math.ceil(error.missing / GIB * 10) / 10
  kept = plan.resident
  program = plan.programs.get(error.program)
  parts = {
    'parameters': kept.parameters,
    'optimizer': kept.optimizer,
    'reference': kept.reference,
  }
  if error.program in ('sample', 'greedy', 'branch'):
    parts['parameters to sample with'] = plan.sampler
  if program is not None and program.memory.cache:
    parts['cache'] = program.memory.cache
  held = ', '.join(
    f'{name} {size / GIB:.1f}' for name, size in parts.items() if size
  )
  return (
    f'does not fit: {error.program} lacks {missing:.1f} GiB of '
    f'{plan.limit / GIB:.2f} GiB per chip of {plan.topology.name}\n'
    f'GiB per chip: {held}\n{_advice(plan, error.program)}'
  )


def _advice(plan: Plan, program: str) -> str:
  if plan.resident.all > plan.limit / 2:
    return (
      'the state alone is too large: take more chips, raise config.mesh.fsdp '
      'or .tensor, or hold parameters in bfloat16 (config.model.param_dtype)'
    )
  if program in ('sample', 'greedy', 'branch'):
    if plan.sampler > plan.limit / 3:
      return 'raise config.mesh.tensor, over which the sampler is split'
    return 'lower config.rollout.prompts, samples or max_tokens: the cache'
  return 'lower config.training.micro_prompts, or raise config.mesh.tensor'


def as_dict(plan: Plan) -> dict[str, Any]:
  """All numbers of a plan, for a JSON file: bytes, FLOPs and seconds."""
  return {
    'topology': plan.topology.name,
    'mesh': dict(plan.mesh.shape),
    'limit': plan.limit,
    'seconds': plan.seconds,
    'tokens': plan.tokens,
    'programs': [_program(program) for program in plan.programs.values()],
  }


def _program(program: Program) -> dict[str, Any]:
  found = program._asdict()
  memory = found.pop('memory')._asdict()
  found['memory'] = memory.pop('resident')._asdict() | memory
  found['collectives'] = [
    {'kind': kind, 'chips': chips, 'times': times, 'sent': sent}
    for (kind, chips), (times, sent) in by_kind(program).items()
  ]
  return found | {'seconds': program.seconds}
