"""Placement of arrays: a mesh of devices, a table of parameters, two layouts.

A mesh has the axes 'data', 'fsdp' and 'tensor'.  Rows (prompts and their
responses) are spread over data × fsdp.  Parameters, gradients and optimiser
state are split over fsdp and tensor for training, and over tensor alone for
sampling, which reads them once per token.

Code runs under `jax.set_mesh(mesh)`.  Without a mesh, every function here
leaves arrays as they are.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.errors import UserError

Array = jax.Array

DATA, FSDP, TENSOR = AXES = 'data', 'fsdp', 'tensor'
ROWS = DATA, FSDP

# Parameter → the axes of its last dimensions; a leaf under 'layers' also has
# the layers' dimension in front, which is never split.  Parameters that match
# no line are small and whole on every device.
_TABLE = (
  (r'(embed|head)/embedding', (TENSOR, FSDP)),
  (r'positions/embedding', (None, FSDP)),
  (r'attention/(query|key|value)/kernel', (FSDP, TENSOR)),
  (r'attention/(query|key|value)/bias', (TENSOR,)),
  (r'attention/out/kernel', (TENSOR, FSDP)),
  (r'mlp/(gate|up)/kernel', (FSDP, TENSOR)),
  (r'mlp/(gate|up)/bias', (TENSOR,)),
  (r'mlp/down/kernel', (TENSOR, FSDP)),
)

LAYOUTS = {'training': (FSDP, TENSOR), 'sampling': (TENSOR,)}


def make_mesh(
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Creates a mesh of all devices.

  Args:
    data, fsdp, tensor: devices along each axis; −1, for one of them, takes
      those that the others leave.
    devices: these instead of all.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = {DATA: data, FSDP: fsdp, TENSOR: tensor}
  product = math.prod(size for size in sizes.values() if size != -1)
  open_axes = [name for name, size in sizes.items() if size == -1]
  bad = any(size < 1 and size != -1 for size in sizes.values())
  if bad or len(open_axes) > 1 or len(devices) % product:
    raise _no_mesh(sizes, len(devices))
  if open_axes:
    sizes[open_axes[0]] = len(devices) // product
  elif product != len(devices):
    raise _no_mesh(sizes, len(devices))
  # Splits physical axes if necessary: a tensor axis of 8 on a 4x4x4 torus.
  grid = mesh_utils.create_device_mesh(
    tuple(sizes.values()), devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _no_mesh(sizes: dict[str, int], count: int) -> UserError:
  divisors = [n for n in range(1, count + 1) if count % n == 0]
  shown = ', '.join(f'{name} {size}' for name, size in sizes.items())
  return UserError(
    f'a mesh of {shown} does not hold {count} devices\n'
    f'let the axes multiply to {count}: each of {divisors}, one of them -1 '
    'for the rest'
  )


def on_own_device() -> contextlib.AbstractContextManager:
  """Restricts the code within to this process's first device."""
  if jax.sharding.get_mesh().empty:
    return contextlib.nullcontext()
  return jax.set_mesh(make_mesh(devices=jax.local_devices()[:1]))


def mesh_sizes() -> dict[str, int]:
  """Returns the devices along each axis of the mesh that XLA partitions over.

  Empty without a mesh; axes that `over_rows` has split already are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return {}
  return {
    name: size
    for name, size, kind in zip(
      mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
    )
    if kind == AxisType.Auto
  }


def row_devices() -> int:
  """Returns the number of devices that rows are spread over: data × fsdp."""
  sizes = mesh_sizes()
  return math.prod(sizes.get(name, 1) for name in ROWS)


def constrain(x: Array, *names: Any) -> Array:
  """Fixes the layout of an array under jit.

  Args:
    x: an array.
    *names: for each dimension an axis, a tuple of axes, or None for whole.
      Axes that do not divide the dimension are left out, the last ones first.
  """
  sizes = mesh_sizes()
  if not sizes:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(x.shape, names, sizes))


def _spec(shape, names, sizes: dict[str, int]) -> P:
  return P(*(_fit(n, d, sizes) for n, d in zip(names, shape, strict=True)))


def _fit(names, dimension: int, sizes: dict[str, int]):
  """Returns the first of an entry's axes that together divide a dimension."""
  if names is None:
    return None
  names = (names,) if isinstance(names, str) else names
  names = tuple(name for name in names if name in sizes)
  while names and dimension % math.prod(sizes[name] for name in names):
    names = names[:-1]
  return names or None


def tensor_shards(dimension: int) -> int:
  """Returns the number of tensor shards of a dimension."""
  size = mesh_sizes().get(TENSOR, 1)
  return 1 if dimension % size else size


def heads_axis(heads: int) -> str | None:
  """Returns 'tensor' if it divides a number of key heads, else None."""
  return TENSOR if tensor_shards(heads) > 1 else None


def row_axes(prompts: int, samples: int) -> tuple[tuple, tuple]:
  """Returns the axes that P prompts, and G responses of each, are spread over.

  Prompts take as many devices as divide them; responses the others.
  """
  sizes = mesh_sizes()
  axes = tuple(name for name in ROWS if name in sizes)
  size = lambda names: math.prod(sizes[name] for name in names)
  possible = [
    (axes[:i], axes[i:j])
    for i in range(len(axes), -1, -1)
    for j in range(len(axes), i - 1, -1)
    if prompts % size(axes[:i]) == 0 and samples % size(axes[i:j]) == 0
  ]
  return max(possible, key=lambda pair: size(pair[0] + pair[1]))


def row_spec(prompts: int, samples: int = 1) -> P:
  """Returns the PartitionSpec of arrays [P, G, ...]."""
  return P(*(axes or None for axes in row_axes(prompts, samples)))


def flat(spec: P) -> tuple | None:
  """Returns the axes of a `row_spec`'s P · G rows in one dimension."""
  entries = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
  return tuple(name for axes in entries for name in axes) or None


def shards(spec: P) -> int:
  """Returns the number of devices over which a `row_spec` spreads rows."""
  return math.prod(mesh_sizes()[name] for name in flat(spec) or ())


def check_rows(prompts: int, samples: int, name: str) -> None:
  """Raises UserError, with possible values, if devices would have no rows.

  Args:
    prompts, samples: P and G of a batch.
    name: the name of the number of prompts, for the message.
  """
  count = row_devices()

  def fits(number: int) -> bool:
    return shards(row_spec(number, samples)) == count

  if not fits(prompts):
    nearest = sorted(
      range(1, prompts + count + 1), key=lambda n: abs(n - prompts)
    )
    possible = sorted([n for n in nearest if fits(n)][:3])
    sizes = mesh_sizes()
    raise UserError(
      f'{name} is {prompts}: rows of {prompts} prompts with {samples} '
      f'responses do not spread over {count} devices '
      f'(data {sizes[DATA]} x fsdp {sizes[FSDP]})\nchoose one of {possible}, '
      'or another config.mesh'
    )


def constrain_rows(tree: Any) -> Any:
  """Spreads arrays [P, ...], or [P, G, ...] of three or more dimensions.

  Arrays without dimensions are unchanged.
  """
  if not mesh_sizes():
    return tree
  samples = [x.shape[1] for x in jax.tree.leaves(tree) if x.ndim > 2]

  def put(x):
    if not x.ndim:
      return x
    of_prompts, of_samples = row_axes(len(x), samples[0] if samples else 1)
    names = [of_prompts] + [None] * (x.ndim - 1)
    if x.ndim > 2:
      names[1] = of_samples
    return constrain(x, *names)

  return jax.tree.map(put, tree)


def over_rows(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """Runs a function on each device's own rows, without communication.

  Inside, only the tensor axis is left to XLA.  Without a mesh the function
  runs as it is.

  Args:
    function: takes only arrays.
    in_specs, out_specs: `PartitionSpec`s over data and fsdp, as in
      `jax.shard_map`.
  """
  if row_devices() == 1:
    return function
  return jax.shard_map(
    function,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=set(ROWS),
    check_vma=False,
  )


def column_spec(matrix: Array) -> P:
  """Returns the PartitionSpec of a matrix [V, D] for `gather_columns`."""
  if row_devices() == 1:
    return P(None, None)
  return P(None, _fit(FSDP, matrix.shape[1], mesh_sizes()))


def gather_columns(x: Array, spec: P, dtype) -> Array:
  """Gathers a whole matrix from its devices' columns, inside `over_rows`.

  Values travel in `dtype`; the gradient is summed over devices in float32.

  Args:
    x: [V, D / fsdp], or [V, D] where `spec` splits nothing.
    spec: from `column_spec`.
    dtype: that of the products that use it.
  """
  if spec[1] is None:
    return x
  return _gather_columns(x, jax.numpy.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_columns(x, dtype):
  # The rows stay split over tensor, also in transit.
  sent = constrain(x.astype(dtype), TENSOR, None)
  whole = jax.lax.all_gather(sent, FSDP, axis=1, tiled=True)
  return constrain(whole, TENSOR, None).astype(x.dtype)


def _scatter_columns(dtype, _, gradient):
  del dtype
  gradient = constrain(gradient, TENSOR, None)
  part = jax.lax.psum_scatter(gradient, FSDP, scatter_dimension=1, tiled=True)
  return (constrain(part, TENSOR, None),)


_gather_columns.defvjp(
  lambda x, dtype: (_gather_columns(x, dtype), None), _scatter_columns
)


def param_specs(tree: Any, layout: str, sizes: dict[str, int]) -> Any:
  """Returns PartitionSpecs for parameters, gradients or optimiser state.

  An axis that does not divide a dimension is left out there.

  Args:
    tree: arrays or their shapes.
    layout: 'training' or 'sampling'.
    sizes: sizes of the mesh's axes.
  """
  kept = {name: sizes[name] for name in LAYOUTS[layout] if name in sizes}

  def spec(path, leaf) -> P:
    names = _names(path)
    if names is None or len(leaf.shape) < len(names):
      return P()
    rest = (None,) * (len(leaf.shape) - len(names))
    return _spec(leaf.shape, rest + names, kept)

  return jax.tree_util.tree_map_with_path(spec, tree)


def _names(path) -> tuple | None:
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  for pattern, names in _TABLE:
    if re.search(rf'(^|/){pattern}$', name):
      return names
  return None


def constrain_params(tree: Any, layout: str = 'training') -> Any:
  """Fixes the layout of parameters, gradients or optimiser state under jit."""
  sizes = mesh_sizes()
  if not sizes:
    return tree
  specs = param_specs(tree, layout, sizes)
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def shardings(tree: Any) -> Any:
  """Returns parameters' `NamedSharding`s in training; None without a mesh."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return None
  specs = param_specs(tree, 'training', dict(mesh.shape))
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def with_shardings(tree: Any) -> Any:
  """Returns shapes of parameters or state with their shardings."""
  layouts = shardings(tree)
  if layouts is None:
    return tree
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    layouts,
  )


def place(tree: Any) -> Any:
  """Places parameters, equal on every process, on the mesh."""
  layouts = shardings(tree)
  return tree if layouts is None else jax.tree.map(_put, tree, layouts)


def place_rows(tree: Any) -> Any:
  """Places host arrays [P, ...] or [P, G, ...], the same everywhere, by rows.

  Each process hands its devices their own rows, by global index.  An array
  without dimensions is given to every device.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    # Unlike jnp.asarray, it compiles no program per shape.
    return jax.device_put(tree)

  def put(x):
    x = np.asarray(x)
    spec = P()
    if x.ndim:
      spec = row_spec(len(x), x.shape[1] if x.ndim > 2 else 1)
    return _put(x, NamedSharding(mesh, spec if x.ndim > 2 else P(*spec[:1])))

  return jax.tree.map(put, tree)


def _put(x, sharding: NamedSharding) -> Array:
  if isinstance(x, Array):
    if not x.is_fully_addressable:
      return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if sharding.is_fully_addressable:
      return jax.device_put(x, sharding)
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])


def to_host(tree: Any) -> Any:
  """Returns whole arrays as NumPy arrays, on every process.

  Every process must call it, and gets the same.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)
