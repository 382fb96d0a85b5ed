"""Reads safetensors files into stacked parameters, tensor by tensor."""

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
# Unused buffers that older checkpoints store.
BUFFERS = re.compile(r'(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias)$')
FLOATS = ('F64', 'F32', 'F16', 'BF16')
# Heads: of the language model, and of the layout *ForSequenceClassification.
HEAD, SCORE = 'lm_head.weight', 'score.weight'


class Entry(NamedTuple):
  """Location of a leaf of the parameters in a checkpoint.

  Attributes:
    path: keys of the leaf, for example ('embed', 'embedding').
    shape: of the leaf.
    name: of the tensor; with '{}' for the layer where there is one for each.
    transpose: the tensor is [out, in], the leaf [in, out].
    part, parts: the leaf is the part-th of this many equal parts of the
      tensor's last axis.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  name: str
  transpose: bool
  part: int
  parts: int

  @property
  def tensor_shape(self) -> tuple[int, ...]:
    """Shape of the tensor in the file."""
    shape = self.shape[1:] if '{}' in self.name else self.shape
    if self.transpose:
      shape = shape[::-1]
    return (*shape[:-1], shape[-1] * self.parts)


_ROTARY = {
  'embed': 'model.embed_tokens',
  'norm': 'model.norm',
  'head': 'lm_head',
  'attention_norm': 'input_layernorm',
  'mlp_norm': 'post_attention_layernorm',
  'attention/query': 'self_attn.q_proj',
  'attention/key': 'self_attn.k_proj',
  'attention/value': 'self_attn.v_proj',
  'attention/out': 'self_attn.o_proj',
  'attention/query_norm': 'self_attn.q_norm',
  'attention/key_norm': 'self_attn.k_norm',
  'mlp/gate': 'mlp.gate_proj',
  'mlp/up': 'mlp.up_proj',
  'mlp/down': 'mlp.down_proj',
}
_GEMMA = {
  **_ROTARY,
  'attention_post_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'mlp_post_norm': 'post_feedforward_layernorm',
}
_GPT2 = {
  'embed': 'transformer.wte',
  'positions': 'transformer.wpe',
  'norm': 'transformer.ln_f',
  'head': 'lm_head',
  'attention_norm': 'ln_1',
  'mlp_norm': 'ln_2',
  'attention/query': 'attn.c_attn',
  'attention/key': 'attn.c_attn',
  'attention/value': 'attn.c_attn',
  'attention/out': 'attn.c_proj',
  'mlp/up': 'mlp.c_fc',
  'mlp/down': 'mlp.c_proj',
}
_FUSED = {'attention/query': 0, 'attention/key': 1, 'attention/value': 2}


def entries(config: ModelConfig) -> list[Entry]:
  """Returns an Entry for every leaf of the parameters of `transformer.init`."""
  shapes = jax.eval_shape(
    lambda key: transformer.init(config, key), jax.random.key(0)
  )
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  return [
    _entry(config, tuple(key.key for key in path), leaf.shape)
    for path, leaf in leaves
  ]


def _entry(config, path, shape) -> Entry:
  gpt2 = config.family == 'gpt2'
  gemma = config.family.startswith('gemma')
  names = _GPT2 if gpt2 else _GEMMA if gemma else _ROTARY
  *module, leaf = path
  layered = module[0] == 'layers'
  key = '/'.join(module[layered:])
  block = 'transformer.h.{}.' if gpt2 else 'model.layers.{}.'
  name = (block if layered else '') + names[key]
  name += '.bias' if leaf == 'bias' else '.weight'
  fused = gpt2 and key in _FUSED
  return Entry(
    path=path,
    shape=shape,
    name=name,
    transpose=leaf == 'kernel' and not gpt2,
    part=_FUSED[key] if fused else 0,
    parts=3 if fused else 1,
  )


class Reader:
  """The tensors of a folder's safetensors files, by canonical name.

  A name may lack or have the family's prefix ('model.' or 'transformer.').

  Raises:
    UserError: files are missing or damaged; a shard is missing or elsewhere.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._files = {}
    self._names = {}
    for name, file in self._locate().items():
      key = _canonical(name)
      if key in self._names:
        raise UserError(
          f'{folder} has tensor {key!r} twice: {self._names[key][0]!r} '
          f'and {name!r}.'
        )
      self._names[key] = name, file

  def _locate(self) -> dict[str, str]:
    """Returns the file of every tensor."""
    if (self.folder / SINGLE).is_file():
      return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
    index = self.folder / INDEX
    if index.is_file():
      try:
        located = dict(json.loads(index.read_text())['weight_map'])
        located = {name: str(file) for name, file in located.items()}
      except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{index} is not an index of tensors.') from error
      for file in sorted(set(located.values())):
        alone = pathlib.PurePath(file).name == file and '\\' not in file
        if not alone or not file.isprintable():
          raise UserError(
            f'{index} names a file outside its folder: {file!r:.200}.'
          )
        stored = self._open(file).keys()
        located = {**dict.fromkeys(stored, file), **located}
      return located
    if list(self.folder.glob('*.bin')) or list(self.folder.glob('*.pt*')):
      raise UserError(
        f'{self.folder} has only pickled weights, which can run code; '
        'convert them:\n  AutoModelForCausalLM.from_pretrained(...)'
        '.save_pretrained(...) in transformers writes safetensors.'
      )
    raise UserError(f'{self.folder} has neither {SINGLE} nor {INDEX}.')

  def _open(self, file: str):
    if file not in self._files:
      path = self.folder / file
      # Not `path.is_file()`, which raises if a name is too long.
      if not os.path.isfile(path):
        path = self.folder / file[:200]
        raise UserError(f'{path} is missing (named by {INDEX}).')
      try:
        self._files[file] = safetensors.safe_open(path, 'np')
      except (safetensors.SafetensorError, OSError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{path} is damaged: {reason}.') from error
    return self._files[file]

  def names(self) -> dict[str, str]:
    """Returns names in the files by canonical name, without unused buffers."""
    return {
      key: name
      for key, (name, _) in self._names.items()
      if not BUFFERS.search(key)
    }

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of the tensor `name`."""
    return tuple(self._piece(name).get_shape())

  def get(
    self,
    name: str,
    shape: tuple[int, ...],
    index: tuple[slice, ...] = (slice(None),),
  ) -> np.ndarray:
    """Reads a slice of the tensor `name`, which `check` accepts."""
    return self.check(name, shape)[index]

  def check(self, name: str, shape: tuple[int, ...]) -> Any:
    """Returns the unread tensor `name`.

    Raises:
      UserError: it is missing, or not floating-point of `shape`.
    """
    piece = self._piece(name)
    size, dtype = piece.get_shape(), piece.get_dtype()
    if tuple(size) != shape or dtype not in FLOATS:
      stored, file = self._names[_canonical(name)]
      raise UserError(
        f'Tensor {stored!r:.200} of {self.folder / file} is {dtype} {size}; '
        f'config.json asks for a float tensor {list(shape)}.'
      )
    return piece

  def _piece(self, name: str) -> Any:
    """Returns the unread tensor `name` of any shape and dtype."""
    stored, file = self._names[_canonical(name)]
    try:
      return self._open(file).get_slice(stored)
    except safetensors.SafetensorError as error:
      raise UserError(
        f'{self.folder / file} lacks tensor {stored!r}, which {INDEX} '
        'places there.'
      ) from error


def _canonical(name: str) -> str:
  return re.sub(r'^(model|transformer)\.', '', name)


def read_params(
  config: ModelConfig, folder: pathlib.Path, param_dtype, shardings=None
) -> dict:
  """Reads parameters from a folder.

  Besides the result, it needs host memory for one tensor; with shardings, for
  one device's part of a leaf and that part's share of one tensor.

  Args:
    config: of the model.
    folder: with safetensors.
    param_dtype: of the parameters.
    shardings: tree of them like the parameters; a process reads its devices'
      parts only.  None puts all on the default device.

  Raises:
    UserError: a tensor is missing, unknown or has another shape.
  """
  reader = Reader(folder)
  table = entries(config)
  _check_names(config, reader, table)
  return _read(reader, table, param_dtype, shardings)


def check_trunk(config: ModelConfig, folder: pathlib.Path) -> None:
  """Raises UserError unless `read_trunk` could read the folder."""
  reader = _trunk_reader(config, folder)
  for entry in entries(config):
    for i in range(config.num_layers if '{}' in entry.name else 1):
      reader.check(entry.name.format(i), entry.tensor_shape)


def read_trunk(
  config: ModelConfig, folder: pathlib.Path, param_dtype, shardings=None
) -> tuple[dict, np.ndarray | None]:
  """Reads parameters below the head, and the head of a model with one score.

  Args:
    config: tied, because a language model's head is not read.
    folder: of a language model, or of a *ForSequenceClassification.
    param_dtype, shardings: of the parameters, as for `read_params`.

  Returns:
    (parameters, score): [1, D] in its own dtype, or None for a language model.

  Raises:
    UserError: a tensor is missing, unknown or has another shape; the model
      outputs more than one score.
  """
  reader = _trunk_reader(config, folder)
  params = _read(reader, entries(config), param_dtype, shardings)
  if SCORE not in reader.names():
    return params, None
  return params, reader.get(SCORE, (1, config.hidden_size))


def _trunk_reader(config: ModelConfig, folder: pathlib.Path) -> Reader:
  """Opens a folder whose tensors are those of a trunk and its head."""
  reader = Reader(folder)
  _check_names(config, reader, entries(config), extra_heads=(HEAD, SCORE))
  if SCORE in reader.names():
    labels = reader.shape(SCORE)[0]
    if labels != 1:
      raise UserError(
        f'{folder} gives {labels} scores (num_labels).\n'
        'A value is one number: use a model trained with num_labels=1.'
      )
    reader.check(SCORE, (1, config.hidden_size))
  return reader


def _read(reader: Reader, table, param_dtype, shardings) -> dict:
  """Reads the leaves of `table`."""
  params = {}
  for entry in table:
    node, place = params, shardings
    for key in entry.path[:-1]:
      node = node.setdefault(key, {})
    for key in entry.path if shardings is not None else ():
      place = place[key]
    if place is None:
      whole = (slice(None),) * len(entry.shape)
      leaf = jnp.asarray(_read_part(reader, entry, whole, param_dtype))
    else:
      leaf = _read_sharded(reader, entry, place, param_dtype)
    node[entry.path[-1]] = leaf
  return params


def _read_sharded(reader: Reader, entry: Entry, sharding, param_dtype):
  """Reads the parts of a leaf that this process's devices hold."""
  holders = {}
  for device, index in sharding.addressable_devices_indices_map(
    entry.shape
  ).items():
    spans = [
      part.indices(n) for part, n in zip(index, entry.shape, strict=True)
    ]
    holders.setdefault(tuple(spans), []).append(device)
  arrays = []
  for spans, devices in holders.items():
    index = tuple(slice(*span) for span in spans)
    part = _read_part(reader, entry, index, param_dtype)
    arrays += [jax.device_put(part, device) for device in devices]
    # This part leaves the host before the next one is read.
    jax.block_until_ready(arrays)
  return jax.make_array_from_single_device_arrays(entry.shape, sharding, arrays)


def _read_part(reader: Reader, entry: Entry, index, param_dtype) -> np.ndarray:
  """Reads the part of a leaf at slices of step 1, one for each of its axes."""
  spans = [part.indices(n) for part, n in zip(index, entry.shape, strict=True)]
  part = np.empty(
    [stop - start for start, stop, _ in spans], jnp.dtype(param_dtype)
  )
  if '{}' not in entry.name:
    part[...] = _read_tensor(reader, entry, entry.name, spans)
    return part
  for i, layer in enumerate(range(*spans[0])):
    name = entry.name.format(layer)
    part[i] = _read_tensor(reader, entry, name, spans[1:])
  return part


def _read_tensor(reader: Reader, entry: Entry, name: str, spans) -> np.ndarray:
  """Reads a leaf's part of one tensor, in the order of the leaf's axes."""
  shape = entry.tensor_shape
  slices = [slice(start, stop) for start, stop, _ in spans]
  if entry.transpose:
    return reader.get(name, shape, tuple(slices[::-1])).T
  offset = entry.part * (shape[-1] // entry.parts)
  last = slices[-1]
  slices[-1] = slice(last.start + offset, last.stop + offset)
  return reader.get(name, shape, tuple(slices))


def _check_names(config, reader: Reader, table, extra_heads=()):
  """Raises UserError unless the tensors are those of `table`."""
  wanted = {
    _canonical(entry.name.format(i)): entry.name.format(i)
    for entry in table
    for i in range(config.num_layers if '{}' in entry.name else 1)
  }
  stored = reader.names()
  missing = [name for key, name in wanted.items() if key not in stored]
  if missing:
    raise UserError(f'{reader.folder} lacks {_some("tensor", missing)}.')
  extra = stored.keys() - wanted.keys() - set(extra_heads)
  if config.tied and HEAD in extra:
    _check_tied(config, reader, table)
    extra -= {HEAD}
  if extra:
    names = sorted(stored[key] for key in extra)
    raise UserError(
      f'{reader.folder} has {_some("tensor", names)}, which a '
      f'{config.family} model with this config.json does not use.'
    )


def _check_tied(config, reader: Reader, table):
  shape = config.vocab_size, config.hidden_size
  [embed] = [e.name for e in table if e.path == ('embed', 'embedding')]
  head = reader.get(HEAD, shape)
  if not np.array_equal(head, reader.get(embed, shape)):
    raise UserError(
      f'{reader.folder} has a head ({HEAD}) that differs from the '
      f'embedding, but config.json ties them.\nPass tied=False to keep both.'
    )


def _some(noun: str, names: list[str]) -> str:
  # Names of tensors in a file may contain anything.
  shown = ', '.join(
    name.encode('unicode_escape').decode()[:200] for name in names[:3]
  )
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return f'{noun}{"s" if len(names) > 1 else ""} {shown}{more}'
