"""A tokenizer with one token per character, for models made from scratch."""

import tokenizers
import transformers
from tokenizers import decoders, models

from jaxrl_llm.errors import UserError

_SPECIAL = PAD, EOS, UNK = '<pad>', '<eos>', '<unk>'


def character_tokenizer(alphabet: str) -> transformers.PreTrainedTokenizerFast:
  """Creates a tokenizer with one token per character, after three special ones.

  Ids: pad 0, eos 1, unk 2, then the alphabet in order from 3.  Nothing is
  prepended or appended: callers add the end token where a response ends.
  Decoding restores encoded text, whitespace included, within the alphabet.
  `save_pretrained` writes a folder that AutoTokenizer opens.

  Raises:
    UserError: there are no characters, one is repeated, or one is half of a
      surrogate pair.
  """
  repeated = [c for c in dict.fromkeys(alphabet) if alphabet.count(c) > 1]
  if repeated or not alphabet:
    raise UserError(
      'a character vocabulary needs distinct characters: '
      + (f'{repeated} repeated.' if repeated else 'there are none.')
    )
  if half := [c for c in alphabet if 0xD800 <= ord(c) < 0xE000]:
    raise UserError(
      f'a character vocabulary cannot hold {half[0]!r}, half of a surrogate '
      'pair.'
    )
  ids = {token: i for i, token in enumerate([*_SPECIAL, *alphabet])}
  # Without merges each character stays a token; splitting first is slower.
  backend = tokenizers.Tokenizer(models.BPE(ids, [], unk_token=UNK))
  # Without a decoder, tokens would be joined by spaces.
  backend.decoder = decoders.Fuse()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token=PAD,
    eos_token=EOS,
    unk_token=UNK,
    clean_up_tokenization_spaces=False,
  )
