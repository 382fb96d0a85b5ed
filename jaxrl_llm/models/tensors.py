"""Between safetensors files and stacked parameters, tensor by tensor."""

import json
import pathlib
import re
from typing import NamedTuple

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
SHARD_BYTES = 5_000_000_000
# Buffers that older checkpoints store and nothing needs.
BUFFERS = re.compile(r'(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias)$')
FLOATS = ('F64', 'F32', 'F16', 'BF16')
# Heads: of the language model, and of the layout *ForSequenceClassification.
HEAD, SCORE = 'lm_head.weight', 'score.weight'


class Entry(NamedTuple):
  """Where a leaf of the parameters lies in a checkpoint.

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
    """Shape that the tensor has in the file."""
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
  """An Entry for every leaf of the parameters of `transformer.init`."""
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
    UserError: no or damaged files, a shard that is missing or lies elsewhere.
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
    """File of every tensor."""
    if (self.folder / SINGLE).is_file():
      return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
    index = self.folder / INDEX
    if index.is_file():
      try:
        located = dict(json.loads(index.read_text())['weight_map'])
      except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{index} is not an index of tensors.') from error
      for file in sorted(set(located.values())):
        if pathlib.PurePath(file).name != file or '\\' in file:
          raise UserError(f'{index} names a file outside its folder: {file!r}.')
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
      if not path.is_file():
        raise UserError(f'{path} is missing (named by {INDEX}).')
      try:
        self._files[file] = safetensors.safe_open(path, 'np')
      except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f'{path} is damaged: {error}.') from error
    return self._files[file]

  def names(self) -> dict[str, str]:
    """Name in the file by canonical name, without superfluous buffers."""
    return {
      key: name
      for key, (name, _) in self._names.items()
      if not BUFFERS.search(key)
    }

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of the tensor `name`."""
    return self._piece(name)[0]

  def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `name`, checked to be floating-point of `shape`."""
    self.check(name, shape)
    stored, file = self._names[_canonical(name)]
    return self._open(file).get_tensor(stored)

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises UserError unless `name` is floating-point of `shape`."""
    found, dtype = self._piece(name)
    if found != shape or dtype not in FLOATS:
      stored, file = self._names[_canonical(name)]
      raise UserError(
        f'Tensor {stored!r} of {self.folder / file} is {dtype} {list(found)}; '
        f'config.json asks for a float tensor {list(shape)}.'
      )

  def _piece(self, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the tensor `name`."""
    stored, file = self._names[_canonical(name)]
    try:
      piece = self._open(file).get_slice(stored)
    except safetensors.SafetensorError as error:
      raise UserError(
        f'{self.folder / file} lacks tensor {stored!r}, which {INDEX} '
        'places there.'
      ) from error
    return tuple(piece.get_shape()), piece.get_dtype()


def _canonical(name: str) -> str:
  return re.sub(r'^(model|transformer)\.', '', name)


def read(config: ModelConfig, folder: pathlib.Path, param_dtype) -> dict:
  """Parameters from a folder, one tensor in memory besides the result.

  Raises:
    UserError: a tensor is missing, unknown or has another shape.
  """
  reader = Reader(folder)
  table = entries(config)
  _check_names(config, reader, table)
  return _read(config, reader, table, param_dtype)


def check_trunk(config: ModelConfig, folder: pathlib.Path) -> None:
  """Raises UserError unless `read_trunk` would find what it reads."""
  reader = _trunk_reader(config, folder)
  for entry in entries(config):
    for i in range(config.num_layers if '{}' in entry.name else 1):
      reader.check(entry.name.format(i), entry.tensor_shape)


def read_trunk(
  config: ModelConfig, folder: pathlib.Path, param_dtype
) -> tuple[dict, np.ndarray | None]:
  """Parameters below the head, and the head of a model that gives one score.

  Args:
    config: tied, for a language model's head is not read.
    folder: of a language model, or of a *ForSequenceClassification.
    param_dtype: of the parameters.

  Returns:
    (parameters, score): [1, D] in its own dtype, or None for a language model.

  Raises:
    UserError: a tensor is missing, unknown or has another shape; the model
      gives more than one score.
  """
  reader = _trunk_reader(config, folder)
  params = _read(config, reader, entries(config), param_dtype)
  if SCORE not in reader.names():
    return params, None
  return params, reader.get(SCORE, (1, config.hidden_size))


def _trunk_reader(config: ModelConfig, folder: pathlib.Path) -> Reader:
  """A reader of a folder whose tensors are those of a trunk and its head."""
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


def _read(config, reader: Reader, table, param_dtype) -> dict:
  """The leaves of `table`."""
  params = {}
  for entry in table:
    leaf = np.empty(entry.shape, jnp.dtype(param_dtype))
    layered = '{}' in entry.name
    for i in range(config.num_layers if layered else 1):
      tensor = reader.get(entry.name.format(i), entry.tensor_shape)
      tensor = np.split(tensor, entry.parts, axis=-1)[entry.part]
      tensor = tensor.T if entry.transpose else tensor
      if layered:
        leaf[i] = tensor
      else:
        leaf[...] = tensor
    node = params
    for key in entry.path[:-1]:
      node = node.setdefault(key, {})
    node[entry.path[-1]] = jnp.asarray(leaf)
  return params


def _check_names(config, reader: Reader, table, extra_heads=()):
  """Raises UserError unless the tensors are those of `table`."""
  wanted = {
    _canonical(entry.name.format(i)): entry.name.format(i)
    for entry in table
    for i in range(config.num_layers if '{}' in entry.name else 1)
  }
  found = reader.names()
  missing = [name for key, name in wanted.items() if key not in found]
  if missing:
    raise UserError(f'{reader.folder} lacks {_some("tensor", missing)}.')
  extra = found.keys() - wanted.keys() - set(extra_heads)
  if config.tied and HEAD in extra:
    _check_tied(config, reader, table)
    extra -= {HEAD}
  if extra:
    names = sorted(found[key] for key in extra)
    raise UserError(
      f'{reader.folder} has {_some("tensor", names)}, for which a '
      f'{config.family} model with this config.json has no place.'
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
  shown = ', '.join(names[:3])
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return f'{noun}{"s" if len(names) > 1 else ""} {shown}{more}'


def _check_tree(table: list[Entry], params) -> None:
  """Raises UserError unless `params` are the leaves of `table`."""
  wanted = {entry.path: entry.shape for entry in table}
  found = {
    tuple(key.key for key in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  for path in sorted(wanted.keys() | found.keys()):
    if wanted.get(path) != found.get(path):
      raise UserError(
        f'Parameter {"/".join(path)} is {found.get(path, "absent")}; '
        f'the ModelConfig asks for {wanted.get(path, "none")}.'
      )


def write(
  config: ModelConfig, folder: pathlib.Path, params, score=None
) -> None:
  """Writes one file, or shards of up to `SHARD_BYTES` and their index.

  Each file is read back and compared, bit by bit.

  Args:
    config: of the parameters.
    folder: where to.
    params: as of `transformer.init`.
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
  if len(plan) == 1:
    _write_file(folder / SINGLE, plan[0], params)
    return
  located, total = {}, 0
  for i, shard in enumerate(plan):
    file = f'model-{i + 1:05}-of-{len(plan):05}.safetensors'
    total += _write_file(folder / file, shard, params)
    located |= dict.fromkeys([name for name, _, _ in shard], file)
  index = {'metadata': {'total_size': total}, 'weight_map': located}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _plan(config, table, params) -> list[list[tuple]]:
  """(tensor name, layer, its entries) for each tensor of each shard."""
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


def _write_file(path: pathlib.Path, shard, params) -> int:
  """Writes and verifies one file; returns its tensors' bytes."""
  arrays = {}
  for name, layer, parts in shard:
    pieces = []
    for entry in parts:
      leaf = _leaf(params, entry.path)
      piece = np.asarray(leaf if layer is None else leaf[layer])
      pieces.append(piece.T if entry.transpose else piece)
    # safetensors writes the memory as it lies, strides ignored.
    arrays[name] = np.ascontiguousarray(np.concatenate(pieces, axis=-1))
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
  return sum(array.nbytes for array in arrays.values())


def _leaf(params, path):
  for key in path:
    params = params[key]
  return params
