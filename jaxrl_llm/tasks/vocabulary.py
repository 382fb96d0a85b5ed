"""A tokenizer with one token per character, for models made from scratch."""

import tokenizers
import transformers
from tokenizers import decoders, models

from jaxrl_llm.errors import UserError


def character_tokenizer(
  alphabet: str,
  *,
  pad: str = '<pad>',
  eos: str = '<eos>',
  unk: str = '<unk>',
) -> transformers.PreTrainedTokenizerFast:
  """Creates a tokenizer with one token per character, after three special ones.

  Ids: pad 0, eos 1, unk 2, then the alphabet in order from 3.  Nothing is
  prepended or appended: callers add the end token where a response ends.
  Decoding restores encoded text, whitespace included, within the alphabet.
  `save_pretrained` writes a folder that AutoTokenizer opens.

  Raises:
    UserError: a character is repeated, or special tokens are not distinct from
      each other and from the alphabet.
  """
  vocabulary = [pad, eos, unk, *alphabet]
  repeated = [t for t in dict.fromkeys(vocabulary) if vocabulary.count(t) > 1]
  if repeated or not alphabet or not (pad and eos and unk):
    raise UserError(
      'a character vocabulary needs distinct, non-empty tokens: '
      + (f'{repeated} repeated.' if repeated else 'one is empty.')
    )
  half = [t for t in vocabulary if any(0xD800 <= ord(c) < 0xE000 for c in t)]
  if half:
    raise UserError(
      f'a character vocabulary cannot hold {half[0]!r}, half of a surrogate '
      'pair.'
    )
  # Without merges each character stays a token; splitting first is slower.
  backend = tokenizers.Tokenizer(
    models.BPE({t: i for i, t in enumerate(vocabulary)}, [], unk_token=unk)
  )
  # Without a decoder, tokens would be joined by spaces.
  backend.decoder = decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token=pad,
    eos_token=eos,
    unk_token=unk,
    clean_up_tokenization_spaces=False,
  )
