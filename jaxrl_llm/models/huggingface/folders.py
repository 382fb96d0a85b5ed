"""Reads and writes Hugging Face folders of the models in `families`.

Only safetensors are read, never pickle, and no code of a checkpoint is run.
"""

import copy
import dataclasses
import json
import os
import pathlib
import re
import shutil

import jax

from jaxrl_llm.errors import UserError
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import families, reading, writing
from jaxrl_llm.models.huggingface.replacing import new_folder

CONFIG = 'config.json'
GENERATION = 'generation_config.json'
TOKENIZER_FILES = (
  *('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'),
  *('added_tokens.json', 'vocab.json', 'merges.txt', 'tokenizer.model'),
  'chat_template.jinja',
)
SPECIAL_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def load(path, param_dtype='float32', *, shardings=None, **overrides):
  """Reads config.json and safetensors.

  Args:
    path: a folder, or a name `org/model` on the Hugging Face hub.
    param_dtype: of the parameters; a float32 copy of bfloat16 is exact.
    shardings: tree of them like the parameters (`transformer.init` of
      `load_config` has their shapes); a process reads its devices' parts only.
      None puts all on the default device.
    **overrides: replace fields of the ModelConfig, such as dtype='bfloat16'.

  Returns:
    (ModelConfig, params).

  Raises:
    UserError: the folder is missing, the model is unsupported, or a tensor is
      missing, unknown or of another shape.
  """
  config = load_config(path, **overrides)
  return config, reading.read_params(
    config, resolve(path), param_dtype, shardings
  )


def load_config(path, **overrides) -> ModelConfig:
  """Reads config.json alone; arguments and errors as in `load`."""
  return families.read_config(_read_json(resolve(path) / CONFIG), **overrides)


def load_trunk_config(path, **overrides) -> ModelConfig:
  """Returns the ModelConfig of a folder's trunk and checks its tensor shapes.

  Args:
    path: a folder, or a name on the Hugging Face hub: a language model, or a
      reward model in the layout *ForSequenceClassification.
    **overrides: as in `load`.

  Raises:
    UserError: as `load`, or the model outputs more than one score.
  """
  folder = resolve(path)
  config = families.read_config(
    _read_json(folder / CONFIG), **{**overrides, 'tied': True}
  )
  reading.check_trunk(config, folder)
  return config


def load_trunk(
  path, config: ModelConfig, param_dtype='float32', shardings=None
):
  """Reads the parameters below the head.

  Args:
    path: as in `load_trunk_config`.
    config: from `load_trunk_config`.
    param_dtype, shardings: of the parameters, as for `load`.

  Returns:
    (params, score): score is the reward model's head [1, D], None for a
    language model.
  """
  return reading.read_trunk(config, resolve(path), param_dtype, shardings)


def resolve(path) -> pathlib.Path:
  """Returns the local folder of `path`, and downloads a model of the hub."""
  folder = pathlib.Path(path)
  # Not `folder.is_dir()`, which raises if a name is too long.
  if os.path.isdir(folder):
    return folder
  if os.path.exists(folder) or not re.fullmatch(r'[\w.-]+/[\w.-]+', str(path)):
    shown = str(folder.absolute())
    shown = shown if shown.isprintable() else repr(shown)
    raise UserError(
      f'There is no model folder {shown:.300}.\n'
      'Name a Hugging Face folder, or org/name of the hub.'
    )
  try:
    from huggingface_hub import snapshot_download
  except ImportError:
    raise UserError(
      f'There is no folder {folder.absolute()}; to download {path}, '
      'pip install huggingface_hub.'
    ) from None
  files = ['*.json', '*.safetensors', '*.txt', '*.model', '*.jinja']
  try:
    return pathlib.Path(snapshot_download(str(path), allow_patterns=files))
  except Exception as error:  # of the network, the hub, the disk
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'There is no folder {folder.absolute()}, and {path} could not be '
      f'downloaded: {reason}'
    ) from error


def _read_json(path: pathlib.Path) -> dict:
  if not path.is_file():
    raise UserError(
      f'{path.absolute()} is missing; is its folder a model folder?'
    )
  try:
    contents = json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {error}.') from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}.') from error
  if not isinstance(contents, dict):
    raise UserError(f'{path} is not a JSON object.')
  return contents


def load_tokenizer(path):
  """Loads the `transformers` tokenizer of a folder or hub name.

  Raises:
    UserError: there is none, or it needs code of its own.
  """
  from transformers import AutoTokenizer  # seconds to import

  folder = resolve(path)
  try:
    return AutoTokenizer.from_pretrained(
      str(folder), local_files_only=True, trust_remote_code=False
    )
  except Exception as error:  # tokenizers raises nothing narrower
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'{folder.absolute()} has no usable tokenizer: {reason}'
    ) from error


def check_vocabulary(config: ModelConfig, tokenizer) -> None:
  """Raises UserError if the tokenizer has ids without a row in the model.

  The reverse, a model with more rows than the tokenizer has tokens, is usual
  (padded vocabularies).
  """
  highest = max(tokenizer.get_vocab().values(), default=-1)
  if highest >= config.vocab_size:
    raise UserError(
      f'The tokenizer has ids up to {highest}, the model only '
      f'{config.vocab_size} rows (vocab_size); use the tokenizer it was '
      'trained with.'
    )


def eos_token_ids(path=None, tokenizer=None) -> tuple[int, ...]:
  """Returns ids that end a response: the folder's, then the tokenizer's own.

  generation_config.json takes precedence over config.json; each may contain one
  id, a list (as for chat models) or none.
  """
  ids = []
  if path is not None:
    folder = resolve(path)
    for name in (GENERATION, CONFIG):
      if not ids and (folder / name).is_file():
        ids = _ids(folder / name, 'eos_token_id')
  last = getattr(tokenizer, 'eos_token_id', None)
  if last is not None:
    ids = [*ids, last]
  return tuple(dict.fromkeys(ids))


def pad_token_id(path) -> int | None:
  """Returns the padding id in a folder's config.json, None without one."""
  return next(iter(_ids(resolve(path) / CONFIG, 'pad_token_id')), None)


def _ids(path: pathlib.Path, key: str) -> list[int]:
  """Returns the ids of a field that contains one, several or none."""
  stored = _read_json(path).get(key)
  ids = stored if isinstance(stored, list) else [stored]
  ids = [i for i in ids if i is not None]
  if not all(type(i) is int for i in ids):
    raise UserError(f'{path}: {key} is {stored!r:.100}, not a token id.')
  return ids


def save(
  path, config: ModelConfig, params, tokenizer=None, source=None
) -> None:
  """Writes a folder that `transformers` opens.

  The folder appears whole or not at all (`replacing`).  An existing one is
  replaced only if everything in it is written again.  Every tensor is read back
  and compared.

  All processes call this and send their parts to process 0, which alone writes;
  all return when the folder exists.

  Args:
    path: the folder to make.
    config: of the parameters.
    params: as from `transformer.init`; written in their own dtype.
    tokenizer: to write with them; None copies the source's files.
    source: the folder or hub name the model came from, whose config.json and
      generation_config.json are kept.  None writes both from `config` and
      the tokenizer's special tokens.

  Raises:
    UserError: the parameters or the source are of another model; the folder
      contains something else; the disk is full or corrupts the files.
  """
  source = resolve(source) if source is not None else None
  with new_folder(path) as folder:
    writing.write_params(config, folder, params)
    if folder is None:
      return
    raw = _fields(config, tokenizer, source)
    raw['architectures'] = [families.ARCHITECTURES[config.family]]
    _write_config(folder, raw, params)
    _write_generation(folder, tokenizer, source)
    _write_tokenizer(folder, config, tokenizer, source)


def save_trunk(
  path, config: ModelConfig, params, head, tokenizer=None, source=None
) -> None:
  """Writes a reward model in the layout *ForSequenceClassification.

  The folder is made as by `save`; `load_trunk` reads it back, and
  `transformers` opens it with num_labels=1.  `transformers` reads the score at
  the last token that is not padding, so the padding token must not end texts:
  it is the tokenizer's own unless that is its end token, else the one that
  begins texts.

  Args:
    path: the folder to make.
    config: of the trunk.
    params: of the trunk, without a language model's head.
    head: {'kernel': [D, 1], 'bias': [1]} of a critic.
    tokenizer: to write with them; None uses the source's.
    source: as in `save`.  Without it and a tokenizer there is no padding token,
      and `transformers` accepts one text at a time.

  Raises:
    UserError: as `save`; the head has a bias, which the layout cannot store;
      the tokenizer has no token to pad with.
  """
  config = dataclasses.replace(config, tied=True)
  source = resolve(source) if source is not None else None
  bias = float(writing.whole(head['bias'])[0])
  if bias:
    raise UserError(
      f'The head has a bias of {bias:g}, which the layout '
      '*ForSequenceClassification cannot store.\nSet it to 0 if only '
      'differences of scores matter, as they do in preferences.'
    )
  if tokenizer is None and source is not None:
    tokenizer = load_tokenizer(source)
  if tokenizer is not None:
    tokenizer = _with_padding(tokenizer)
  score = writing.whole(head['kernel']).T
  with new_folder(path) as folder:
    writing.write_params(config, folder, params, score)
    if folder is None:
      return
    raw = _fields(config, tokenizer, source)
    raw['architectures'] = [families.SCORING_ARCHITECTURES[config.family]]
    raw |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
    raw['pad_token_id'] = getattr(tokenizer, 'pad_token_id', None)
    _write_config(folder, raw, (params, score))
    _write_tokenizer(folder, config, tokenizer, None)


def _with_padding(tokenizer):
  """Copies the tokenizer with a padding token that does not end texts."""
  tokens = tokenizer.pad_token, tokenizer.bos_token
  usable = [t for t in tokens if t not in (None, tokenizer.eos_token)]
  if not usable:
    raise UserError(
      'The tokenizer has no padding token besides its end token, at which '
      'transformers\nwould not read the score: set tokenizer.pad_token to a '
      'token that does not end texts.'
    )
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.pad_token = usable[0]
  return tokenizer


def _write_tokenizer(folder, config, tokenizer, source):
  if tokenizer is not None:
    check_vocabulary(config, tokenizer)
    try:
      tokenizer.save_pretrained(str(folder))
    except Exception as error:  # tokenizers raises no OSError on a full disk
      raise OSError(f'its tokenizer: {error}') from error
  elif source is not None:
    for name in TOKENIZER_FILES:
      if (source / name).is_file():
        shutil.copyfile(source / name, folder / name)


def _fields(config, tokenizer, source) -> dict:
  """Returns the fields of config.json: the source's, or those of `config`."""
  if source is None:
    return families.write_config(config) | _special_ids(tokenizer)
  # Untying is a choice of the run (`load(..., tied=False)`).
  raw = {**_read_json(source / CONFIG), 'tie_word_embeddings': config.tied}
  differing = families.differences(config, raw)
  if differing:
    raise UserError(
      f'{source / CONFIG} describes another model: it differs in '
      f'{", ".join(differing)}.'
    )
  return raw


def _special_ids(tokenizer) -> dict[str, int | None]:
  return {name: getattr(tokenizer, name, None) for name in SPECIAL_IDS}


def _write_config(folder, raw, params):
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  raw.pop('torch_dtype', None)
  raw['dtype'] = dtypes.pop() if len(dtypes) == 1 else 'float32'
  _write_json(folder / CONFIG, raw)


def _write_generation(folder, tokenizer, source):
  if source is None:
    ids = _special_ids(tokenizer).items()
    _write_json(folder / GENERATION, {k: i for k, i in ids if i is not None})
  elif (source / GENERATION).is_file():
    _write_json(folder / GENERATION, _read_json(source / GENERATION))


def _write_json(path, contents):
  path.write_text(json.dumps(contents, indent=2) + '\n')
