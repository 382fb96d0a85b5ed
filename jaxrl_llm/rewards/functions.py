r"""Reward functions, and factories that return one.

Every name in `__all__` is one or the other, and its docstring begins with
"Reward" or "Factory".  A reward function is called as

  fn(prompts=, completions=, <columns it names>) -> list[float | None]

with N strings each; completions do not contain the end token.  Keyword-only
parameters are settings: `dict(name='exact_match', ignore_case=True)`.
"""

import collections
import functools
import os.path
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import mathematics, symbolic, texts
from jaxrl_llm.tasks import answers

__all__ = [
  'arithmetic_answer',
  'choice',
  'exact_match',
  'format_match',
  'gsm8k_answer',
  'gsm8k_answer_or_last_number',
  'length_in_tokens',
  'length_penalty',
  'math_answer',
  'math_verify_answer',
  'prefix_match',
  'regex_match',
  'repetition_penalty',
  'script_share',
  'sentiment',
  'token_f1',
]

Texts = Sequence[str]
Answers = Sequence[Any]
Scores = list[float]


def exact_match(
  completions: Texts,
  answer: Answers,
  *,
  ignore_case: bool = False,
  collapse_spaces: bool = False,
  **kwargs,
) -> Scores:
  """Reward: 1 where the completion, stripped, equals the stripped answer.

  Args:
    completions, answer: N texts, or numbers as answers.
    ignore_case: compares without regard to case.
    collapse_spaces: any white space within a text counts as one space.
  """
  norm = functools.partial(texts.normalised, ignore_case, collapse_spaces)
  return texts.compared(completions, answer, norm, norm)


def regex_match(
  pattern: str, ignore_case: bool = False, collapse_spaces: bool = False
) -> Callable[..., Scores]:
  r"""Factory: 1 where what `pattern` finds in the completion is the answer.

  The last match counts: its group, if the pattern has one, else all of it.  It
  is compared as `exact_match` compares the completion; 0 without a match.

  Args:
    pattern: a regular expression of Python's `re`, with at most one group:
      `<answer>(.*?)</answer>`.  `.` matches line ends too.  One whose search
      takes exponential time, as `(a+)+b`, needs `workers`.
    ignore_case, collapse_spaces: as in `exact_match`.
  """
  compiled = texts.compiled('regex_match', pattern)
  if compiled.groups > 1:
    raise UserError(
      f'regex_match: {pattern!r} has {compiled.groups} groups, not one.\n'
      'Write (?:…) for those that do not hold the answer.'
    )
  norm = functools.partial(texts.normalised, ignore_case, collapse_spaces)

  def last_match(text):
    last = collections.deque(compiled.finditer(text), 1)
    return norm(last[0][compiled.groups] or '') if last else None

  def matches_answer(completions, answer, **kwargs):
    return texts.compared(completions, answer, last_match, norm)

  return matches_answer


def choice(
  completions: Texts, answer: Answers, *, letters: str = 'ABCDEFGHIJ', **kwargs
) -> Scores:
  r"""Reward: 1 where the completion chooses the answer's letter.

  The letter that begins the marked answer (see `math_answer`), as in
  `\boxed{(B) 5}`, `Answer: **b**` or "the correct option is B."; or that of a
  completion like `B`, `(B)` or `B) 5`.  0 for two letters, as in "A or B".

  Args:
    completions, answer: N texts; an answer is `B`, `(B)` or `B) 5`.
    letters: the choices' letters, in capitals.
  """

  def truth(gold):
    letter = answers.marked_letter(gold)
    return letter if letter and letter in letters else None

  advice = f'is not one of {letters}', 'Give its letter, or set letters.'
  return texts.compared(
    completions, answer, answers.marked_letter, truth, advice
  )


def token_f1(completions: Texts, answer: Answers, **kwargs) -> Scores:
  """Reward: F1 of the words that the completion shares with the answer.

    r = 2c / (n + m),   1 where n = m = 0

  for n and m words, of which c are common, counted as often as in both.  Lower
  case; without punctuation and the words a, an, the.

  References:
    Rajpurkar et al., `SQuAD <https://arxiv.org/abs/1606.05250>`_, 2016
  """

  def f1(text, bag):
    own = texts.bag_of_words(text)
    total = own.total() + bag.total()
    return 2 * (own & bag).total() / total if total else 1.0

  return texts.judged(completions, answer, texts.bag_of_words, f1)


def arithmetic_answer(completions: Texts, answer: Answers, **kwargs) -> Scores:
  """Reward: 1 where the text after the last '=' is exactly the answer.

  Without '=' the whole completion counts.  Neither the steps nor the response's
  end are checked.  Fits `tasks.arithmetic`.
  """
  return exact_match([_result(text) for text in completions], answer)


def prefix_match(
  completions: Texts, answer: Answers, finished: Sequence[bool], **kwargs
) -> Scores:
  """Reward: share of the answer that is right, counted from the left.

  An answer of n characters counts as n + 1 symbols; the last is the end.
  With k leading characters right,

    r = k / (n + 1),   and 1 where the completion is the answer and `finished`.

  The end counts only after a whole answer.  Partial scores let learning begin
  where a whole answer is never sampled.
  """
  scores = []
  golds = texts.as_texts(answer)
  for text, gold, ended in zip(completions, golds, finished, strict=True):
    right = len(os.path.commonprefix([text, gold]))
    complete = bool(ended) and text == gold
    scores.append((right + complete) / (len(gold) + 1))
  return scores


def gsm8k_answer(completions: Texts, answer: Answers, **kwargs) -> Scores:
  r"""Reward: 1 where the marked number equals the answer's, exactly.

  The completion's number is the one after its last `####`, else the one in its
  last `\boxed{…}`; without one the score is 0.  The answer is a number, or a
  solution text whose number is marked in the same way.

  References:
    Cobbe et al., `Training Verifiers <https://arxiv.org/abs/2110.14168>`_, 2021
  """
  return _equal_numbers(completions, answer, answers.marked_number)


def gsm8k_answer_or_last_number(
  completions: Texts, answer: Answers, **kwargs
) -> Scores:
  """Reward: `gsm8k_answer`, or the last number where none is marked.

  More lenient: a response that never commits to an answer can score.
  """
  return _equal_numbers(completions, answer, _marked_or_last_number)


def math_answer(completions: Texts, answer: Answers, **kwargs) -> Scores:
  r"""Reward: 1 where the marked answer is right, in the format of MATH.

  The completion's answer is the content of its last `\boxed{…}`, else the text
  after its last `####`, else after its last "answer is", "Answer:", "correct
  option is".  The answer is in LaTeX, or a solution text marked in this way.
  Exact forms of numbers, words, lists, tuples, intervals, sets and matrices
  decide (`jaxrl_llm.rewards.mathematics`).  SymPy compares expressions, such as
  `2\sqrt3`, if the reward has `workers`, whose time-out ends what takes for
  ever; they need `pip install 'jaxrl_llm[math]'`.  Without workers expressions
  are compared as text, and a warning says so once.

  References:
    Hendrycks et al., `Measuring Mathematical Problem Solving With the MATH
    Dataset <https://arxiv.org/abs/2103.03874>`_, 2021
  """
  return _right_answers(completions, answer, symbolic.equal_or_text)


math_answer.warm_up = symbolic.enter_worker


def math_verify_answer(completions: Texts, answer: Answers, **kwargs) -> Scores:
  """Reward: `math_answer` with SymPy, without which it is an error.

  A configuration must set `workers`: SymPy may hang or take gigabytes on an
  answer such as `9^{9^{9^{9}}}`.  It uses no signals.

  References:
    https://github.com/huggingface/Math-Verify
  """
  return _right_answers(completions, answer, symbolic.equal)


math_verify_answer.warm_up = symbolic.enter_worker


def format_match(pattern: str) -> Callable[..., Scores]:
  r"""Factory: 1 where the whole stripped completion matches `pattern`.

  Args:
    pattern: a regular expression of Python's `re`; `.` matches line ends too.
      `.*#### -?[\d.,]+` asks for GSM8K's last line,
      `<think>.+</think>\s*<answer>.+</answer>` for reasoning in tags.
  """
  compiled = texts.compiled('format_match', pattern)

  def matches_format(completions, **kwargs):
    return [
      float(compiled.fullmatch(text.strip()) is not None)
      for text in completions
    ]

  return matches_format


def length_in_tokens(
  completion_ids: Sequence[Sequence[int]], **kwargs
) -> Scores:
  """Reward: number of tokens of the completion, the end token included."""
  return [float(len(ids)) for ids in completion_ids]


def length_penalty(limit: int, buffer: int) -> Callable[..., Scores]:
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


def repetition_penalty(n: int = 4) -> Callable[..., Scores]:
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


def script_share(scripts: Sequence[str]) -> Callable[..., Scores]:
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
  known = texts.known_scripts()
  if isinstance(scripts, str) or not scripts or not known.issuperset(scripts):
    raise UserError(
      f'script_share: scripts={scripts!r} must be a list of scripts.\n'
      'Names are those of Unicode in capitals, such as LATIN, CYRILLIC, CJK.'
    )

  def shares_script(completions, **kwargs):
    scores = []
    for text in completions:
      # Normalisation sorts marks, which do not count, in quadratic time.
      plain = ''.join(c for c in text if not texts.is_mark(c))
      kinds = map(texts.script, unicodedata.normalize('NFKC', plain))
      letters = [script for script in kinds if script is not None]
      right = sum(script in scripts for script in letters)
      scores.append(right / len(letters) if letters else 1.0)
    return scores

  return shares_script


def sentiment(completions: Texts, **kwargs) -> Scores:
  """Reward: VADER's compound score of the completion, from −1 to 1.

  References:
    Hutto and Gilbert, `VADER
    <https://ojs.aaai.org/index.php/ICWSM/article/view/14550>`_, 2014
  """
  analyzer = texts.vader()
  return [analyzer.polarity_scores(text)['compound'] for text in completions]


def _result(text: str) -> str:
  return text.rpartition('=')[2].strip()


def _marked_or_last_number(text: str) -> Fraction | None:
  marked = answers.marked_number(text)
  return answers.last_number(text) if marked is None else marked


# Readers of the answer in a completion, by reward, for majority votes.  They
# return None where there is no answer.
READERS = {
  'choice': answers.marked_letter,
  'exact_match': str.strip,
  'arithmetic_answer': _result,
  'gsm8k_answer': answers.marked_number,
  'gsm8k_answer_or_last_number': _marked_or_last_number,
  'math_answer': mathematics.marked_answer,
  'math_verify_answer': mathematics.marked_answer,
}


def _equal_numbers(completions, answer, number) -> Scores:
  """Returns 1 where number(completion) is the answer's number, else 0."""

  def truth(gold):
    marked = answers.marked_number(gold)
    return answers.parse_number(gold) if marked is None else marked

  advice = (
    'holds no number',
    'It must be a number, or a solution that ends in "#### number".',
  )
  return texts.compared(completions, answer, number, truth, advice)


def _right_answers(completions, answer, same) -> Scores:
  """Returns 1 where the marked answer equals the gold one, else 0."""

  def truth(gold):
    marked = any(mark in gold for mark in ('\\boxed', '\\fbox', '####'))
    text = answers.marked_text(gold) if marked else gold
    return None if mathematics.read_answer(text or '') is None else text

  def right(text, gold):
    attempt = answers.marked_text(text)
    return attempt is not None and mathematics.equal(attempt, gold, same)

  advice = (
    'cannot be read',
    'It must be an answer in LaTeX, or a solution with one in \\boxed{…}.',
  )
  return texts.judged(completions, answer, truth, right, advice)
