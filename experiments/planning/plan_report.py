"""Tables, verdicts and advice of `experiments.planning.plan`."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from experiments.planning.hardware import GIB
from experiments.planning.memory_analysis import TooLarge
from experiments.planning.programs import Plan, Program

ASSUMPTIONS = (
  'responses have their full length, and branches write half of one',
  'matrix products, memory and links run at their peak',
  'computing overlaps with reading parameters and cache, not with sending',
  'reading activations, rewards and the host cost nothing',
)

Table = list[list[str]]
Numbers = dict[str, Any]


def text(told: Numbers) -> str:
  """Everything that a plan found, as Markdown.

  Args:
    told: of `as_dict`.
  """
  mesh = ', '.join(f'{name}={size}' for name, size in told['mesh'].items())
  rate = told['tokens'] / told['seconds']
  return '\n\n'.join(
    [
      f'{told["model"]} on {told["topology"]}, {told["chips"]} chips: mesh '
      f'{mesh}; a step of {told["prompts"]} prompts with {told["samples"]} '
      f'responses, {told["micro_prompts"]} prompts per micro-batch.',
      'GiB per chip:',
      markdown(memory_table(told)),
      'One iteration:',
      markdown(time_table(told)),
      'GB that a chip sends in one run of a program:',
      markdown(collective_table(told)),
      f'At best {told["seconds"]:.1f} s per iteration, {rate:,.0f} generated '
      f'tokens/s, {rate / told["chips"]:,.1f} per chip.',
      f'Assumptions: {"; ".join(ASSUMPTIONS)}.',
    ]
  )


def memory_table(told: Numbers) -> Table:
  """GiB per chip, a program per row, under a head."""
  names = [
    'parameters',
    'optimizer',
    'reference',
    'cache',
    'other',
    'temporary',
    'peak',
  ]
  rows = [['program', *names, 'limit']]
  for program in told['programs']:
    numbers = [program['memory'][name] for name in names]
    cells = [f'{number / GIB:.2f}' for number in (*numbers, told['limit'])]
    rows.append([program['name'], *cells])
  return rows


def time_table(told: Numbers) -> Table:
  """FLOPs and seconds per iteration, a program per row, under a head."""
  head = 'program,runs,TFLOP/chip,repeated,compute s,memory s,network s,'
  rows = [f'{head}seconds,compile s'.split(',')]
  for program in told['programs']:
    times, share = program['times'], '–'
    if program['asked']:
      found = program['computed'] * told['chips'] / program['asked']
      share = f'{found:.2f}'
    parts = [program[name] for name in ('compute', 'traffic', 'network')]
    rows.append(
      [
        program['name'],
        f'{times:g}',
        f'{times * program["computed"] / 1e12:.1f}',
        share,
        *(f'{times * part:.2f}' for part in parts),
        f'{program["seconds"]:.2f}',
        f'{program["compile_seconds"]:.0f}',
      ]
    )
  return rows


def collective_table(told: Numbers) -> Table:
  """What a chip sends in one run of each program, by kind, under a head."""
  rows = [['program', 'collective', 'chips', 'times', 'GB']]
  for program in told['programs']:
    for found in program['collectives']:
      if found['sent'] >= 1e7:
        rows.append(
          [
            program['name'],
            found['kind'],
            str(found['chips']),
            f'{found["times"]:,.0f}',
            f'{found["sent"] / 1e9:,.2f}',
          ]
        )
  return rows


def scaling_table(told: Sequence[Numbers]) -> Table:
  """The update on more and more chips, with as many rows on each.

  Efficiency is the time on the fewest chips over the time on these; without
  any overlap of sending, and with sending hidden behind computing as far as
  it can be.

  Args:
    told: of `as_dict`, with an update each, the fewest chips first.
  """
  rows = [
    [
      'chips',
      'prompts per update',
      'TFLOP/chip',
      'GB sent',
      'compute s',
      'network s',
      'efficiency',
      'if hidden',
    ]
  ]
  updates = [_update(numbers) for numbers in told]
  local = lambda x: max(x['compute'], x['traffic'])
  alone = lambda x: local(x) + x['network']
  hidden = lambda x: max(local(x), x['network'])
  for numbers, update in zip(told, updates, strict=True):
    sent = sum(found['sent'] for found in update['collectives'])
    rows.append(
      [
        str(numbers['chips']),
        str(numbers['prompts'] // numbers['minibatches']),
        f'{update["computed"] / 1e12:.1f}',
        f'{sent / 1e9:.1f}',
        f'{local(update):.3f}',
        f'{update["network"]:.3f}',
        f'{alone(updates[0]) / alone(update):.0%}',
        f'{hidden(updates[0]) / hidden(update):.0%}',
      ]
    )
  return rows


def _update(told: Numbers) -> Numbers:
  return next(x for x in told['programs'] if x['name'] == 'update')


def by_kind(program: Program) -> dict[tuple[str, int], tuple[float, float]]:
  """{(kind, chips of a group): (executions, bytes that a chip sends)}."""
  totals = defaultdict(lambda: (0.0, 0.0))
  for found in program.collectives:
    key = found.kind, len(found.group)
    times, sent = totals[key]
    totals[key] = times + found.times, sent + found.sent
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
    f'does not fit: {error.program} lacks at least {missing:.1f} GiB of '
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


def as_dict(plan: Plan, model: str) -> Numbers:
  """All numbers of a plan, as JSON has them: bytes, FLOPs and seconds.

  Args:
    plan: compiled.
    model: its name.
  """
  planned = plan.iteration
  return {
    'model': model,
    'topology': plan.topology.name,
    'chips': len(plan.topology.devices),
    'mesh': dict(plan.mesh.shape),
    'prompts': planned.prompts,
    'samples': planned.generation.samples,
    'minibatches': planned.minibatches,
    'micro_prompts': planned.micro_prompts,
    'limit': plan.limit,
    'seconds': plan.seconds,
    'tokens': plan.tokens,
    'programs': [_program(program) for program in plan.programs.values()],
  }


def _program(program: Program) -> Numbers:
  found = program._asdict()
  memory = found.pop('memory')._asdict()
  found['memory'] = memory.pop('resident')._asdict() | memory
  found['collectives'] = [
    {'kind': kind, 'chips': chips, 'times': times, 'sent': sent}
    for (kind, chips), (times, sent) in by_kind(program).items()
  ]
  return found | {'seconds': program.seconds}
