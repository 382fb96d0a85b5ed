"""Writes stacked parameters to safetensors files, tensor by tensor."""

import json
import pathlib

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from jaxrl_llm import processes
from jaxrl_llm.errors import UserError
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface.reading import (
  INDEX,
  SCORE,
  SINGLE,
  Entry,
  entries,
)

SHARD_BYTES = 5_000_000_000


def write_params(
  config: ModelConfig, folder: pathlib.Path, params, score=None
) -> None:
  """Writes one file, or shards of up to `SHARD_BYTES` and their index.

  Each file is read back and compared, bit by bit.  All processes call this and
  send their parts of each tensor to process 0, which alone writes.

  Args:
    config: of the parameters.
    folder: destination; used in process 0 only.
    params: as from `transformer.init`.
    score: [1, D], the head of a reward model.

  Raises:
    UserError: `params` are not those of `config`; the read-back differs.
  """
  table = entries(config)
  if score is not None:
    shape = (1, config.hidden_size)
    table.append(Entry(('score',), shape, SCORE, False, part=0, parts=1))
    params = {**params, 'score': score}
  _check_tree(table, params)
  plan = _plan(config, table, params)
  located, total = {}, 0
  for i, shard in enumerate(plan):
    file = SINGLE
    if len(plan) > 1:
      file = f'model-{i + 1:05}-of-{len(plan):05}.safetensors'
    # Process 0 may still be writing the previous file.
    processes.barrier(f'the export of {file}')
    arrays = _tensors(shard, params)
    if processes.is_main():
      _write_file(folder / file, arrays)
      total += sum(array.nbytes for array in arrays.values())
      located |= dict.fromkeys(arrays, file)
  if len(plan) == 1 or not processes.is_main():
    return
  index = {'metadata': {'total_size': total}, 'weight_map': located}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _plan(config, table, params) -> list[list[tuple]]:
  """Returns (tensor name, layer, its entries) for the tensors of each shard."""
  fused = {}
  for entry in table:
    fused.setdefault(entry.name, []).append(entry)
  shards, room = [[]], SHARD_BYTES
  for name, parts in fused.items():
    parts.sort(key=lambda entry: entry.part)
    width = _leaf(params, parts[0].path).dtype.itemsize
    size = int(np.prod(parts[0].tensor_shape)) * width
    layered = '{}' in name
    for i in range(config.num_layers if layered else 1):
      if size > room and shards[-1]:
        shards.append([])
        room = SHARD_BYTES
      room -= size
      layer = i if layered else None
      shards[-1].append((name.format(i), layer, parts))
  return shards


def _tensors(shard, params) -> dict[str, np.ndarray]:
  """Returns the tensors of a file in process 0, and none elsewhere."""
  arrays = {}
  for name, layer, parts in shard:
    pieces = []
    for entry in parts:
      leaf = _leaf(params, entry.path)
      piece = whole(leaf if layer is None else leaf[layer])
      pieces.append(piece.T if entry.transpose else piece)
    if processes.is_main():
      # safetensors writes the memory as it is and ignores strides.
      arrays[name] = np.ascontiguousarray(np.concatenate(pieces, axis=-1))
  return arrays


def whole(array) -> np.ndarray:
  """Gathers an array that processes may hold in parts; all must call this."""
  if getattr(array, 'is_fully_addressable', True):
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def _write_file(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes and verifies one file."""
  safetensors.numpy.save_file(arrays, path, metadata={'format': 'pt'})
  with safetensors.safe_open(path, 'np') as file:
    for name, array in arrays.items():
      stored = file.get_tensor(name)
      same = stored.dtype == array.dtype and stored.shape == array.shape
      if not same or stored.tobytes() != array.tobytes():
        raise UserError(
          f'{path} does not hold what was written (tensor {name!r}); '
          'check the disk.'
        )


def _leaf(params, path):
  for key in path:
    params = params[key]
  return params


def _check_tree(table: list[Entry], params) -> None:
  """Raises UserError unless `params` are the leaves of `table`."""
  wanted = {entry.path: entry.shape for entry in table}
  shapes = {
    tuple(key.key for key in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  for path in sorted(wanted.keys() | shapes.keys()):
    if wanted.get(path) != shapes.get(path):
      raise UserError(
        f'Parameter {"/".join(path)} is {shapes.get(path, "absent")}; '
        f'the ModelConfig asks for {wanted.get(path, "none")}.'
      )
