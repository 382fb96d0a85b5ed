"""What every script does with flags and with a user's mistake."""

import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from jaxrl_llm.errors import UserError


def define_config_flag() -> None:
  """Defines `--config=FILE.py` and `--config.some.key=value`."""
  config_flags.DEFINE_config_file(
    'config', None, 'Configuration file with get_config().', lock_config=True
  )


def config():
  """The configuration, flags applied.

  Raises:
    UserError: no file, or one that is not a configuration.
  """
  if flags.FLAGS['config'].value is None:
    raise UserError(
      '--config is missing\nfor example --config=experiments/configs/'
      'quickstart.py'
    )
  value = flags.FLAGS.config
  # A file that cannot be read only fails when a field is read.
  try:
    value.to_dict()
  except FileNotFoundError as error:
    raise UserError(f'--config: no such file: {error.filename}') from error
  return value


def run(main: Callable[[], int | None]) -> NoReturn:
  """Parses the flags and calls `main`.

  A `UserError` and a wrong flag end with the message on standard error and
  status 2; anything else keeps its traceback, for a bug report.
  """

  def guarded(arguments) -> int | None:
    if len(arguments) > 1:
      _fail(f'unexpected argument {arguments[1]!r}\nflags begin with --')
    try:
      return main()
    except UserError as error:
      _fail(str(error))

  logging.set_verbosity(logging.WARNING)
  app.run(guarded, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
  try:
    return flags.FLAGS(arguments)
  except flags.UnrecognizedFlagError as error:
    guess = f'\ndid you mean --{error.suggestions[0]}?'
    _fail(
      f'unknown flag --{error.flagname}' + (guess if error.suggestions else '')
    )
  except flags.Error as error:
    _fail(str(error))
  except (KeyError, AttributeError) as error:
    # ml_collections quotes its message twice.
    text = str(error.args[0]).strip('\'"').replace('\\', '')
    unknown, *guess = text.replace("'nDid", '\nDid').split('\n')
    _fail(
      '\n'.join([f"--config has no field '{unknown.strip(chr(39))}'", *guess])
    )
  except (SyntaxError, ImportError, TypeError, ValueError) as error:
    _fail(f'--config: {type(error).__name__}: {error}')


def _fail(message: str) -> NoReturn:
  first, *rest = message.strip().split('\n')
  print('\n'.join([f'error: {first}', *rest[:2]]), file=sys.stderr, flush=True)
  sys.exit(2)
