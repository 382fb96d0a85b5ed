"""Data sets that `config.task` can name."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import arithmetic as arithmetic_lib
from jaxrl_llm.tasks import code, datasets, pairs, splits
from jaxrl_llm.tasks import paths as paths_lib
from jaxrl_llm.tasks import text as text_lib


class Data(NamedTuple):
  """Rows with a 'prompt' and the columns that rewards read.

  Attributes:
    train: prompts for reinforcement learning.
    held_out: prompts for evaluation only.
    demonstrations: rows with a 'solution', for the supervised warm start.
    notes: lines for the screen on the rows that were left out.
  """

  train: list[dict]
  held_out: list[dict]
  demonstrations: list[dict]
  notes: tuple[str, ...] = ()


def arithmetic(
  train: int = 20_000,
  held_out: int = 512,
  demonstrations: int = 1_000,
  seed: int = 0,
  operations: Sequence[int] = (2, 3),
  operands: Sequence[int] = (1, 9),
  operators: str = '+-*',
  modulus: int | None = None,
  largest: int | None = None,
  careless: float = 0.0,
  careless_per: str = 'solution',
) -> Data:
  """Generates expressions; only the first `demonstrations` show their steps.

  Args:
    train, held_out: numbers of problems, no prompt in both.
    demonstrations: number of training problems with worked steps.
    seed: of the problems.
    operations, operands, operators, modulus, largest: difficulty, and
    careless, careless_per: wrong steps: see
      `jaxrl_llm.tasks.arithmetic.generate`.
  """
  for name, pair in (('operations', operations), ('operands', operands)):
    if len(pair) != 2:
      raise UserError(
        f'config.task.{name} is {pair}\ngive the least and the greatest number'
      )
  rows = arithmetic_lib.generate(
    train + held_out,
    seed,
    operations=tuple(operations),
    operands=tuple(operands),
    operators=operators,
    modulus=modulus,
    largest=largest,
    careless=careless,
    careless_per=careless_per,
  )
  rest, held = splits.split(rows, held_out, seed)
  return Data(rest, held, rest[:demonstrations])


def paths(
  train: int = 20_000,
  held_out: int = 512,
  demonstrations: int = 20_000,
  seed: int = 0,
  distance: Sequence[int] = (2, 8),
  careless: float = 0.0,
) -> Data:
  """Generates graphs; paths to a goal are the solutions.

  The reward `jaxrl_llm.tasks.paths:reaches_goal` checks them.

  Args:
    train, held_out: numbers of problems.
    demonstrations: number of training problems with a walk.
    seed: of the problems.
    distance, careless: least and greatest steps to the goal, and the share of
      careless walks: see `jaxrl_llm.tasks.paths.generate`.
  """
  least, greatest = distance
  rows = paths_lib.generate(
    train + held_out, seed, distance=(least, greatest), careless=careless
  )
  rest, held = splits.split(rows, held_out, seed)
  return Data(rest, held, rest[:demonstrations])


def gsm8k(path: str = '', held_out: int = 0) -> Data:
  """Loads grade-school mathematics; its test split is held out.

  Args:
    path: folder with train.jsonl and test.jsonl; '' for the hub.
    held_out: the number of test problems, from the first; 0 for all.
  """
  train = datasets.gsm8k(path or None, 'train')
  test = datasets.gsm8k(path or None, 'test')
  return Data(train, test[: held_out or None], train)


def human_eval(path: str = '', held_out: int = 64, seed: int = 0) -> Data:
  """Loads HumanEval, divided at random: it has no training split.

  It no longer measures a model that was trained on some of its problems.

  Args:
    path: HumanEval.jsonl.gz or its folder; '' for the hub.
    held_out: problems kept for evaluation, fewer than all 164.
    seed: of their choice.
  """
  rest, held = splits.split(code.human_eval(path or None), held_out, seed)
  return Data(rest, held, rest)


def mbpp(path: str = '', held_out: int = 0, shown_tests: int = 3) -> Data:
  """Loads MBPP's basic Python problems; its test split is held out.

  Args:
    path: mbpp.jsonl or its folder; '' for the hub.
    held_out: the number of test problems, from the first; 0 for all.
    shown_tests: tests that each prompt shows, of usually three.
  """
  train, test = (
    code.mbpp(path or None, split, shown_tests) for split in ('train', 'test')
  )
  return Data(train, test[: held_out or None], train)


def math(path: str = '', split: str = 'math500', held_out: int = 0) -> Data:
  """Loads competition mathematics; one of its test splits is held out.

  Problems without an answer, and training problems that are held out too, are
  left out.

  Args:
    path: folder with train.json, test.jsonl and math500.jsonl; '' for the hub.
    split: 'math500' or 'test', to hold out.
    held_out: the number of its problems, from the first; 0 for all.
  """
  rows = datasets.math(path or None, 'train')
  tests = datasets.math(path or None, split)[: held_out or None]
  shown, held = (
    [row for row in part if row['answer'] is not None] for part in (rows, tests)
  )
  known = {''.join(row['prompt'].split()) for row in held}
  train = [r for r in shown if ''.join(r['prompt'].split()) not in known]
  unanswered = len(rows) + len(tests) - len(shown) - len(held)
  note = (
    f'MATH: left out {unanswered} problems without an answer, '
    f'{len(shown) - len(train)} training problems that are held out too'
  )
  return Data(train, held, [r for r in train if 'solution' in r], (note,))


def hh_rlhf(path: str = '', held_out: int = 256, seed: int = 0) -> Data:
  """Loads dialogues with a chosen and a rejected response, divided at random.

  Args:
    path: a file of HH-RLHF such as harmless-base/train.jsonl.gz, or its folder;
      '' for the hub's.
    held_out: prompts kept for evaluation, with their pairs.
    seed: of their choice.
  """
  read = pairs.hh_rlhf(path or None)
  rest, held = splits.split(read.rows, held_out, seed)
  note = (
    f'HH-RLHF: {len(read.rows)} pairs; left out {read.apart} that differ '
    f'before the last response, {read.equal} equal, {read.empty} with an '
    'empty response'
  )
  return Data(rest, held, [], (note,))


def jsonl(train: str, held_out: str, prompt_column: str | None = None) -> Data:
  """Reads two files of JSON lines with a prompt column and others.

  Args:
    train, held_out: paths.
    prompt_column: None takes `prompt`, `question` or `problem`.
  """
  rows = datasets.read_rows(train, prompt_column=prompt_column)
  held = datasets.read_rows(held_out, prompt_column=prompt_column)
  shown = [row for row in rows if 'solution' in row]
  common = {row['prompt'] for row in rows}
  kept = [row for row in held if row['prompt'] not in common]
  if not kept:
    raise UserError(f'every prompt of {held_out} occurs in {train} too')
  note = f'{len(held) - len(kept)} held-out prompts occur in {train}: left out'
  return Data(rows, kept, shown, (note,) if len(kept) < len(held) else ())


def text(
  path: str,
  tokenizer,
  prompt_tokens: int = 16,
  held_out: int = 128,
  seed: int = 0,
) -> Data:
  """Cuts prompts from the beginnings of a corpus' documents.

  Args:
    path: a JSON list of texts, or plain text with blank lines between.
    tokenizer: of the model.
    prompt_tokens: length of every prompt, BOS included.
    held_out: documents kept for evaluation.
    seed: of their choice.
  """
  cut = text_lib.cut_prompts(path, tokenizer, prompt_tokens)
  rest, held = splits.split(cut.rows, held_out, seed)
  note = (
    f'{path}: {len(cut.rows)} prompts of {prompt_tokens} tokens; left out '
    f'{cut.too_short} short, {cut.altered} that do not survive decoding, '
    f'{cut.repeated} repeated'
  )
  return Data(rest, held, [], (note,))
