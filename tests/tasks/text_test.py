"""Cut prompts encode to exactly the tokens that were cut."""

import json

import pytest
import transformers

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import prompts, text
from jaxrl_llm.tasks.splits import split
from jaxrl_llm.tasks.vocabulary import character_tokenizer


@pytest.mark.parametrize('name', ['stories260k', 'gpt2-tokenizer'])
def test_real_prompts_are_the_first_tokens_of_their_documents(
  shared, name, tmp_path
):
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    shared / 'models' / name
  )
  path = shared / 'data' / 'text' / 'tinystories_1000.json'
  stories = json.loads(path.read_text())[:220]
  path = tmp_path / 'stories.json'
  path.write_text(json.dumps(stories))
  cut = text.cut_prompts(path, tokenizer, 24)
  encoded = prompts.encode_prompts(cut.rows, tokenizer, 24)
  assert encoded.dropped == 0 and len(encoded.rows) == len(cut.rows) > 150
  for row, ids in zip(cut.rows, encoded.tokens, strict=True):
    whole = tokenizer(stories[row['document']])['input_ids']
    assert ids.tolist() == whole[:24] and len(whole) > 24
  assert len({row['prompt'] for row in cut.rows}) == len(cut.rows)
  assert len(stories) == len(cut.rows) + sum(cut[1:])

  train, held_out = split(cut.rows, 50)
  assert len(train) == len(cut.rows) - 50 and len(held_out) == 50


def test_what_is_left_out_is_counted(tmp_path):
  tokenizer = character_tokenizer('abc\n')
  path = tmp_path / 'a.txt'
  # abcab is kept; abc is too short; abcbb repeats; x is not in the vocabulary.
  path.write_text('abcab\n\nabc\n\n\n\nabcbb\n\nxabcab\n\nbbbbb')
  cut = text.cut_prompts(path, tokenizer, 3)
  assert [row['prompt'] for row in cut.rows] == ['abc', 'bbb']
  assert [row['document'] for row in cut.rows] == [0, 4]
  assert cut[1:] == (1, 1, 1)


def test_a_corpus_that_gives_too_little_is_refused(tmp_path):
  tokenizer = character_tokenizer('abc')
  path = tmp_path / 'a.json'
  path.write_text('["abc", "bca", "a"]')

  def error_of(prompt_tokens):
    with pytest.raises(UserError) as caught:
      text.cut_prompts(path, tokenizer, prompt_tokens)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)

  assert 'no prompt of 5 tokens: 3 documents are too short' in error_of(5)
  assert 'prompt_tokens=0' in error_of(0)
  path.write_text('{"a": 1}')
  assert 'list of strings' in error_of(2)
  path.write_text('["a",')
  assert 'not JSON' in error_of(2)
  path.unlink()
  assert 'cannot be read' in error_of(2)
