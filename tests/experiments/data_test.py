"""The data sets that a configuration can name."""

import json

import mistakes
import scripts

from experiments import data
from jaxrl_llm.rewards import mathematics


def prompts(rows):
  return [row['prompt'] for row in rows]


def test_arithmetic_keeps_held_out_prompts_apart():
  found = data.arithmetic(train=60, held_out=20, demonstrations=15, seed=3)
  assert (len(found.train), len(found.held_out)) == (60, 20)
  assert len(set(prompts(found.train + found.held_out))) == 80
  assert found.demonstrations == found.train[:15]
  assert all('solution' in row for row in found.demonstrations)
  again = data.arithmetic(train=60, held_out=20, demonstrations=15, seed=3)
  assert again == found
  other = data.arithmetic(train=60, held_out=20, demonstrations=15, seed=4)
  assert other.train != found.train


def test_gsm8k_holds_its_test_split_out(shared):
  folder = shared / 'data' / 'gsm8k'
  found = data.gsm8k(str(folder), held_out=10)
  first = json.loads((folder / 'test.jsonl').read_text().split('\n', 1)[0])
  assert len(found.train) == 7473 and len(found.held_out) == 10
  assert found.held_out[0]['prompt'] == first['question']
  assert first['answer'].endswith(f'#### {found.held_out[0]["answer"]}')
  assert not set(prompts(found.train)) & set(prompts(found.held_out))


def test_math_leaves_out_what_cannot_be_judged_or_is_held_out(shared):
  folder = str(shared / 'data' / 'math')
  assert len(data.math(folder).held_out) == 500
  found = data.math(folder, split='test', held_out=0)
  assert (len(found.train), len(found.held_out)) == (7468, 5000)
  assert '4 problems without an answer, 2 training' in found.notes[0]
  bare = lambda rows: {''.join(row['prompt'].split()) for row in rows}
  assert not bare(found.train) & bare(found.held_out)
  for row in found.train + found.held_out:
    assert mathematics.read_answer(row['answer']) is not None, row


def test_jsonl_leaves_known_prompts_out(tmp_path):
  write = lambda name, rows: scripts.write_rows(tmp_path / name, rows)
  pair = {'chosen': 'x', 'rejected': 'y'}
  rows = [{'question': 'a', 'solution': 's'}, {'question': 'b', **pair}]
  train = write('train.jsonl', rows)
  held = write('held.jsonl', [{'question': 'b'}, {'question': 'c'}])
  found = data.jsonl(train, held)
  assert prompts(found.train) == ['a', 'b'] and prompts(found.held_out) == ['c']
  assert prompts(found.demonstrations) == ['a']
  assert found.notes == (f'1 held-out prompts occur in {train}: left out',)
  assert found.train[1] == {'prompt': 'b', **pair}
  with mistakes.refused('every prompt of'):
    data.jsonl(train, train)
