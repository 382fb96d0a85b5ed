"""Files are read whole or refused by file and line."""

import gzip
import json
import sys
import types

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import datasets

EXPECTED = [
  {'prompt': 'one\u2028line', 'answer': 1, 'tags': ['a']},
  {'prompt': 'two', 'answer': '2'},
]


def write(path, text):
  data = text if isinstance(text, bytes) else text.encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def lines_of(rows):
  return '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)


def error_of(function, *args, **kwargs):
  with pytest.raises(UserError) as caught:
    function(*args, **kwargs)
  text = str(caught.value)
  assert len(text.splitlines()) <= 3, text
  return text


@pytest.mark.parametrize('mark', ['', '\ufeff'])
@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.json'])
def test_every_format_gives_the_same_rows(tmp_path, name, mark):
  text = lines_of(EXPECTED) + '\n\n'
  if name == 'a.json':
    text = json.dumps(EXPECTED)
  text = text.replace('"prompt"', '"question"')
  assert datasets.read_rows(write(tmp_path / name, mark + text)) == EXPECTED


def test_the_prompt_column_can_be_named_and_is_else_found(tmp_path):
  row = {'problem': 'p', 'question': 'q', 'text': 't'}
  path = write(tmp_path / 'a.jsonl', json.dumps(row))
  (found,) = datasets.read_rows(path)
  assert found == {'prompt': 'q', 'problem': 'p', 'text': 't'}
  assert datasets.read_rows(path, 'text')[0]['prompt'] == 't'
  text = error_of(datasets.read_rows, path, 'body')
  assert 'a.jsonl, line 1' in text and 'body' in text and 'question' in text
  path = write(tmp_path / 'b.jsonl', json.dumps({'prompt': 'p', 'text': 't'}))
  assert datasets.read_rows(path) == [{'prompt': 'p', 'text': 't'}]
  assert 'beside a column prompt' in error_of(datasets.read_rows, path, 'text')


@pytest.mark.parametrize(
  'bad',
  ['{"prompt": "a"', '["a"]', '"a"', '{"answer": 1}', '{"prompt": 3}', 'null']
  + ['{"prompt": null}', '[' * 100_000, '{"prompt": "a"} {"prompt": "b"}'],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, bad):
  path = write(tmp_path / 'a.jsonl', f'{{"prompt": "x"}}\n\n{bad}\n')
  text = error_of(datasets.read_rows, path)
  assert 'a.jsonl, line 3' in text and len(text) < 400


def test_files_that_cannot_be_read_are_named(tmp_path):
  whole = gzip.compress(lines_of(EXPECTED * 100).encode())
  cut, damaged = tmp_path / 'cut.jsonl.gz', tmp_path / 'damaged.jsonl.gz'
  cut.write_bytes(whole[: len(whole) // 2])
  damaged.write_bytes(whole[:20] + b'\xff\xff\xff' + whole[23:])
  (tmp_path / 'folder.jsonl').mkdir()
  texts = {
    **{'empty.jsonl': '\n\n', 'empty.json': '[]', 'rows.csv': 'prompt\na'},
    **{'object.json': '{"prompt": "a"}', 'broken.json': '[{"prompt": "a"},'},
    'number.json': f'[{"1" * 5000}]',
  }
  paths = [write(tmp_path / name, text) for name, text in texts.items()]
  paths += [cut, damaged, tmp_path / 'folder.jsonl', tmp_path / 'missing.jsonl']
  for path in paths:
    assert path.name in error_of(datasets.read_rows, path)
  path = write(tmp_path / 'latin.jsonl', b'{"prompt": "x"}\n{"prompt": "\xe9"}')
  assert 'latin.jsonl, line 2' in error_of(datasets.read_rows, path)


def test_real_files_are_read(shared):
  data = shared / 'data'
  names = (
    'math/train.json',
    'math/math500.jsonl',
    'human_eval/HumanEval.jsonl.gz',
  )
  for name, count in zip(names, (7474, 500, 164), strict=True):
    rows = datasets.read_rows(data / name)
    assert len(rows) == count
    assert all(isinstance(row['prompt'], str) for row in rows)


def test_gsm8k_gives_question_number_and_solution(tmp_path):
  row = {'question': 'How many?', 'answer': 'a\n#### 1,200'}
  write(tmp_path / 'test.jsonl', json.dumps(row))
  (found,) = datasets.gsm8k(tmp_path, 'test')
  expected = {'prompt': 'How many?', 'answer': '1200'}
  assert found == expected | {'solution': row['answer']}
  assert 'train.jsonl' in error_of(datasets.gsm8k, tmp_path, 'train')
  assert "'dev'" in error_of(datasets.gsm8k, tmp_path, 'dev')
  write(tmp_path / 'test.jsonl', json.dumps({'question': 'q', 'answer': '5'}))
  assert 'row 0' in error_of(datasets.gsm8k, tmp_path, 'test')


def test_the_hub_is_read_through_datasets(monkeypatch):
  calls = []

  def load_dataset(name, config, split):
    calls.append((name, config, split))
    if name == 'nowhere/none':
      raise ConnectionError('line one\nline two\nline three')
    row = {'question': 'q', 'answer': '#### 7'}
    return iter([row if config else {'problem': 'p', 'solution': '\\boxed{7}'}])

  fake = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  assert datasets.gsm8k(None, 'test')[0]['answer'] == '7'
  for split in ('train', 'math500'):
    assert datasets.math(None, split)[0]['answer'] == '7'
  assert calls == [
    ('openai/gsm8k', 'main', 'test'),
    ('DigitalLearningGmbH/MATH-lighteval', None, 'train'),
    ('HuggingFaceH4/MATH-500', None, 'test'),
  ]
  text = error_of(datasets.read_hub, 'nowhere/none', 'train')
  assert 'nowhere/none' in text and 'ConnectionError' in text
  monkeypatch.setitem(sys.modules, 'datasets', None)
  assert 'jaxrl_llm[data]' in error_of(datasets.read_hub, 'a/b', 'train')


def test_math_gives_problem_and_answer(tmp_path):
  train = [
    {'problem': 'p', 'answer': '\\frac12', 'level': 'Level 1'},
    {'problem': 'q', 'answer': None, 'difficulty': 4.0},
    {'problem': 'r', 'answer': '', 'level': 'Level ?'},
  ]
  write(tmp_path / 'train.json', json.dumps(train))
  solution = 'As \\boxed{1}, it is $\\boxed{\\frac{1}{2}}$.'
  test = {'problem': 'p', 'solution': solution}
  write(tmp_path / 'test.jsonl', json.dumps(test))
  assert datasets.math(tmp_path, 'train') == [
    {'prompt': 'p', 'answer': '\\frac12', 'difficulty': 1},
    {'prompt': 'q', 'answer': None, 'difficulty': 4},
    {'prompt': 'r', 'answer': None},
  ]
  assert datasets.math(tmp_path, 'test') == [
    {'prompt': 'p', 'answer': '\\frac{1}{2}', 'solution': solution}
  ]
  assert 'math500.jsonl' in error_of(datasets.math, tmp_path, 'math500')
  assert "'dev'" in error_of(datasets.math, tmp_path, 'dev')
  write(tmp_path / 'test.jsonl', json.dumps({'problem': 'p', 'level': 5}))
  assert 'row 0' in error_of(datasets.math, tmp_path, 'test')
