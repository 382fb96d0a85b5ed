"""Paths in small random directed graphs: many answers are right.

One datum:

  {'prompt':   '013,120,230,301,2>1=',
   'solution': '301',
   'edges':    ['01', '03', '12', '10', '23', '20', '30', '31'],
   'start':    '2',
   'goal':     '1'}

'230' says that edges lead from node 2 to the nodes 3 and 0.  A solution lists
the nodes behind the start, one character each: a shortest path, or a careless
walk, which takes the first edge of each node and reaches the goal by chance.
"""

import itertools
import random
from collections.abc import Sequence

from jaxrl_llm.errors import UserError

ALPHABET = '0123456789,>='


def generate(
  count: int,
  seed: int,
  *,
  nodes: int = 10,
  degree: int = 2,
  distance: tuple[int, int] = (2, 8),
  most: int = 8,
  careless: float = 0.0,
) -> list[dict]:
  """Returns `count` rows, a function of the arguments.

  Args:
    count: number of rows.
    seed: of Python's generator.
    nodes: of each graph, at most 10.
    degree: edges that leave each node, to different other nodes.
    distance: least and greatest length of the shortest path, in steps.
    most: greatest length of a walk, in steps.
    careless: share of solutions that are careless walks.

  Raises:
    UserError: no graph satisfies this.
  """
  least, greatest = distance
  if not 1 <= degree < nodes <= 10 or not 1 <= least <= greatest <= most:
    raise UserError(
      f'paths.generate: nodes={nodes}, degree={degree}, distance={distance}, '
      f'most={most}\n1 <= degree < nodes <= 10 and 1 <= least <= greatest <= '
      'most must hold'
    )
  rng = random.Random(seed)
  rows, fruitless = [], 0
  while len(rows) < count:
    successors = [
      rng.sample([j for j in range(nodes) if j != i], degree)
      for i in range(nodes)
    ]
    start, goal = rng.sample(range(nodes), 2)
    remaining = _distances(successors, goal)
    if not least <= remaining[start] <= greatest:
      fruitless += 1
      if fruitless > 10_000:
        raise UserError(
          f'paths.generate: no path of {distance} steps with nodes={nodes}, '
          f'degree={degree}\nask for a shorter distance'
        )
      continue
    fruitless = 0
    walk, slips = [start], rng.random() < careless
    while walk[-1] != goal and len(walk) <= most:
      onward = successors[walk[-1]]
      walk.append(onward[0] if slips else min(onward, key=remaining.get))
    lists = [f'{i}{"".join(map(str, js))},' for i, js in enumerate(successors)]
    rows.append(
      {
        'prompt': f'{"".join(lists)}{start}>{goal}=',
        'solution': ''.join(map(str, walk[1:])),
        'edges': [f'{i}{j}' for i, js in enumerate(successors) for j in js],
        'start': str(start),
        'goal': str(goal),
      }
    )
  return rows


def _distances(successors: list[list[int]], goal: int) -> dict[int, float]:
  """Returns node → steps of its shortest path to the goal, or infinity."""
  found = {node: float('inf') for node in range(len(successors))} | {goal: 0}
  for _ in successors:
    for node, onward in enumerate(successors):
      steps = 1 + min(found[each] for each in onward)
      found[node] = min(found[node], steps)
  return found


def reaches_goal(
  completions: Sequence[str],
  edges: Sequence[list[str]],
  start: Sequence[str],
  goal: Sequence[str],
  most: int = 8,
  **kwargs,
) -> list[float]:
  """Reward: 1 for a path from start to goal of at most `most` edges.

  It ends where it first is at the goal.
  """
  return [
    float(
      0 < len(path) <= most
      and path.find(end) == len(path) - 1
      and {a + b for a, b in itertools.pairwise(first + path)} <= set(known)
    )
    for path, known, first, end in zip(
      completions, edges, start, goal, strict=True
    )
  ]
