"""HumanEval and MBPP as published, and files that are neither."""

import gzip
import json

import pytest
import scripts

from experiments import data
from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import code, datasets


def raw(path):
  read = gzip.open if path.suffix == '.gz' else open
  with read(path, 'rt', encoding='utf-8') as lines:
    return [json.loads(line) for line in lines]


def test_human_eval_is_read_whole(shared):
  path = shared / 'data' / 'human_eval' / 'HumanEval.jsonl.gz'
  rows, given = code.human_eval(path), raw(path)
  assert rows == code.human_eval(path.parent) and len(rows) == 164
  for row, source in zip(rows, given, strict=True):
    assert row == {
      'prompt': source['prompt'],
      'solution': source['canonical_solution'],
      **{name: source[name] for name in ('test', 'entry_point', 'task_id')},
    }


def test_mbpp_is_split_by_number(shared):
  path = shared / 'data' / 'mbpp' / 'mbpp.jsonl'
  given = {row['task_id']: row for row in raw(path)}
  splits = {name: code.mbpp(path, name) for name in code.MBPP_SPLITS}
  # Austin et al., 2021: 10 for prompts, 500, 90, 374.
  sizes = {name: len(rows) for name, rows in splits.items()}
  assert sizes == {'prompt': 10, 'test': 500, 'validation': 90, 'train': 374}
  rows = {row['task_id']: row for split in splits.values() for row in split}
  assert rows.keys() == given.keys()
  for number, row in rows.items():
    source = given[number]
    assert row['solution'].splitlines() == source['code'].splitlines()
    assert [test.split() for test in row['test_list']] == [
      test.split() for test in source['test_list']
    ]
    assert row['prompt'].startswith(source['text'].replace('\r', ''))
    assert f'def {row["entry_point"]}' in source['code']
    assert row['entry_point'] in row['test_list'][0]
    assert all(test in row['prompt'] for test in row['test_list'])
    assert '\r' not in json.dumps(row)
  assert rows[367]['test_setup_code'].startswith('root = Node(1)')
  assert rows[126]['entry_point'] == 'sum'


def test_mbpp_shows_so_many_tests(shared):
  row = code.mbpp(shared / 'data' / 'mbpp', 'prompt', shown_tests=1)[1]
  assert row['prompt'] == (
    'Write a function to find the similar elements from the given two tuple '
    'lists.\nYour code should pass these tests:\n\n'
    'assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n'
  )
  assert len(row['test_list']) == 3


def test_the_hub_is_asked_for_the_same_columns(shared, monkeypatch):
  folder = shared / 'data'
  asked = []

  def read_hub(name, split, *, config=None, prompt_column=None):
    asked.append((name, split, config))
    local = (
      'mbpp/mbpp.jsonl' if 'mbpp' in name else ('human_eval/HumanEval.jsonl.gz')
    )
    return datasets.read_rows(folder / local, prompt_column)

  monkeypatch.setattr(datasets, 'read_hub', read_hub)
  assert code.human_eval(None) == code.human_eval(folder / 'human_eval')
  assert code.mbpp(None, 'test') == code.mbpp(folder / 'mbpp', 'test')
  assert asked == [
    ('openai/openai_humaneval', 'test', None),
    ('google-research-datasets/mbpp', 'test', 'full'),
  ]


MBPP = dict(
  task_id=601,
  text='Add.',
  code='def f(): 1',
  test_list=['f()'],
  test_setup_code='',
)


@pytest.mark.parametrize(
  'change, text',
  [
    (dict(code=None), 'row 0: the column code must be of type str'),
    (dict(task_id='1'), 'row 0: the column task_id must be of type int'),
    (dict(test_list=[]), 'row 0: test_list must hold'),
    (dict(test_list=[1]), 'row 0: test_list must hold'),
    (dict(test_list='f()'), 'row 0: the column test_list must be of type list'),
    (dict(task_id=1), 'no problems of the split train'),
  ],
)
def test_what_is_not_mbpp_is_refused(tmp_path, change, text):
  path = scripts.write_rows(tmp_path / 'mbpp.jsonl', [MBPP | change])
  with pytest.raises(UserError, match=text) as caught:
    code.mbpp(path, 'train')
  assert path in str(caught.value)


def test_entry_points_that_cannot_be_known(tmp_path):
  changes = [
    {},
    dict(code='def f(): 1\ndef g(): 2', test_list=['f() + g()']),
    dict(code='f = len'),
  ]
  path = scripts.write_rows(
    tmp_path / 'a.jsonl', [MBPP | change for change in changes]
  )
  found = [row['entry_point'] for row in code.mbpp(path, 'train')]
  assert found == ['f', '', '']


def test_other_mistakes_are_named(tmp_path):
  with pytest.raises(UserError, match="'validation', 'train'.*not 'dev'"):
    code.mbpp(tmp_path, 'dev')
  with pytest.raises(UserError, match='shown_tests=0'):
    code.mbpp(tmp_path, 'train', 0)
  with pytest.raises(UserError, match='holds no mbpp.jsonl'):
    code.mbpp(tmp_path, 'train')
  path = scripts.write_rows(tmp_path / 'h.jsonl', [dict(prompt='p', test='t')])
  with pytest.raises(UserError, match='row 0: the column canonical_solution'):
    code.human_eval(path)


def test_a_configuration_can_name_them(shared):
  folder = shared / 'data'
  found = data.human_eval(str(folder / 'human_eval'), held_out=50, seed=1)
  assert (len(found.train), len(found.held_out)) == (114, 50)
  assert found.demonstrations == found.train
  prompts = {row['prompt'] for row in found.train}
  assert not prompts & {row['prompt'] for row in found.held_out}
  found = data.mbpp(str(folder / 'mbpp'), held_out=7, shown_tests=2)
  assert (len(found.train), len(found.held_out)) == (374, 7)
  assert found.held_out[0]['task_id'] == 11
  assert len(data.mbpp(str(folder / 'mbpp')).held_out) == 500
