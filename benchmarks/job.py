"""The model, tokenizer and prompts of every benchmark.

The model is random, in the layout of Qwen3, and written once as a Hugging Face
folder, so that every system reads the same weights and the same tokenizer.
The end token is an id that the model lacks: every system looks for it,
and all responses have full length.
"""

import itertools
import json
import pathlib
import random
import string
from typing import NamedTuple

import jax
from absl import flags

from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig, Rope
from jaxrl_llm.models.huggingface import folders

_PAD = '<|pad|>'
_PAIRS = list(itertools.product(string.ascii_lowercase, repeat=2))
# These are in every vocabulary; prompts are made of them.
_FEWEST_PAIRS = 200


class Shape(NamedTuple):
  """Architecture of the job's model; fields as in `ModelConfig`."""

  vocabulary: int = 512
  hidden: int = 256
  intermediate: int = 768
  layers: int = 4
  heads: int = 8
  kv_heads: int = 4
  head_dim: int = 32
  dtype: str = 'float32'

  @property
  def name(self) -> str:
    """Name of the model's folder."""
    return '_'.join(['qwen3', *map(str, self)])


def define_flags() -> None:
  """Defines flags: each field of `Shape`, folder for models, CPU devices."""
  flags.DEFINE_integer(
    'devices', 1, 'CPU devices, over which rows are spread.', 1
  )
  flags.DEFINE_string('models', 'runs/benchmarks', 'Folder of the models.')
  for name, default in Shape()._asdict().items():
    define = flags.DEFINE_string
    if isinstance(default, int):
      define = flags.DEFINE_integer
    define(name, default, "The model's.")


def use_devices() -> None:
  """Makes the CPU as many devices as the flag says; call it before any array.

  XLA computes small arrays on one core per device.
  """
  jax.config.update('jax_num_cpu_devices', flags.FLAGS.devices)


def shape() -> Shape:
  """Returns the shape that the flags specify."""
  return Shape(*(getattr(flags.FLAGS, name) for name in Shape._fields))


def config(wanted: Shape) -> ModelConfig:
  """Returns the configuration of the model with a shape."""
  return ModelConfig(
    vocab_size=wanted.vocabulary,
    hidden_size=wanted.hidden,
    intermediate_size=wanted.intermediate,
    num_layers=wanted.layers,
    num_heads=wanted.heads,
    num_kv_heads=wanted.kv_heads,
    head_dim=wanted.head_dim,
    max_length=2048,
    tied=True,
    dtype=wanted.dtype,
    family='qwen3',
    query_key_norm=True,
    rope=Rope(theta=1_000_000.0),
  )


def folder(wanted: Shape, models) -> pathlib.Path:
  """Returns the Hugging Face folder of a shape, written if it is missing.

  Args:
    wanted: the shape.
    models: folder of the folders of all shapes.
  """
  path = pathlib.Path(models, wanted.name).absolute()
  settings = path / folders.GENERATION
  if not path.is_dir():
    made = config(wanted)
    params = transformer.init(made, jax.random.key(0), wanted.dtype)
    folders.save(path, made, params, tokenizer(wanted.vocabulary))
  ids = {'eos_token_id': end_id(wanted), 'pad_token_id': 0}
  settings.write_text(json.dumps(ids), encoding='utf-8')
  return path


def end_id(wanted: Shape) -> int:
  """Returns the id of the end token, which no response can contain."""
  return wanted.vocabulary


def tokenizer(size: int):
  """Creates a byte-level BPE of exactly `size` tokens, without training it.

  Its tokens are the padding, the bytes, pairs of small letters, and pairs of
  those pairs, as many as fit.

  Raises:
    UserError: `size` is too small for the bytes and some pairs, or too large.
  """
  import tokenizers
  from transformers import PreTrainedTokenizerFast

  pairs = list(map(''.join, _PAIRS))
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  room = size - 1 - len(alphabet)
  if not _FEWEST_PAIRS <= room <= len(pairs) * (1 + len(pairs)):
    raise UserError(f'no tokenizer of {size} tokens can be made')
  merges = [*_PAIRS, *itertools.product(pairs, pairs)][:room]
  tokens = [_PAD, *alphabet, *map(''.join, merges)]
  bpe = tokenizers.Tokenizer(
    tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges)
  )
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  bpe.decoder = tokenizers.decoders.ByteLevel()
  return PreTrainedTokenizerFast(
    tokenizer_object=bpe, pad_token=_PAD, clean_up_tokenization_spaces=False
  )


def prompts(count: int, tokens: int, seed: int = 0) -> list[str]:
  """Creates texts of `tokens` tokens in every tokenizer of `tokenizer`.

  They are pairs of letters, separated by spaces, which are tokens, with an
  equals sign at the end.

  Args:
    count: number of texts.
    tokens: even.
    seed: seed of the choice of pairs.

  Raises:
    UserError: `tokens` is odd or too small.
  """
  if tokens < 2 or tokens % 2:
    raise UserError(f'prompts of {tokens} tokens: the number must be even')
  draw = random.Random(seed)
  known = [''.join(pair) for pair in _PAIRS[:_FEWEST_PAIRS]]
  return [
    ' '.join(draw.choices(known, k=tokens // 2)) + '=' for _ in range(count)
  ]
