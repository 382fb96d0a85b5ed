"""Reward functions against hand-made cases, real answers, and the scorer."""

import importlib.util
import inspect
import random
import sys
import time

import mistakes
import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import RewardPart, Workers, calling, functions, score
from jaxrl_llm.tasks import arithmetic, datasets

SETTINGS = {
  'format_match': dict(pattern='a+'),
  'length_penalty': dict(limit=8, buffer=4),
  'regex_match': dict(pattern='a'),
  'repetition_penalty': dict(n=2),
  'script_share': dict(scripts=['LATIN']),
}
PACKAGES = dict(math_verify_answer='math_verify', sentiment='vaderSentiment')


def test_every_public_name_is_a_reward_or_a_factory_of_one():
  columns = {'completion_ids': [[1], [1, 2]], 'finished': [True, False]}
  public = [
    name
    for name, value in vars(functions).items()
    if inspect.isfunction(value) and not name.startswith('_')
  ]
  assert sorted(public) == functions.__all__
  for name in public:
    function = getattr(functions, name)
    kind = 'Factory:' if name in SETTINGS else 'Reward:'
    assert function.__doc__.startswith(kind)
    if name in SETTINGS:
      function = function(**SETTINGS[name])
    if name in PACKAGES and not importlib.util.find_spec(PACKAGES[name]):
      continue
    columns['answer'] = ['A', 'B'] if name == 'choice' else ['1', '2']
    part = RewardPart(name, function)
    assert score([part], ['p', 'q'], ['#### 1', 'a'], columns).valid.all()


def test_exact_match_ignores_only_outer_whitespace():
  texts = [' 35\n', '3 5', '35', '', '35.0']
  gold = ['35', '35', 35, '', '35']
  assert functions.exact_match(texts, gold) == [1, 0, 1, 1, 0]
  texts, gold = ['A  b', 'a b', ' a\nb ', 'ab'], ['a b'] * 4
  for settings, expected in (
    ({}, [0, 1, 0, 0]),
    ({'collapse_spaces': True}, [0, 1, 1, 0]),
    ({'ignore_case': True, 'collapse_spaces': True}, [1, 1, 1, 0]),
  ):
    assert functions.exact_match(texts, gold, **settings) == expected
    loaded = calling.load_reward('exact_match', settings, 'config.rewards.r')
    assert loaded(completions=texts, answer=gold) == expected
  assert functions.exact_match(['AB'], ['ab'], ignore_case=True) == [1]
  for missing in (None, True, [1]):
    with pytest.raises(UserError, match='sample 1'):
      functions.exact_match(['a', 'b'], ['a', missing])


@pytest.mark.parametrize(
  'name, settings, problem',
  [
    ('exact_match', {'case': True}, "has no setting 'case'"),
    ('exact_match', {'ignore_case': 'no'}, "ignore_case is 'no', not"),
    ('exact_match', {'answer': 'a'}, "has no setting 'answer'"),
    ('choice', {'letters': ['A']}, "letters is ['A'], not"),
    ('token_f1', {'n': 1}, "has no setting 'n'"),
    ('regex_match', {}, 'needs pattern'),
    ('regex_match', {'pattern': '('}, 'not a regular expression'),
    ('regex_match', {'pattern': 3}, 'not a regular expression'),
    ('regex_match', {'pattern': '(a)(b)'}, 'has 2 groups'),
  ],
)
def test_wrong_settings_are_refused(name, settings, problem):
  with mistakes.refused(problem):
    calling.load_reward(name, settings, 'config.rewards.r')


def test_regex_match_compares_what_the_last_match_holds():
  tags = functions.regex_match(r'<answer>(.*?)</answer>', ignore_case=True)
  texts = ['<answer>4</answer> <answer> Yes\n</answer>', 'yes', '<answer>yes']
  assert tags(texts, ['yes'] * 3) == [1, 0, 0]
  number = functions.regex_match(r'-?\d+')
  assert number(['so 4, no: -5.', '-5 or 6', 'none'], [-5] * 3) == [1, 0, 0]
  assert functions.regex_match('(a)|b')(['b', 'a'], ['', 'a']) == [1, 1]
  spaces = functions.regex_match('x(.*)', collapse_spaces=True)
  assert spaces(['x a \n b', 'xab'], ['a b'] * 2) == [1, 0]


def test_choice_compares_letters():
  texts = ['\\boxed{(B) 5}', 'Answer: **b**', 'B', 'A or B', 'C', 'so 5']
  assert functions.choice(texts, ['B'] * 6) == [1, 1, 1, 0, 0, 0]
  assert functions.choice(['The answer is (E).'], ['(E) 5']) == [1]
  assert functions.choice(['K'], ['K'], letters='JK') == [1]
  for gold in ('K', '2', 'A or B'):
    with mistakes.refused('sample 1', 'not one of ABCDEFGHIJ'):
      functions.choice(['A', 'B'], ['A', gold])


def test_token_f1_is_squads():
  texts = ['The cat sat.', 'Cat, cat', 'cat', 'dog', 'the', 'dog', '7']
  gold = ['a cat', 'cat cat dog', 'CAT!', 'cat', '', '', 7]
  expected = [2 / 3, 4 / 5, 1, 0, 1, 0, 1]
  np.testing.assert_allclose(functions.token_f1(texts, gold), expected)


def test_arithmetic_answer_judges_what_follows_the_last_equals_sign():
  rows = arithmetic.generate(100, 0, operations=(1, 4), operands=(0, 20))
  gold = [row['answer'] for row in rows]
  solutions = [row['solution'] for row in rows]
  assert functions.arithmetic_answer(solutions, gold) == [1] * 100
  assert functions.arithmetic_answer(gold, gold) == [1] * 100
  wrong = [text + '0' for text in solutions]
  assert functions.arithmetic_answer(wrong, gold) == [0] * 100
  texts = ['3+4=7=', '3+4=7=8', '7=', '', '6=7', '3+4']
  assert functions.arithmetic_answer(texts, ['7'] * 6) == [0, 0, 0, 0, 1, 0]


def test_prefix_match_counts_the_end_as_a_symbol():
  texts = ['1,2', '1,2', '1,2,3', '1,', '1,3', '2,2', '', '', '', '7']
  gold = ['1,2'] * 7 + [''] * 3
  finished = [True, False] + 6 * [True] + [False, True]
  rewards = [1, 3 / 4, 3 / 4, 2 / 4, 2 / 4, 0, 0, 1, 0, 0]
  assert functions.prefix_match(texts, gold, finished) == rewards


@pytest.mark.parametrize('split', ['train', 'test'])
def test_every_gsm8k_answer_is_right_by_itself(shared, split):
  rows = datasets.gsm8k(shared / 'data' / 'gsm8k', split)
  assert len(rows) == {'train': 7473, 'test': 1319}[split]
  solutions = [row['solution'] for row in rows]
  numbers = [row['answer'] for row in rows]
  boxed = [f'so $\\boxed{{{number}}}$.' for number in numbers]
  plain = [f'The answer is ${int(number):,}.' for number in numbers]
  ones = [1.0] * len(rows)
  for texts, gold in (
    (solutions, numbers),
    (solutions, solutions),
    (boxed, solutions),
  ):
    assert functions.gsm8k_answer(texts, gold) == ones
  assert functions.gsm8k_answer(plain, numbers) == [0.0] * len(rows)
  assert functions.gsm8k_answer_or_last_number(plain, numbers) == ones


def test_a_perturbed_gsm8k_answer_scores_0(shared):
  rows = datasets.gsm8k(shared / 'data' / 'gsm8k', 'train')
  # 0/7 is 0: no perturbation of an answer of 0.
  rows = [row for row in rows if row['answer'] != '0'][:1000]
  rng = random.Random(0)
  wrong = []
  for row in rows:
    head, number = row['solution'].rsplit('####', 1)[0], int(row['answer'])
    changed = rng.choice(
      [number + 1, number - 1, 10 * number + 1, number + 0.5, f'{number}/7']
      + [f'{number}.01', f'-{number + 1}', f'{number} million', '', 'x']
    )
    wrong.append(f'{head}#### {changed}')
  gold = [row['answer'] for row in rows]
  assert functions.gsm8k_answer(wrong, gold) == [0.0] * 1000


def test_a_gold_answer_without_a_number_is_the_data_sets_mistake():
  with mistakes.refused('sample 1 holds no number'):
    functions.gsm8k_answer(['#### 1', '#### 1'], ['1', 'a lot'])


def test_math_answer_compares_marked_answers():
  texts = ['so \\boxed{\\frac{2}{4}}', '#### x=0.5', 'The answer is $1/2$.']
  assert functions.math_answer(texts, ['\\frac12'] * 3) == [1, 1, 1]
  assert functions.math_answer(texts, ['so $\\boxed{.5}$.'] * 3) == [1, 1, 1]
  assert functions.math_answer(texts, [0.5, '1', '2']) == [1, 0, 0]
  texts = ['1/2', '', '\\boxed{}', '\\boxed{1/2', '\\boxed{2} \\boxed{1/2}']
  texts.append('\\boxed{1/2} \\boxed{2')
  assert functions.math_answer(texts, ['1/2'] * 6) == [0, 0, 0, 0, 1, 0]
  for bad in ('', 'a' * 400, '\\boxed{}', None):
    with mistakes.refused('sample 1'):
      functions.math_answer(['\\boxed{1}'] * 2, ['1', bad])


def test_without_math_verify_workers_name_the_extra(monkeypatch):
  for cached in (functions.symbolic._math_verify, functions.symbolic._parsed):
    cached.cache_clear()
  monkeypatch.setitem(sys.modules, 'math_verify', None)
  assert functions.math_answer(['\\boxed{2}'], ['3']) == [0]
  part = RewardPart('symbolic', functions.math_verify_answer)
  for judge in (
    lambda: score([part], ['p'], ['\\boxed{2x}'], {'answer': ['3x']}),
    functions.math_answer.warm_up,
    functions.math_verify_answer.warm_up,
  ):
    with pytest.raises(UserError, match=r'pip install .jaxrl_llm\[math\]'):
      judge()
  functions.symbolic._math_verify.cache_clear()


def test_math_verify_runs_in_workers_alone():
  """What it is given may never end, and here nothing could end it."""
  pytest.importorskip('math_verify')
  name = 'math_verify_answer'
  with mistakes.refused(f'config.r: {name}', 'set workers, as in'):
    calling.load_reward(name, {}, 'config.r')
  with Workers(name, workers=1) as workers:
    scores = workers(['p'], ['\\boxed{2x}'], answer=['x+x'])
  assert scores == [1.0]


def test_readers_read_what_their_rewards_judge():
  answers = {
    'choice': ['\\boxed{(B) 2}', 'B'],
    'exact_match': [' 12 ', '12'],
    'arithmetic_answer': ['5+7=12', '12'],
    'gsm8k_answer': ['#### 12', '\\boxed{12.0}'],
    'gsm8k_answer_or_last_number': ['#### 12', 'it is 12.'],
    'math_answer': ['\\boxed{x=12}', '#### \\frac{24}{2}'],
    'math_verify_answer': ['\\boxed{x=12}', '#### \\frac{24}{2}'],
  }
  assert answers.keys() == functions.READERS.keys() <= set(functions.__all__)
  for name, texts in answers.items():
    reader = functions.READERS[name]
    gold = ['B' if name == 'choice' else '12'] * 2
    assert getattr(functions, name)(texts, gold) == [1, 1]
    assert reader(texts[0]) == reader(texts[1]) is not None
    other = texts[1].replace('2', '3').replace('B', 'C')
    assert reader(texts[0]) != reader(other)


def test_format_match_is_about_the_whole_completion():
  hashes = functions.format_match(r'.*#### -?[\d.,]+')
  texts = ['a\nb\n#### 1,200\n', '#### -3', '#### 3 apples', 'a', '']
  assert hashes(texts) == [1, 1, 0, 0, 0]
  tags = functions.format_match(r'<think>.+</think>\s*<answer>.+</answer>')
  texts = ['<think>a\nb</think>\n<answer>3</answer>', '<think>a</think>']
  texts.insert(1, 'x <think>a</think><answer>3</answer>')
  assert tags(completions=texts, prompts=texts) == [1, 0, 0]
  with pytest.raises(UserError, match='not a regular expression'):
    functions.format_match('(')


def test_lengths_are_tokens_not_characters():
  ids = [[5] * n for n in (0, 4, 5, 6, 8, 20)]
  assert functions.length_in_tokens(ids) == [0, 4, 5, 6, 8, 20]
  penalty = functions.length_penalty(limit=8, buffer=4)
  assert penalty(ids) == [0, 0, -0.25, -0.5, -1, -1]
  with pytest.raises(UserError, match='buffer=9'):
    functions.length_penalty(limit=8, buffer=9)


def test_repetition_is_the_share_of_ngrams_that_occurred_before():
  # Of 1 2, 2 1, 1 2, 2 1, 1 2 three repeat; of 1 2 1, 2 1 2, … two of four.
  ids = [[1, 2, 1, 2, 1, 2], [1, 2, 3, 4], [7] * 11, [1], []]
  assert functions.repetition_penalty(2)(ids) == [-0.6, 0, -0.9, 0, 0]
  assert functions.repetition_penalty(3)(ids[:1]) == [-0.5]
  assert functions.repetition_penalty()([[5, 6, 7]]) == [0]
  with pytest.raises(UserError, match='n=0'):
    functions.repetition_penalty(0)


def test_script_share_counts_letters():
  latin = functions.script_share(['LATIN'])
  texts = ['So 3 + 4 = 7.', 'ab вг', '12 + 34', '', 'é', 'xπ']
  texts += ['漢字 ok', 'ｆｘ 𝑓']
  assert latin(texts) == [1, 0.5, 1, 1, 1, 0.5, 0.5, 1]
  japanese = functions.script_share(['CJK', 'HIRAGANA', 'KATAKANA'])
  assert japanese(['時々カタカナとー、ok']) == [6 / 8]
  for scripts in ('LATIN', [], ['Latin'], [None]):
    with pytest.raises(UserError, match='must be a list of scripts'):
      functions.script_share(scripts)


def test_marks_on_letters_do_not_count_and_do_not_cost():
  share = functions.script_share(['HANGUL', 'LATIN'])
  # A syllable of three parts is one letter.
  assert share(['\u1112\u1161\u11ab' + 'e\u0323\u0301' + 'ж']) == [2 / 3]
  assert share(['e' + '\u0301' * 35 + '\u0323' * 35 + 'ж']) == [1 / 2]
  for marks in ('\u0301\u0323', '\u0f73', '\u0344\u0323'):
    began = time.process_time()
    assert share(['a' + marks * 30_000]) == [1.0]
    assert time.process_time() - began < 1.0


def test_sentiment_is_that_of_whole_texts(shared):
  """Also where it looks only at the words near each."""
  vader = pytest.importorskip('vaderSentiment.vaderSentiment')
  analyzer = vader.SentimentIntensityAnalyzer()
  rng = random.Random(0)
  words = [*analyzer.lexicon][:1500] + 60 * [
    *('never', 'so', 'this', 'without', 'doubt', 'the', 'not', 'very', 'but'),
    *('kind', 'of', 'at', 'least', 'no', 'or', 'BAD', 'ass', 'shit', "isn't"),
    *('yeah right', 'hand to mouth', 'kiss of death', 'the bomb', 'sort of'),
  ]
  texts = [
    ' '.join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(700)
  ]
  play = (shared / 'data' / 'text' / 'tinyshakespeare.txt').read_text()
  texts += play[:60_000].split('\n\n')
  assert functions.sentiment(texts) == [
    analyzer.polarity_scores(text)['compound'] for text in texts
  ]


@pytest.mark.parametrize('text', ['a good ' * 6000, '\U0001f600' * 6000])
def test_sentiment_is_cheap(text):
  functions.sentiment([''])
  began = time.process_time()
  functions.sentiment([text])
  assert time.process_time() - began < 2.0


def test_sentiment_without_its_package_names_the_extra(monkeypatch):
  functions.texts.vader.cache_clear()
  monkeypatch.setitem(sys.modules, 'vaderSentiment', None)
  part = RewardPart('sentiment', functions.sentiment)
  with pytest.raises(UserError, match=r'jaxrl_llm\[sentiment\]'):
    score([part], ['p'], ['c'], {})
  functions.texts.vader.cache_clear()
