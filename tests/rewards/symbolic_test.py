"""math-verify behind a reward: what it adds, and what it gets wrong."""

import random
import threading

import answer_forms
import pytest

from jaxrl_llm.rewards import functions, symbolic
from jaxrl_llm.tasks import datasets

pytest.importorskip('math_verify')


@pytest.mark.parametrize(
  'answer, gold, equal',
  [
    ('x^2-1', '(x-1)(x+1)', True),
    (r'\frac{x^2-1}{x-1}', 'x+1', True),
    (r'\sin(x)^2+\cos(x)^2', '1', True),
    ('y=2x+3', '2x-y+3=0', True),
    ('x+2', 'x+1', False),
    ('a}b{', '1', False),
    ('', '1', False),
  ],
)
def test_algebra(answer, gold, equal):
  assert symbolic.equal(answer, gold) == equal
  texts = [f'so \\boxed{{{answer}}}', 'no answer']
  assert functions.math_verify_answer(texts, [gold] * 2) == [equal, 0]


def test_what_math_answer_accepts_is_right_too():
  texts = [r'\boxed{\text{evelyn}}', r'\boxed{5.}', r'\boxed{3 : 1}']
  gold = [r'\text{Evelyn}', '5', '3:1']
  assert functions.math_verify_answer(texts, gold) == [1, 1, 1]


def test_no_signal_is_used():
  """In a thread an alarm signal is refused, or every answer would score 0."""
  scores = []
  judge = lambda: scores.extend(
    functions.math_verify_answer([r'\boxed{(x+1)^2}'], ['x^2+2x+1'])
  )
  thread = threading.Thread(target=judge)
  thread.start()
  thread.join()
  assert scores == [1]


@pytest.mark.slow
def test_precision_and_recall_on_math(shared):
  rows = datasets.math(shared / 'data' / 'math', 'test')
  golds = list(dict.fromkeys(row['answer'] for row in rows))
  cases = list(dict.fromkeys(answer_forms.cases(golds, seed=0)))
  plain = [case for case in cases if answer_forms.number(case[0]) is not None]
  others = [case for case in cases if answer_forms.number(case[0]) is None]
  chosen = random.Random(0).sample(plain, 2000) + others
  wrongly = [c for c in chosen if symbolic.equal(c[1], c[0]) != c[2]]
  missed = [case for case in wrongly if case[2]]
  confused = [case for case in wrongly if not case[2]]
  right = sum(case[2] for case in chosen)
  hits = right - len(missed)
  recall, precision = hits / right, hits / (hits + len(confused))
  print(f'{len(chosen)} cases: {recall=:.4f} {precision=:.4f}')
  print('missed', missed)
  print('taken for right', confused)
  assert recall > 0.98 and precision > 0.99
