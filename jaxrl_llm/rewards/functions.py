r"""Reward functions, and factories that return one.

Every name in `__all__` is one or the other, and its docstring begins with
"Reward" or "Factory".  A reward function is called as

  fn(prompts=, completions=, <columns it names>) -> list[float | None]

with N strings each; completions do not contain the end token.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import mathematics, symbolic
from jaxrl_llm.tasks import answers

__all__ = [
  'arithmetic_answer',
  'exact_match',
  'format_match',
  'gsm8k_answer',
  'gsm8k_answer_or_last_number',
  'length_in_tokens',
  'length_penalty',
  'math_answer',
  'math_verify_answer',
  'prefix_match',
  'repetition_penalty',
  'script_share',
  'sentiment',
]


def exact_match(
  completions: Sequence[str], answer: Sequence[Any], **kwargs
) -> list[float]:
  """Reward: 1 where the completion, stripped, equals the stripped answer."""
  return [
    float(text.strip() == gold.strip())
    for text, gold in zip(completions, _texts(answer), strict=True)
  ]


def arithmetic_answer(
  completions: Sequence[str], answer: Sequence[Any], **kwargs
) -> list[float]:
  """Reward: 1 where the text after the last '=' is exactly the answer.

  Without '=' the whole completion counts, so an answer without steps is scored
  too.  Neither the steps nor the response's end are checked: a response that
  the length limit cuts off at the right digits scores 1.
  Fits `tasks.arithmetic`.
  """
  return exact_match([_result(text) for text in completions], answer)


def prefix_match(
  completions: Sequence[str],
  answer: Sequence[Any],
  finished: Sequence[bool],
  **kwargs,
) -> list[float]:
  """Reward: share of the answer that is right, counted from the left.

  An answer of n characters counts as n + 1 symbols; the last is the end.
  With k leading characters right,

    r = k / (n + 1),   and 1 where the completion is the answer and `finished`.

  The end counts only after a whole answer.  Partial scores let learning begin
  where a whole answer is never sampled.
  """
  scores = []
  for text, gold, ended in zip(
    completions, _texts(answer), finished, strict=True
  ):
    right = 0
    while right < min(len(text), len(gold)) and text[right] == gold[right]:
      right += 1
    complete = bool(ended) and text == gold
    scores.append((right + complete) / (len(gold) + 1))
  return scores


def gsm8k_answer(
  completions: Sequence[str], answer: Sequence[Any], **kwargs
) -> list[float]:
  r"""Reward: 1 where the marked number equals the answer's, exactly.

  The completion's number is the one after its last `####`, else the one in its
  last `\boxed{…}`; the first is the format of Cobbe et al.,
  `Training Verifiers <https://arxiv.org/abs/2110.14168>`_, 2021.  The answer is
  a number, or a solution text whose number is marked in the same way.  Without
  a marked number the score is 0.  A response that the length limit cut off is
  scored by its text like any other: `finished` is ignored.
  """
  return _equal_numbers(completions, answer, answers.marked_number)


def gsm8k_answer_or_last_number(
  completions: Sequence[str], answer: Sequence[Any], **kwargs
) -> list[float]:
  """Reward: `gsm8k_answer`, or the last number where none is marked.

  More lenient: a response that never commits to an answer can score.
  """
  return _equal_numbers(completions, answer, _marked_or_last_number)


def math_answer(
  completions: Sequence[str], answer: Sequence[Any], **kwargs
) -> list[float]:
  r"""Reward: 1 where the marked answer is right, in the format of MATH.

  The completion's answer is the content of its last `\boxed{…}`, else the text
  after its last `####`, else after its last "answer is".  Canonical forms are
  compared: exact numbers, expressions up to the order of terms and factors and
  the writing of roots and fractions, lists, tuples, intervals, sets, matrices,
  words; see `jaxrl_llm.rewards.mathematics`.  Nothing is evaluated: it is as
  safe as comparing texts.  The answer is in LaTeX, or a solution text whose
  answer is marked in the same way.

  Of 142,405 right answers, made by rewriting all 12,470 of MATH, it missed
  none; of 69,754 wrong ones it accepted none (`pytest -m slow
  tests/rewards/mathematics_test.py`).  It misses equalities that need algebra,
  such as `x^2-1` and `(x-1)(x+1)`, or a line's `2x-y+3=0` and `y=2x+3`.

  References:
    Hendrycks et al., `Measuring Mathematical Problem Solving With the MATH
    Dataset <https://arxiv.org/abs/2103.03874>`_, 2021
  """
  return _right_answers(completions, answer, _same_form)


def math_verify_answer(
  completions: Sequence[str], answer: Sequence[Any], **kwargs
) -> list[float]:
  r"""Reward: `math_answer`, or 1 where SymPy finds the answers equal.

  For answers equal only after algebra, such as `x^2-1` and `(x-1)(x+1)`; an
  answer that copies the question's expression then scores like its factors.  It
  needs the package math-verify (`pip install 'jaxrl_llm[math]'`).  It may hang
  or take gigabytes on a hostile answer such as `9^{9^{9^{9}}}`, so a
  configuration must set `workers`, whose time-out kills it.  It uses no
  signals.
  References:
    https://github.com/huggingface/Math-Verify
  """
  return _right_answers(
    completions,
    answer,
    lambda text, gold: _same_form(text, gold) or symbolic.equal(text, gold),
  )


def format_match(pattern: str) -> Callable[..., list[float]]:
  r"""Factory: 1 where the whole stripped completion matches `pattern`.

  Args:
    pattern: a regular expression of Python's `re`; `.` matches line ends too.
      `.*#### -?[\d.,]+` asks for GSM8K's last line,
      `<think>.+</think>\s*<answer>.+</answer>` for reasoning in tags.
  """
  try:
    compiled = re.compile(pattern, re.DOTALL)
  except re.error as error:
    raise UserError(
      f'format_match: {pattern!r} is not a regular expression: {error}.'
    ) from error

  def matches_format(completions, **kwargs):
    return [
      float(compiled.fullmatch(text.strip()) is not None)
      for text in completions
    ]

  return matches_format


def length_in_tokens(
  completion_ids: Sequence[Sequence[int]], **kwargs
) -> list[float]:
  """Reward: number of tokens of the completion, the end token included."""
  return [float(len(ids)) for ids in completion_ids]


def length_penalty(limit: int, buffer: int) -> Callable[..., list[float]]:
  """Factory: 0 up to limit − buffer tokens, then linearly down to −1 at limit.

    r = −min(1, max(0, n − (limit − buffer)) / buffer)

  n counts tokens, the end token included.

  Args:
    limit: number of tokens at which the penalty reaches −1.
    buffer: tokens over which it grows, between 1 and limit.

  References:
    Yu et al., `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025, equation 13
  """
  if not 1 <= buffer <= limit:
    raise UserError(
      f'length_penalty: buffer={buffer} must be between 1 and limit={limit}.'
    )

  def penalizes_length(completion_ids, **kwargs):
    excess = [max(0, len(ids) - (limit - buffer)) for ids in completion_ids]
    return [-min(1.0, e / buffer) for e in excess]

  return penalizes_length


def repetition_penalty(n: int = 4) -> Callable[..., list[float]]:
  """Factory: minus the share of token n-grams that repeat earlier ones.

    r = −(1 − |distinct n-grams| / |n-grams|)

  Between −1 and 0; 0 for a response of fewer than n tokens.  It counts tokens,
  the end token included, so it means the same in every language.

  Args:
    n: tokens per n-gram.

  References:
    Welleck et al., `Neural Text Generation with Unlikelihood Training
    <https://arxiv.org/abs/1908.04319>`_, 2020, "seq-rep-n"; as a reward in Yeo
    et al., `Demystifying Long Chain-of-Thought Reasoning in LLMs
    <https://arxiv.org/abs/2502.03373>`_, 2025
  """
  if n < 1:
    raise UserError(f'repetition_penalty: n={n} must be at least 1.')

  def penalizes_repetition(completion_ids, **kwargs):
    scores = []
    for ids in completion_ids:
      ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
      repeated = len(ngrams) - len(set(ngrams))
      scores.append(-repeated / len(ngrams) if repeated else 0.0)
    return scores

  return penalizes_repetition


def script_share(scripts: Sequence[str]) -> Callable[..., list[float]]:
  """Factory: the share of the completion's letters in the given scripts.

    r = |letters of `scripts`| / |letters|,   1 where there are no letters

  It discourages drifting into another language, as far as scripts differ:
  French is as good as English.  A letter's script is the first word of its
  Unicode name after NFKC normalisation (a full-width or mathematical A is
  LATIN).  Digits, signs and marks do not count, but π is GREEK.

  Args:
    scripts: such as LATIN, GREEK, CYRILLIC, ARABIC, DEVANAGARI, CJK, HIRAGANA,
      KATAKANA, HANGUL.

  References:
    DeepSeek-AI, `DeepSeek-R1 <https://arxiv.org/abs/2501.12948>`_, 2025, whose
    language consistency reward is the share of words of the right language
  """
  if isinstance(scripts, str) or not scripts:
    raise UserError(
      f'script_share: scripts={scripts!r} must be a list of names.'
    )
  for name in scripts:
    if not isinstance(name, str) or name not in _known_scripts():
      raise UserError(
        f'script_share: {name!r} is not the script of any letter.\n'
        'Names are those of Unicode in capitals, such as LATIN, CYRILLIC, CJK.'
      )

  def shares_script(completions, **kwargs):
    scores = []
    for text in completions:
      compatible = unicodedata.normalize('NFKC', _stream_safe(text))
      kinds = [_script(c) for c in compatible]
      letters = [script for script in kinds if script is not None]
      right = sum(script in scripts for script in letters)
      scores.append(right / len(letters) if letters else 1.0)
    return scores

  return shares_script


def _stream_safe(text: str) -> str:
  """Inserts a joiner after every 30 marks on a letter.

  Normalisation sorts marks in quadratic time.  No language uses that many
  (Unicode Standard Annex 15, "Stream-Safe Text Format").
  """
  pieces, marks = [], 0
  for character in text:
    marks = marks + 1 if _is_mark(character) else 0
    if marks > 30:
      pieces.append('\N{COMBINING GRAPHEME JOINER}')
      marks = 1
    pieces.append(character)
  return ''.join(pieces)


@functools.lru_cache(1 << 12)
def _is_mark(character: str) -> bool:
  """Returns True for a character that normalisation may reorder."""
  return unicodedata.combining(unicodedata.normalize('NFKD', character)[0]) > 0


@functools.cache
def _known_scripts() -> set[str | None]:
  # Beyond this there are only more letters of CJK.
  return {_script(chr(i)) for i in range(0x20000)} - {None}


def _script(character: str) -> str | None:
  """Returns the first word of a letter's name; None if it is not a letter."""
  if unicodedata.category(character) not in ('Lu', 'Ll', 'Lt', 'Lo'):
    return None
  return unicodedata.name(character, '').partition(' ')[0]


def sentiment(completions: Sequence[str], **kwargs) -> list[float]:
  """Reward: VADER's compound score of the completion, from −1 to 1.

  References:
    Hutto and Gilbert, `VADER
    <https://ojs.aaai.org/index.php/ICWSM/article/view/14550>`_, 2014
  """
  analyzer = _vader()
  return [analyzer.polarity_scores(text)['compound'] for text in completions]


@functools.cache
def _vader():
  try:
    from vaderSentiment import vaderSentiment
  except ImportError as error:
    raise UserError(
      'the reward sentiment needs the package vaderSentiment.\n'
      "Install it with: pip install 'jaxrl_llm[sentiment]'"
    ) from error
  whole = vaderSentiment.SentimentIntensityAnalyzer

  # VADER lower-cases all words of the text for each that has a sentiment.  The
  # checks look only at the three words before it and the two after it.
  class Analyzer(whole):
    @staticmethod
    def _special_idioms_check(valence, words, i):
      first = max(0, i - 3)
      near = words[first : i + 3]
      return whole._special_idioms_check(valence, near, i - first)

    @staticmethod
    def _negation_check(valence, words, start_i, i):
      first = max(0, i - 3)
      near = words[first : i + 1]
      return whole._negation_check(valence, near, start_i, i - first)

  return Analyzer()


def _result(text: str) -> str:
  return text.rpartition('=')[2].strip()


def _marked_or_last_number(text: str) -> Fraction | None:
  marked = answers.marked_number(text)
  return answers.last_number(text) if marked is None else marked


# Readers of the answer in a completion, by reward, for majority votes.  They
# return None where there is no answer.
READERS = {
  'exact_match': str.strip,
  'arithmetic_answer': _result,
  'gsm8k_answer': answers.marked_number,
  'gsm8k_answer_or_last_number': _marked_or_last_number,
  'math_answer': mathematics.marked_answer,
  'math_verify_answer': mathematics.marked_answer,
}


def _texts(answer: Sequence[Any]) -> list[str]:
  """Returns answers as text; a number in the data file counts as its digits."""
  for i, gold in enumerate(answer):
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
      raise UserError(
        f'the answer of sample {i} is {gold!r}, neither text nor a number.\n'
        'Correct the column answer of the data set.'
      )
  return [str(gold) for gold in answer]


def _equal_numbers(completions, answer, number) -> list[float]:
  """Returns 1 where number(completion) is the answer's number, else 0."""
  scores = []
  for i, (text, gold) in enumerate(
    zip(completions, _texts(answer), strict=True)
  ):
    truth = answers.marked_number(gold)
    if truth is None:
      truth = answers.parse_number(gold)
    if truth is None:
      raise UserError(
        f'the answer of sample {i} holds no number: {gold[-60:]!r}.\n'
        'It must be a number, or a solution that ends in "#### number".'
      )
    scores.append(float(number(text) == truth))
  return scores


def _right_answers(completions, answer, same) -> list[float]:
  """Returns 1 where same(completion's marked answer, gold answer), else 0."""
  scores = []
  for i, (text, gold) in enumerate(
    zip(completions, _texts(answer), strict=True)
  ):
    marked = any(mark in gold for mark in ('\\boxed', '\\fbox', '####'))
    truth = mathematics.marked_text(gold) if marked else gold
    if truth is None or mathematics.read_answer(truth) is None:
      raise UserError(
        f'the answer of sample {i} cannot be read: {gold[-60:]!r}.\n'
        'It must be an answer in LaTeX, or a solution with one in \\boxed{…}.'
      )
    attempt = mathematics.marked_text(text)
    scores.append(float(attempt is not None and same(attempt, truth)))
  return scores


def _same_form(text: str, gold: str) -> bool:
  return mathematics.read_answer(text) == mathematics.read_answer(gold)
