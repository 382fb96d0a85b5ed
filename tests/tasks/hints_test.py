"""Hints are beginnings of the solution, by tokens, exactly."""

import pytest
import transformers

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import hints
from jaxrl_llm.tasks.vocabulary import character_tokenizer

DIGITS = character_tokenizer('0123456789+=? ')
ROW = {'prompt': '3+5+2=', 'solution': '8+2=10'}
CHAT = (
  '{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}'
  '{% if add_generation_prompt %}[assistant]{% endif %}'
)


@pytest.mark.parametrize(
  'share, hint',
  [(0.01, '8'), (0.25, '8'), (0.34, '8+'), (0.5, '8+2'), (1.0, '8+2=10')],
)
def test_shares_are_of_tokens(share, hint):
  assert hints.beginning(ROW['solution'], share, DIGITS) == hint
  found = hints.Hints(DIGITS).encode(ROW, share)
  assert found.text == ROW['prompt'] + hint
  assert DIGITS.decode(found.ids) == found.text


def test_a_template_and_a_suffix():
  made = hints.Hints(DIGITS, '{hint}? {prompt}', suffix=' ')
  assert made.encode(ROW, 0.5).text == '8+2? 3+5+2= '
  # What stands in for a place is text, whatever is in it.
  odd = {'prompt': '{hint}', 'solution': '{prompt}'}
  tokenizer = character_tokenizer('{}hintprom')
  assert hints.Hints(tokenizer).encode(odd, 1.0).text == '{hint}{prompt}'


@pytest.mark.parametrize(
  'template', ['{prompt}', '{hint}', '{prompt}{hint}{hint}']
)
def test_templates_need_both_places_once(template):
  with pytest.raises(UserError, match='times\nwrite it once'):
    hints.Hints(DIGITS, template)


def test_in_a_chat_the_hint_is_the_users():
  tokenizer = character_tokenizer('0123456789+=[]useraitn')
  made = hints.Hints(tokenizer, chat_template=CHAT)
  found = tokenizer.decode(made.encode(ROW, 0.5).ids)
  assert found == '[user]3+5+2=8+2[assistant]'


def test_which_rows_have_one():
  for row in ({}, {'solution': None}, {'solution': ' '}, {'solution': 3}):
    assert not hints.has_solution(row)
  assert hints.has_solution(ROW)


def test_words_and_bytes_are_cut_in_the_text(shared):
  """Decoding the first tokens would not always give the text's beginning."""
  for name in ('stories260k', 'gpt2-tokenizer'):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
      shared / 'models' / name
    )
    text = 'Once upon a time: 7 × 8 = 56 € for the café 🙂 and more'
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    lengths = []
    for count in range(1, len(ids) + 1):
      found = hints.beginning(text, count / len(ids), tokenizer)
      assert found and text.startswith(found)
      again = tokenizer(found, add_special_tokens=False)['input_ids']
      # A character of several tokens is whole with its first.
      assert count - 1 <= len(again) <= count + 3
      lengths.append(len(found))
    assert lengths == sorted(lengths) and lengths[-1] == len(text)
