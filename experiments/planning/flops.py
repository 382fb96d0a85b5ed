"""FLOPs of matrix products, as a program asks for them and as compiled."""

import math
import re

import numpy as np
from jax.extend import core

from experiments.planning import hlo


def of_jaxpr(jaxpr, steps: tuple[float, ...] = ()) -> tuple[float, float]:
  """FLOPs of matrix products in `jax.jit(f).trace(*args).jaxpr`, on all chips.

  Loops count as in `hlo.executions`, and rematerialisation counts again.

  Returns:
    All of them; and those within Pallas kernels, which XLA does not see.
  """
  counts, loops = list(steps), 0

  def count(jaxpr) -> np.ndarray:
    return sum(map(of_equation, jaxpr.eqns), np.zeros(2))

  def of_equation(equation) -> np.ndarray:
    nonlocal loops
    name, params, times = equation.primitive.name, equation.params, 1
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      out, operand = equation.outvars[0].aval, equation.invars[0].aval
      return np.array([_product(out.shape, operand.shape, contracted), 0.0])
    outer = loops
    inner = [count(jaxpr) for jaxpr in _inner(params)]
    if name == 'cond':
      # One branch is executed: the most expensive, to be safe.
      return np.max(inner, axis=0)
    total = sum(inner, np.zeros(2))
    if name == 'scan':
      times = params['length']
    elif name == 'while' and total[0] and loops == outer:
      loops += 1
      times = counts.pop(0) if counts else 0
    elif name == 'pallas_call':
      total = np.repeat(total[:1], 2)
      times = math.prod(params['grid_mapping'].grid)
    elif name == 'shard_map':
      # Its jaxpr is that of one device along the axes that it splits.
      key = 'manual_axes' if 'manual_axes' in params else 'newly_manual_axes'
      times = math.prod(params['mesh'].shape[axis] for axis in params[key])
    return times * total

  return tuple(count(jaxpr).tolist())


def _inner(params):
  """The jaxprs that an equation executes, but for the condition of a loop."""
  for name, value in params.items():
    for item in value if isinstance(value, tuple | list) else (value,):
      executed = isinstance(item, core.ClosedJaxpr | core.Jaxpr)
      if executed and name != 'cond_jaxpr':
        yield item


def _product(out, left, contracted) -> float:
  return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)


def of_executions(executions: list[hlo.Execution]) -> float:
  """FLOPs of a chip's matrix products outside of kernels.

  More than the chip's share of `of_jaxpr` where chips compute the same.
  """
  total = 0.0
  for computation, x, times in executions:
    if not times or not x.multiplies:
      continue
    left, right = (hlo.shape(computation[y].type) for y in x.operands[:2])
    out = hlo.shape(x.type)
    if x.opcode == 'convolution':
      total += times * _convolution(x, out, left, right)
    else:
      axes = x.attribute(r'lhs_contracting_dim(?:ension)?s\W+([\d\W]*?)[\]}]')
      axes = map(int, re.findall(r'\d+', axes or ''))
      total += times * _product(out, left, axes)
  return total


def _convolution(instruction: hlo.Instruction, out, left, right) -> float:
  """FLOPs of a TPU's matrix product, whose further axes are spatial.

  Each of these is a batch, is contracted, or belongs to one operand alone.
  """
  labels = instruction.attribute(r'dim_labels=(\w+->\w+)')
  lhs, rhs, result = re.split('_|->', labels)
  inputs, kernel, out = (
    dict(zip(names, sizes, strict=True))
    for names, sizes in ((lhs, left), (rhs, right), (result, out))
  )
  spatial = set(lhs) - {'b', 'f'}
  pairs = math.prod(max(inputs[x], kernel[x], out[x]) for x in spatial)
  return 2.0 * out['b'] * out['f'] * kernel['i'] * pairs
