"""Reads rows from JSON files and from the Hugging Face hub.

A row of a file, whose other columns are kept:

  {"prompt": "17+26-8=", "answer": "35"}
"""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import answers

# Names under which published data sets keep their prompts, best first.
PROMPT_COLUMNS = ('prompt', 'question', 'problem')

# For MATH: the file, and the hub's data set with its split.
_MATH = {
  'train': ('train.json', 'DigitalLearningGmbH/MATH-lighteval', 'train'),
  'test': ('test.jsonl', 'DigitalLearningGmbH/MATH-lighteval', 'test'),
  'math500': ('math500.jsonl', 'HuggingFaceH4/MATH-500', 'test'),
}


def read_rows(
  path: str | pathlib.Path, prompt_column: str | None = None
) -> list[dict]:
  """Reads a file of rows and calls the prompt 'prompt'.

  Args:
    path: `.jsonl`, `.jsonl.gz` (one object per line; blank lines are allowed)
      or `.json` (one list of objects).
    prompt_column: its name in the file; None for the first of prompt, question
      and problem that a row has.

  Returns:
    One dictionary per row, in file order, with the prompt column renamed.

  Raises:
    UserError: the file, or a line of it, is not as above; names file and line.
  """
  path = pathlib.Path(path)
  if path.name.endswith(('.jsonl', '.jsonl.gz')):
    rows = list(json_lines(path))
  elif path.suffix == '.json':
    rows = _json_list(path)
  else:
    raise UserError(f'{path}: rows are read from .jsonl, .jsonl.gz and .json.')
  if not rows:
    raise UserError(f'{path}: the file holds no rows.')
  return [_with_prompt(where, row, prompt_column) for where, row in rows]


def read_hub(
  name: str,
  split: str,
  *,
  config: str | None = None,
  prompt_column: str | None = None,
) -> list[dict]:
  """Reads a data set of the Hugging Face hub through `datasets`.

  Args:
    name: the data set's name, such as 'openai/gsm8k'.
    split: such as 'train'.
    config: the data set's configuration, where it has several.
    prompt_column: as in `read_rows`.

  Raises:
    UserError: `datasets` is missing, or the data set cannot be loaded.
  """
  try:
    import datasets
  except ImportError as error:
    raise UserError(
      f'reading {name} from the hub needs the package datasets.\n'
      "Install it with: pip install 'jaxrl_llm[data]', or give a local file."
    ) from error
  try:
    rows = list(datasets.load_dataset(name, config, split=split))
  except Exception as error:  # Whatever the network and the hub can raise.
    raise UserError(
      f'cannot load {name} ({split}) from the hub: {type(error).__name__}: '
      f'{" ".join(str(error).split())[:200]}\n'
      'Check name, split and network, or give a local file.'
    ) from error
  if not rows:
    raise UserError(f'{name} ({split}) holds no rows.')
  return [
    _with_prompt(f'{name} ({split}), row {i}', row, prompt_column)
    for i, row in enumerate(rows)
  ]


def read(
  path: str | pathlib.Path | None, hub: str, split: str, **settings
) -> list[tuple[str, dict]]:
  """Reads a file, or a data set of the hub where there is no path.

  Args:
    path: as in `read_rows`; None for the hub.
    hub, split: the data set on the hub and its split.
    **settings: as in `read_hub`; a file has no `config`.

  Returns:
    The rows, each with its name for messages.
  """
  if path is None:
    rows = read_hub(hub, split, **settings)
  else:
    rows = read_rows(path, settings.get('prompt_column'))
  return [(f'{path or hub}: row {i}', row) for i, row in enumerate(rows)]


def find_file(path: str | pathlib.Path, *names: str) -> pathlib.Path:
  """Returns a file, given its path or that of a folder that holds one of names.

  Raises:
    UserError: the folder holds none of them.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    return path
  for name in names:
    if (path / name).exists():
      return path / name
  raise UserError(
    f'{path.absolute()}: the folder holds no {" or ".join(names)}; name a file.'
  )


def gsm8k(path: str | pathlib.Path | None, split: str) -> list[dict]:
  """Reads grade-school mathematics (Cobbe et al., 2021) with final numbers.

  Args:
    path: folder with train.jsonl and test.jsonl; None for the hub.
    split: 'train' or 'test'.

  Returns:
    Rows of prompt (the question), answer (the final number's text, without
    commas) and solution (the whole text, which ends in '#### number').
  """
  if split not in ('train', 'test'):
    raise UserError(f"GSM8K has the splits 'train' and 'test', not {split!r}.")
  file = path and pathlib.Path(path) / f'{split}.jsonl'
  result = []
  for where, row in read(file, 'openai/gsm8k', split, config='main'):
    solution = str(row.get('answer', ''))
    _, marker, number = solution.rpartition('####')
    if not marker or not number.strip():
      raise UserError(f'{where} has no answer that ends in "#### number".')
    answer = number.strip().replace(',', '')
    result.append(
      {'prompt': row['prompt'], 'answer': answer, 'solution': solution}
    )
  return result


def math(path: str | pathlib.Path | None, split: str) -> list[dict]:
  r"""Reads competition mathematics (Hendrycks et al., 2021) with final answers.

  Args:
    path: folder with train.json, test.jsonl and math500.jsonl; None for the
      hub.
    split: 'train', 'test', or 'math500', the 500 problems of 'test' that
      Lightman et al., 2023, held out.

  Returns:
    Rows of prompt (the problem), answer (its LaTeX; None if there is none, as
    in four rows of one published train.json) and, if the source has them,
    solution (the whole text, with the answer in `\boxed{…}`) and difficulty (1,
    easy, to 5; 0 for a few training problems).
  """
  if split not in _MATH:
    raise UserError(f'MATH has the splits {", ".join(_MATH)}, not {split!r}.')
  name, hub, hub_split = _MATH[split]
  result = []
  for where, row in read(path and pathlib.Path(path) / name, hub, hub_split):
    if 'answer' not in row and 'solution' not in row:
      raise UserError(f'{where} has neither answer nor solution.')
    kept = {'solution': row['solution']} if 'solution' in row else {}
    # One published file has numbers, the others 'Level 5' or 5.
    level = str(row.get('difficulty', row.get('level'))).removeprefix('Level ')
    if level.removesuffix('.0').isdecimal():
      kept['difficulty'] = int(level.removesuffix('.0'))
    answer = row.get('answer')
    if answer in (None, ''):
      answer = answers.last_boxed(str(kept.get('solution')))
    result.append({'prompt': row['prompt'], 'answer': answer, **kept})
  return result


def read_text(path: pathlib.Path) -> str:
  """Returns the text of a file, unpacked if its name ends in `.gz`.

  A byte-order mark, which some editors write, is left out.

  Raises:
    UserError: it is missing, damaged or not UTF-8.
  """
  try:
    data = path.read_bytes()
    if path.suffix == '.gz':
      data = gzip.decompress(data)
    return data.decode('utf-8-sig')
  except (OSError, EOFError, zlib.error) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path.absolute()}: cannot be read: {reason}.') from error
  except UnicodeDecodeError as error:
    line = error.object[: error.start].count(b'\n') + 1
    raise UserError(f'{path}, line {line}: the text is not UTF-8.') from error


def parse(where: str, text: str) -> Any:
  """Parses JSON; the UserError for other text begins with `where`."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where}: this is not JSON: {error}.') from error


def json_lines(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields (name for messages, value) for each line that is not blank.

  Raises:
    UserError: as `read_text`, or a line is not JSON; names it.
  """
  # Not splitlines: JSON strings may hold U+2028, which it treats as a line end.
  for number, line in enumerate(read_text(path).split('\n'), 1):
    if line.strip():
      where = f'{path}, line {number}'
      yield where, parse(where, line)


def _json_list(path: pathlib.Path) -> list[tuple[str, Any]]:
  rows = parse(str(path), read_text(path))
  if not isinstance(rows, list):
    raise UserError(
      f'{path}: a .json file must hold one list of rows, not a '
      f'{type(rows).__name__}.'
    )
  return [(f'{path}, row {i}', row) for i, row in enumerate(rows)]


def _with_prompt(where: str, row: dict, column: str | None) -> dict:
  """Returns the row with its prompt under 'prompt'."""
  if not isinstance(row, dict):
    raise UserError(f'{where}: a row must be an object, not {row!r:.60}.')
  if column is None:
    column = next((name for name in PROMPT_COLUMNS if name in row), None)
  if column is None or column not in row:
    wanted = column or ', '.join(PROMPT_COLUMNS)
    raise UserError(
      f'{where}: there is no prompt: no column {wanted} among {sorted(row)}.\n'
      'Name the column that holds it with prompt_column.'
    )
  if column != 'prompt' and 'prompt' in row:
    raise UserError(
      f'{where}: {column!r} cannot become the prompt beside a column prompt.\n'
      'Remove or rename one of the two.'
    )
  if not isinstance(row[column], str):
    raise UserError(
      f'{where}: the prompt must be text, not {row[column]!r:.60}.'
    )
  rest = {name: value for name, value in row.items() if name != column}
  return {'prompt': row[column], **rest}
