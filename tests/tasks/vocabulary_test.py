"""A character vocabulary survives saving and decodes to what was encoded."""

import pytest
import transformers

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.vocabulary import character_tokenizer

ALPHABET = '0123456789+-*= \n\té😀ab\u0301'
TEXT = ' 3+5 *2-4=\n\n\tab\u0301  é😀a '


def test_one_token_per_character_and_distinct_special_ids():
  tokenizer = character_tokenizer(ALPHABET)
  ids = tokenizer(TEXT)['input_ids']
  assert ids == [3 + ALPHABET.index(c) for c in TEXT]
  special = [
    tokenizer.pad_token_id,
    tokenizer.eos_token_id,
    tokenizer.unk_token_id,
  ]
  assert special == [0, 1, 2]
  assert len(tokenizer) == len(ALPHABET) + 3
  assert tokenizer('?')['input_ids'] == [tokenizer.unk_token_id]


def test_it_reopens_equal(tmp_path):
  tokenizer = character_tokenizer(ALPHABET)
  tokenizer.save_pretrained(tmp_path)
  reopened = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for t in (tokenizer, reopened):
    ids = t(TEXT)['input_ids']
    assert ids == tokenizer(TEXT)['input_ids']
    assert t.decode(ids) == TEXT
    end = [*ids, t.eos_token_id, t.pad_token_id]
    assert t.decode(end, skip_special_tokens=True) == TEXT
  assert len(reopened) == len(tokenizer)
  for name in ('pad_token_id', 'eos_token_id', 'unk_token_id'):
    assert getattr(reopened, name) == getattr(tokenizer, name)


@pytest.mark.parametrize('wrong', ['aba', ''])
def test_characters_must_be_distinct(wrong):
  with pytest.raises(UserError, match='distinct'):
    character_tokenizer(wrong)


def test_half_a_surrogate_pair_is_no_character():
  with pytest.raises(UserError, match='half of a surrogate pair'):
    character_tokenizer('ab\ud800')
