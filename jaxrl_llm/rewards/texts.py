"""Texts of responses and answers: compared, normalised, analysed."""

import collections
import functools
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.errors import UserError


def as_texts(answer: Sequence[Any]) -> list[str]:
  """Returns answers as text; a number in the data file counts as its digits."""
  for i, gold in enumerate(answer):
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
      raise UserError(
        f'the answer of sample {i} is {gold!r}, neither text nor a number.\n'
        'Correct the column answer of the data set.'
      )
  return [str(gold) for gold in answer]


def judged(completions, answer, truth, score, advice=()) -> list[float]:
  """Returns score(completion, truth(answer)) for each sample.

  `advice`: what it means that `truth` returns None, and what to do about it.
  """
  scores = []
  for i, (text, gold) in enumerate(
    zip(completions, as_texts(answer), strict=True)
  ):
    value = truth(gold)
    if value is None:
      problem, remedy = advice
      raise UserError(
        f'the answer of sample {i} {problem}: {gold[-60:]!r}.\n{remedy}'
      )
    scores.append(float(score(text, value)))
  return scores


def compared(completions, answer, read, truth, advice=()) -> list[float]:
  """Returns 1 where read(completion) is truth(answer), else 0."""
  score = lambda text, value: read(text) == value
  return judged(completions, answer, truth, score, advice)


def normalised(ignore_case: bool, collapse_spaces: bool, text: str) -> str:
  """Returns the stripped text without what does not count."""
  text = ' '.join(text.split()) if collapse_spaces else text.strip()
  return text.casefold() if ignore_case else text


def compiled(name: str, pattern: str) -> re.Pattern:
  """Compiles the pattern of the reward `name`; UserError if it is not one."""
  try:
    return re.compile(pattern, re.DOTALL)
  except (re.error, TypeError) as error:
    raise UserError(
      f'{name}: {pattern!r} is not a regular expression: {error}.'
    ) from error


_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def bag_of_words(text: str) -> collections.Counter:
  """Counts lower-case words without punctuation, and without articles."""
  words = text.lower().translate(_NO_PUNCTUATION).split()
  return collections.Counter(w for w in words if w not in ('a', 'an', 'the'))


@functools.lru_cache(1 << 12)
def is_mark(character: str) -> bool:
  """Returns True for a character that normalisation may reorder."""
  return unicodedata.combining(unicodedata.normalize('NFKD', character)[0]) > 0


@functools.cache
def known_scripts() -> set[str]:
  """Returns all scripts that `script` knows."""
  # Beyond this there are only more letters of CJK.
  return {script(chr(i)) for i in range(0x20000)} - {None}


def script(character: str) -> str | None:
  """Returns the first word of a letter's name; None if it is not a letter."""
  if unicodedata.category(character) not in ('Lu', 'Ll', 'Lt', 'Lo'):
    return None
  return unicodedata.name(character, '').partition(' ')[0]


@functools.cache
def vader():
  """Returns VADER's analyser; UserError without its package."""
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
