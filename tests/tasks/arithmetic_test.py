"""Every generated line is checked by an independent evaluator."""

import ast
import itertools
import operator
import re

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import arithmetic
from jaxrl_llm.tasks.vocabulary import character_tokenizer

NODES = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(text):
  """Python's own grammar as the oracle."""

  def walk(node):
    if isinstance(node, ast.BinOp):
      return NODES[type(node.op)](walk(node.left), walk(node.right))
    if isinstance(node, ast.UnaryOp):
      return -walk(node.operand)
    return node.value

  return walk(ast.parse(text, mode='eval').body)


def count_operators(text):
  return sum(isinstance(n, ast.BinOp) for n in ast.walk(ast.parse(text)))


@pytest.mark.parametrize('operators', ['+-*', '+', '-', '*', '+-'])
def test_every_step_has_the_value_of_the_prompt(operators):
  rows = arithmetic.generate(
    300, 1, operations=(2, 5), operands=(0, 99), operators=operators
  )
  for row in rows:
    expression = row['prompt'].removesuffix('=')
    lines = row['solution'].split('=')
    assert {value(line) for line in lines} == {int(row['answer'])}
    assert value(expression) == int(row['answer']) == int(lines[-1])
    assert len(lines) == row['operations'] == count_operators(expression)
    assert 2 <= row['operations'] <= 5
    left = [count_operators(line) for line in lines]
    assert left == list(range(row['operations']))[::-1]


def test_modulus_reduces_every_step():
  for row in arithmetic.generate(300, 2, operations=(2, 4), modulus=10):
    lines = row['solution'].split('=')
    truth = value(row['prompt'].removesuffix('=')) % 10
    assert {value(line) % 10 for line in lines} == {truth}
    assert row['answer'] == str(truth)


def test_largest_bounds_every_intermediate_result():
  for row in arithmetic.generate(300, 3, operations=(3, 3), largest=20):
    numbers = row['solution'].replace('=', ' ').replace('*', ' ')
    numbers = numbers.replace('+', ' ').replace('-', ' ').split()
    assert max(map(int, numbers)) <= 20


def test_settings_bound_the_operands():
  rows = arithmetic.generate(200, 4, operands=(10, 12), operations=(2, 2))
  used = {n for r in rows for n in r['prompt'][:-1].replace('*', '+')
          .replace('-', '+').split('+')}  # fmt: skip
  assert used == {'10', '11', '12'}


def test_rows_are_distinct_and_reproducible():
  rows = arithmetic.generate(500, 6)
  prompts = {row['prompt'] for row in rows}
  assert len(prompts) == 500
  assert rows == arithmetic.generate(500, 6)
  assert rows != arithmetic.generate(500, 7)


def test_an_exhausted_space_is_an_error_not_a_hang():
  space = dict(operations=(1, 1), operands=(1, 3), operators='+')
  assert len(arithmetic.generate(9, 0, **space)) == 9
  with pytest.raises(UserError, match='only 9 of 10'):
    arithmetic.generate(10, 0, **space)


@pytest.mark.parametrize(
  'wrong',
  [
    dict(operations=(0, 2)),
    dict(operations=(3, 2)),
    dict(operands=(-1, 2)),
    dict(operands=(5, 2)),
    dict(operators='+/'),
    dict(operators=''),
    dict(modulus=1),
    dict(largest=0),
    dict(count=0),
  ],
)
def test_impossible_settings_are_named(wrong):
  with pytest.raises(UserError, match=next(iter(wrong))):
    arithmetic.generate(**{'count': 5, 'seed': 0, **wrong})


def test_the_alphabet_suffices():
  tokenizer = character_tokenizer(arithmetic.ALPHABET)
  for row in arithmetic.generate(200, 9, operations=(1, 5), operands=(0, 99)):
    ids = tokenizer(row['prompt'] + row['solution'])['input_ids']
    assert min(ids) > tokenizer.unk_token_id


def test_careless_solutions_ignore_precedence_and_answers_do_not():
  rows = arithmetic.generate(400, 3, operations=(2, 3), careless=0.5)
  wrong = 0
  for row in rows:
    assert value(row['prompt'][:-1]) == int(row['answer'])
    wrong += row['solution'].split('=')[-1] != row['answer']
  assert 0.1 < wrong / len(rows) < 0.5
  careless = arithmetic.generate(1, 0, operators='*+', careless=1.0)[0]
  assert careless['solution'].count('=') == careless['operations'] - 1


def test_careless_steps_fail_for_themselves():
  settings = dict(operations=(6, 6), operators='+*', modulus=10)
  rows = arithmetic.generate(
    500, 0, careless=0.3, careless_per='step', **settings
  )
  right = mixed = 0
  for row in rows:
    lines = [row['prompt'][:-1], *row['solution'].split('=')]
    # A step obeys precedence, or takes the first operation.
    kinds = set()
    for before, after in itertools.pairwise(lines):
      left = re.sub(r'^(\d)(.)(\d)', worked, before)
      first = re.sub(r'(\d)(\*)(\d)', worked, before, count=1)
      first = first if '*' in before else left
      assert after in (left, first)
      kinds |= {after == first} if left != first else set()
    mixed += len(kinds) == 2
    right += lines[-1] == row['answer']
  assert 0.6 < right / 500 < 0.9 and mixed > 100
  with pytest.raises(UserError, match='careless_per'):
    arithmetic.generate(1, 0, careless_per='token')


def worked(match):
  a, sign, b = match.groups()
  return str((int(a) * int(b) if sign == '*' else int(a) + int(b)) % 10)
