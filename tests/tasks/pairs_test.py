"""Preferences: dialogues divided, and texts cut where they part."""

import gzip
import json
import sys
import types

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import datasets, pairs, vocabulary

START = '\n\nHuman: Hi.\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:'


def write(path, rows):
  data = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def dialogues(chosen, rejected, start=START):
  return {'chosen': start + chosen, 'rejected': start + rejected}


def test_a_dialogue_is_divided_before_its_last_response(tmp_path):
  rows = [
    dialogues(' So.', ' No.\n\nReally not.'),
    dialogues(' a', ' a'),  # equal
    dialogues(' a', '  '),  # empty
    {'chosen': START + ' a', 'rejected': '\n\nHuman: Hi.\n\nAssistant: b'},
    dialogues(' a\n\nHuman: b', ' c'),  # no response comes last
    dialogues(' b', ' a'),
  ]
  expected = [
    {'prompt': START, 'chosen': ' So.', 'rejected': ' No.\n\nReally not.'},
    {'prompt': START, 'chosen': ' b', 'rejected': ' a'},
  ]
  with pytest.raises(UserError, match='holds no train.jsonl.gz or'):
    pairs.hh_rlhf(tmp_path)
  path = write(tmp_path / 'train.jsonl.gz', rows)
  found = pairs.hh_rlhf(path)
  assert found == pairs.Pairs(expected, apart=2, equal=1, empty=1)
  assert pairs.hh_rlhf(tmp_path) == found


def test_real_dialogues_are_what_they_were(shared):
  path = shared / 'data' / 'hh_rlhf' / 'harmless-base-test.jsonl.gz'
  found = pairs.hh_rlhf(path)
  assert (found.apart, found.equal, found.empty) == (5, 0, 4)
  assert len(found.rows) == 2312 - 9
  whole = {
    (row['chosen'], row['rejected']) for row in map(json.loads, _lines(path))
  }
  for row in found.rows:
    assert row['prompt'].endswith('\n\nAssistant:')
    both = row['prompt'] + row['chosen'], row['prompt'] + row['rejected']
    assert both in whole


def _lines(path):
  return gzip.decompress(path.read_bytes()).decode().strip().split('\n')


def test_the_hub_is_asked_for_the_split(monkeypatch):
  asked = []

  def load_dataset(name, config, split):
    asked.append((name, config, split))
    return [dialogues(' a', ' b')]

  module = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, 'datasets', module)
  assert len(pairs.hh_rlhf(None).rows) == 1
  assert asked == [('Anthropic/hh-rlhf', None, 'train')]


def test_what_is_no_pair_of_dialogues_is_refused(tmp_path):
  for row, words in (
    ({'chosen': 'Hello', 'rejected': START + ' a'}, 'row 0: chosen is no'),
    ({'chosen': START + ' a', 'rejected': None}, 'row 0: rejected is no'),
    ({'chosen': START + ' a'}, 'row 0: rejected is no'),
    (dialogues(' a', ' a'), "no row is a pair.*'equal': 1"),
  ):
    with pytest.raises(UserError, match=words):
      pairs.hh_rlhf(write(tmp_path / 'a.jsonl', [row]))


CHARACTERS = vocabulary.character_tokenizer('abcdefgh<>ursit')
EOS = CHARACTERS.eos_token_id


def ids_of(text):
  return CHARACTERS(text)['input_ids']


def encode(*triples, budget=20, **settings):
  names = 'prompt', 'chosen', 'rejected'
  rows = [dict(zip(names, triple, strict=True)) for triple in triples]
  return pairs.encode_pairs(rows, CHARACTERS, budget, **settings)


def test_a_pair_is_cut_where_its_texts_part():
  """Each keeps a token, also where one text goes on where the other ends."""
  found = encode(('ab', 'cd', 'ce'), ('a', 'bc', 'bcd'))
  assert found[0] == (ids_of('abc'), [*ids_of('d'), EOS], [*ids_of('e'), EOS])
  assert found[1] == (ids_of('abc'), [EOS], [*ids_of('d'), EOS])
  [open_end] = encode(('a', 'bc', 'bcd'), end_token=False)
  assert open_end == (ids_of('ab'), ids_of('c'), ids_of('cd'))
  template = (
    '{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<>'
  )
  [turns] = encode(('a', 'b', 'c'), chat_template=template, suffix='h')
  assert turns == (ids_of('<u>ah<a>'), ids_of('b<>'), ids_of('c<>'))


def test_a_response_that_was_cut_off_has_no_end():
  row = dict(prompt='a', chosen='bc', rejected='bd', rejected_finished=False)
  [found] = pairs.encode_pairs([row], CHARACTERS, 20)
  assert found == (ids_of('ab'), [*ids_of('c'), EOS], ids_of('d'))
  with pytest.raises(UserError, match="row 0 has 'no' in its column chosen_f"):
    pairs.encode_pairs([row | {'chosen_finished': 'no'}], CHARACTERS, 20)


def test_pairs_that_teach_nothing_or_do_not_fit_are_refused():
  for triple, words in (
    (('a', 'b', 'b'), 'row 0 are the same tokens'),
    (('', 'a', 'b'), 'no token in common'),
    (('a', 'b', None), 'no text in its column rejected'),
    (('a', 'b', 'Z'), "characters that the tokenizer lacks: 'Z'"),
  ):
    with pytest.raises(UserError, match=words):
      encode(triple)
  with pytest.raises(
    UserError, match='1 of 2 pairs exceed 4 .* has 5, .*row 1'
  ):
    encode(('a', 'b', 'c'), ('a', 'b', 'cde'), budget=4)
  assert len(encode(('a', 'b', 'cd'), budget=4)) == 1


def test_a_cut_off_response_has_no_end():
  responses = ['b', 'b']
  found = pairs.encode_responses(
    ['a', 'a'], responses, [True, False], CHARACTERS
  )
  assert found == [[*ids_of('ab'), EOS], ids_of('ab')]
  with pytest.raises(UserError, match='are both empty'):
    pairs.encode_responses([''], [''], [False], CHARACTERS)


def test_files_of_any_kind_can_hold_pairs(tmp_path):
  row = {'prompt': 'p', 'chosen': 'a', 'rejected': 'b', 'margin': 2}
  assert datasets.read_rows(write(tmp_path / 'a.jsonl', [row])) == [row]
