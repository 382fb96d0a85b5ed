"""Random rows, templates and answers: what comes of them is stated or refused.

Every crash that these have found is a test of its own in the module's file.
"""

import gzip
import json
import time
from fractions import Fraction

import pytest
from fuzzing import ANY_TEXT, JSON, fuzz, result_or_refusal
from hypothesis import strategies as st

from jaxrl_llm.rewards import functions, mathematics
from jaxrl_llm.tasks import answers, datasets, prompts, vocabulary

ROW = st.dictionaries(
  st.sampled_from(['prompt', 'question', 'problem', 'answer', 'level', 'x'])
  | ANY_TEXT,
  JSON | st.sampled_from(['2 + 2 = ?', '#### 4', '\\boxed{4}']),
  max_size=4,
)
LINE = (
  st.binary(max_size=60)
  | (JSON | ROW).map(lambda value: json.dumps(value).encode())
  | st.sampled_from(
    [b'', b' \t', b'\xef\xbb\xbf{}', b'{"prompt": "a"}', b'NaN', b'-']
    + [b'1' * 5000, b'[' * 5000, b'{"prompt": "\\ud800"}', b'{"a": 1e999}']
  )
)
CONTENT = st.binary(max_size=200) | st.lists(LINE, max_size=5).map(b'\n'.join)


@pytest.fixture(scope='module')
def shared_path(tmp_path_factory):
  return tmp_path_factory.mktemp('rows')


@fuzz(
  60,
  2000,
  content=CONTENT,
  name=st.sampled_from(['a.jsonl', 'a.json', 'a.jsonl.gz']),
  packed=st.booleans(),
)
def test_rows_are_read_or_refused(shared_path, content, name, packed):
  path = shared_path / name
  if packed and name.endswith('.gz'):
    content = gzip.compress(content)
  path.write_bytes(content)
  rows = result_or_refusal(datasets.read_rows, path)
  assert rows is None or rows
  for row in rows or ():
    assert isinstance(row['prompt'], str)


TOKENIZER = vocabulary.character_tokenizer(
  'abcdefghijklmnopqrstuvwxyz ABC<>|0123456789:.,\n{}%'
)
PIECE = st.sampled_from(
  ['{{ messages[0].content }}', '{{ messages[0]["role"] }}', '{{ bos_token }}']
  + ['{% for message in messages %}', '{% endfor %}', '{% if x %}', '{% endif']
  + ['{{ message.content }}', '{{ 1 / 0 }}', '{{ raise_exception("no") }}']
  + ['{{ "".__class__.__mro__ }}', '{{ messages.append(1) }}', '{{ x.y.z }}']
  + ['{% set x = range(10) %}', '{% for i in range(10**9) %}', '{%', '}}', '{#']
  + ['{% include "/etc/passwd" %}', '{{ cycler.__init__.__globals__ }}']
  + ['{{ messages | tojson }}', '{% generation %}', '{% break %}', '<|user|>']
  + ['{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}', '{{ "a" * 10**4 }}']
)
TEMPLATE = st.lists(PIECE | st.text(max_size=8), max_size=6).map(''.join)


@fuzz(
  20,
  1000,
  template=TEMPLATE,
  text=st.text('abc 123', max_size=12) | ANY_TEXT,
  system=st.none() | st.text('abc', max_size=5),
  suffix=st.sampled_from(['', ':', '\ud800']),
  overlong=st.sampled_from(['error', 'drop']),
)
def test_prompts_are_encoded_or_refused(
  template, text, system, suffix, overlong
):
  rows = [{'prompt': text}, {'prompt': 'ab'}]
  for chosen in (template, None):
    encoded = result_or_refusal(
      prompts.encode_prompts,
      rows,
      TOKENIZER,
      40,
      chat_template=chosen,
      system_prompt=system,
      suffix=suffix,
      overlong=overlong,
    )
    if encoded is not None:
      assert len(encoded.tokens) + encoded.dropped == len(rows)
      assert all(1 <= len(ids) <= 40 for ids in encoded.tokens)


# What answers are made of, and what parsers of them have stumbled over.
ATOM = st.sampled_from(
  [r'\frac', r'\sqrt', r'\boxed{', r'\text{', r'\left(', r'\right)', r'\pi']
  + [*'{}()[]^_+-*/!=,;.$%#', '####', 'answer is', '±', '√', '∞', '⦃', '⏎']
  + ['9' * 30, '0', '1', '2', '10', '1.5e99', '1e-99', '-', '−', '1,000', '½']
  + ['x', 'y', 'xy', 'sin', 'and', ' ', '\n', '٣', '²', '①', '\u0660', 'e', 'i']
  + [r'\begin{pmatrix}', r'\end{pmatrix}', '&', r'\\', r'\pm', r'\cup', '<']
  + ['^{10^{10}}', '!!', '^{-1}', '1/0', r'\frac10', r'\sqrt[0]', '(' * 40]
  + ['{' * 60, r'\frac{' * 30, '-' * 50, '1+' * 100, 'x^2' * 20, '!' * 50]
)
ANSWER = st.lists(ATOM, max_size=25).map(''.join) | st.text(max_size=60)
MARKED = st.sampled_from(['', r'\boxed{', '#### ', 'The answer is ']).flatmap(
  lambda mark: ANSWER.map(lambda text: f'{mark}{text}' + '}' * ('{' in mark))
)
# Seconds of this process for one text; it takes milliseconds.
BOUND = 2.0


@fuzz(150, 10_000, text=MARKED | ANSWER | ANY_TEXT)
def test_answers_are_read_in_bounded_time(text):
  start = time.process_time()
  numbers = [
    answers.parse_number(text),
    answers.marked_number(text),
    answers.last_number(text),
  ]
  assert all(n is None or isinstance(n, Fraction) for n in numbers)
  for form in (
    mathematics.read_answer(text),
    mathematics.marked_answer(text),
    answers.marked_letter(text),
  ):
    hash(form)
    assert form == form
  assert time.process_time() - start < BOUND


REWARDS = {
  name: getattr(functions, name)
  for name in functions.__all__
  if name not in ('math_verify_answer', 'sentiment')
}
FACTORIES = {
  'format_match': dict(pattern=r'.*#### -?[\d.,]+'),
  'length_penalty': dict(limit=8, buffer=4),
  'regex_match': dict(pattern=r'-?[\d.,]+'),
  'repetition_penalty': {},
  'script_share': dict(scripts=['LATIN']),
}


@fuzz(
  60,
  5000,
  text=MARKED | ANSWER | ANY_TEXT,
  gold=ANSWER | st.integers() | st.floats() | st.sampled_from(['4', 'x+1']),
  ids=st.lists(st.integers(0, 9), max_size=12),
)
def test_rewards_are_finite_in_bounded_time(text, gold, ids):
  start = time.process_time()
  columns = dict(answer=[gold], completion_ids=[ids], finished=[True])
  for name, function in REWARDS.items():
    if name in FACTORIES:
      function = function(**FACTORIES[name])
    scores = result_or_refusal(
      function, prompts=['p'], completions=[text], **columns
    )
    assert scores is None or len(scores) == 1 and -1e9 < scores[0] < 1e9, name
  assert time.process_time() - start < len(REWARDS) * BOUND


@fuzz(40, 5000, text=ANSWER)
def test_an_answer_equals_itself(text):
  """What can be read as a gold answer is right when it is given."""
  scores = result_or_refusal(
    functions.math_answer, completions=[f'\\boxed{{{text}}}'], answer=[text]
  )
  marked = answers.marked_text(f'\\boxed{{{text}}}')
  if scores is not None and marked == text and '\\boxed{' not in text:
    assert scores == [1.0] or '####' in text
