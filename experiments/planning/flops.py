"""FLOPs of matrix products: of a program as written, and as compiled."""

import math
import re
from typing import NamedTuple

import numpy as np
from jax.extend import core

from experiments.planning import hlo


class Flops(NamedTuple):
  """Of the matrix products of a traced function, on all chips.

  Attributes:
    total: of all.
    kernels: of them those inside of Pallas kernels, which XLA does not see,
      with what a mask leaves out.
  """

  total: float
  kernels: float


def of_jaxpr(jaxpr, steps: tuple[float, ...] = ()) -> Flops:
  """FLOPs of the matrix products that a traced function asks for.

  `cost_analysis` counts the body of a scan once; here it counts as often as it
  is executed.  What rematerialisation computes again is counted again.

  Args:
    jaxpr: such as `jax.jit(f).trace(*args).jaxpr`.
    steps: of the `while` loops that multiply matrices, as `hlo.executed`.
  """
  left = list(steps)

  def count(jaxpr) -> np.ndarray:
    jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
    return sum(map(of_equation, jaxpr.eqns), np.zeros(2))

  def of_equation(equation) -> np.ndarray:
    name = equation.primitive.name
    if name == 'dot_general':
      return np.array([_dot_general(equation), 0.0])
    if name == 'while':
      body = equation.params['body_jaxpr']
      if _has_while_with_dots(body):
        return count(body)
      if not _has_dots(body):
        return np.zeros(2)
      return (left.pop(0) if left else 0) * count(body)
    if name == 'cond':
      # One of the branches is executed: the dearest, to be safe.
      return np.max([count(x) for x in equation.params['branches']], axis=0)
    found = sum(map(count, _inner(equation)), np.zeros(2))
    if name == 'pallas_call':
      found = np.repeat(found[:1], 2)
    return _times(equation) * found

  return Flops(*count(jaxpr).tolist())


def _times(equation) -> int:
  """How often an equation executes its jaxprs."""
  name, params = equation.primitive.name, equation.params
  if name == 'scan':
    return params['length']
  if name == 'pallas_call':
    return math.prod(params['grid_mapping'].grid)
  if name == 'shard_map':
    # Of one device, along the axes that it splits.
    sizes = params['mesh'].shape
    manual = 'manual_axes' if 'manual_axes' in params else 'newly_manual_axes'
    return math.prod(sizes[axis] for axis in params[manual])
  return 1


def _inner(equation):
  """The jaxprs that an equation executes."""
  for name, value in equation.params.items():
    if name in ('fwd_jaxpr_thunk', 'bwd', 'jvp_jaxpr_fun', 'cond_jaxpr'):
      continue
    values = value if isinstance(value, tuple | list) else (value,)
    for one in values:
      if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
        yield one


def _has_dots(jaxpr) -> bool:
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return any(
    equation.primitive.name == 'dot_general'
    or any(_has_dots(inner) for inner in _inner(equation))
    for equation in jaxpr.eqns
  )


def _has_while_with_dots(jaxpr) -> bool:
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  for equation in jaxpr.eqns:
    inner = list(_inner(equation))
    if equation.primitive.name == 'while' and any(map(_has_dots, inner)):
      return True
    if any(map(_has_while_with_dots, inner)):
      return True
  return False


def _dot_general(equation) -> float:
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  (out,) = equation.outvars
  return (
    2.0 * math.prod(out.aval.shape) * math.prod(left[i] for i in contracted)
  )


def of_module(module: hlo.Module, steps: tuple[float, ...] = ()) -> float:
  """FLOPs of the matrix products that each chip computes, but for kernels'.

  More than its share of `of_jaxpr` where chips compute the same.

  Args:
    module: the compiled program.
    steps: as for `hlo.executed`.
  """
  total = 0.0
  for place, found, times in hlo.executed(module, steps):
    if not times:
      continue
    computation = module.computations[place.computation]
    kinds = [computation[x].type for x in found.operands if x in computation]
    if found.opcode == 'dot':
      axes = found.attribute(r'lhs_contracting_dims=\{([\d,]*)\}')
      total += times * _product(found.type, kinds[0], hlo.dimensions(axes))
    elif found.opcode == 'custom-call' and '$gemm' in found.rest:
      axes = found.attribute(r'lhs_contracting_dimensions\W+([\d\W]*?)\]')
      axes = tuple(int(x) for x in re.findall(r'\d+', axes or ''))
      total += times * _product(found.type, kinds[0], axes)
    elif found.opcode == 'convolution':
      total += times * _convolution(found, *kinds[:2])
  return total


def _product(out: str, left: str, axes: tuple[int, ...]) -> float:
  size = hlo.shape(left)
  return 2.0 * math.prod(hlo.shape(out)) * math.prod(size[i] for i in axes)


def _convolution(found: hlo.Instruction, left: str, right: str) -> float:
  """TPUs multiply matrices as convolutions, batches as spatial axes."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', found.rest)
  inputs = dict(zip(labels[1], hlo.shape(left), strict=True))
  kernel = dict(zip(labels[2], hlo.shape(right), strict=True))
  out = dict(zip(labels[3], hlo.shape(found.type), strict=True))
  pairs = 1.0
  for i, name in enumerate(sorted(set(labels[1]) - {'b', 'f'})):
    low = int((_window(found, 'pad', i, '0_0')).split('_')[0])
    stride = int(_window(found, 'stride', i, '1'))
    inner = int(_window(found, 'rhs_dilate', i, '1'))
    outer = int(_window(found, 'lhs_dilate', i, '1'))
    at = np.arange(out[name])[:, None] * stride - low
    at = at + np.arange(kernel[name])[None] * inner
    last = (inputs[name] - 1) * outer
    pairs *= ((at >= 0) & (at <= last) & (at % outer == 0)).sum()
  return 2.0 * out['b'] * out['f'] * kernel['i'] * float(pairs)


def _window(found: hlo.Instruction, name: str, axis: int, default: str) -> str:
  inside = found.attribute(r'window=\{([^}]*)\}') or ''
  match = re.search(rf'\b{name}=(\S+)', inside)
  return match[1].split('x')[axis] if match else default
