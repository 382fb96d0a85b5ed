"""Handles flags, and mistakes in them, for every script."""

import difflib
import gc
import glob
import importlib.metadata
import os
import pathlib
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import usage
from experiments.configs import base
from jaxrl_llm import compilation, processes
from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.progress import say

_CONFIGS = pathlib.Path('experiments') / 'configs'

# Sections with a function's arguments: ml_collections cannot set a field there
# that the file does not have.
_OPEN = frozenset({'algorithm', 'task', 'rewards', 'architecture'})

# Flags that name a file or a folder: '' comes from an unset shell variable.
_PATHS = ('workdir', 'output', 'run', 'model', 'estimators')

_HELP = frozenset({'--help', '-help'})

# Files of the devices that the extras of setup.cfg have plug-ins for.
_ACCELERATORS = ('/dev/nvidia*', '/dev/dxg', '/dev/accel*', '/dev/vfio/[0-9]*')


def define_config_flag() -> None:
  """Defines `--config=FILE.py[:ARGUMENT]` and `--config.some.key=value`."""
  config_flags.DEFINE_config_file(
    'config', None, 'Configuration file with get_config().', lock_config=True
  )


def define_trust_flag() -> None:
  """Defines `--trust_code`, for a script that reads the folder of a run."""
  flags.DEFINE_bool(
    'trust_code', False, "Execute user functions that the run's config names."
  )


def define_process_flags() -> None:
  """Defines `--coordinator`, `--num_processes` and `--process_id`."""
  flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT of process 0, for several processes without a launcher that '
    'reports it: TPU pods, srun and mpirun do.',
  )
  flags.DEFINE_integer(
    'num_processes', None, 'Number of processes; 1 asks no launcher.'
  )
  flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')


def join_processes() -> None:
  """Joins the processes that the flags or a launcher report.

  Several processes use a compilation cache only where the user named one.

  Raises:
    UserError: as `processes.initialize`.
  """
  values = flags.FLAGS
  processes.initialize(
    values.coordinator, values.num_processes, values.process_id
  )
  if processes.count() > 1:
    compilation.leave()


def config() -> ConfigDict:
  """Returns the configuration with the flags applied.

  Raises:
    UserError: no file, or one that is not a configuration.
  """
  flag = flags.FLAGS['config']
  if not flag.present:
    raise UserError(
      '--config is missing\nfor example --config=experiments/configs/'
      'quickstart.py'
    )
  # FILE.py:ARGUMENT calls get_config(ARGUMENT).
  path = pathlib.Path(re.sub(r'(?<=\.py):.*', '', flag.config_filename))
  if not path.is_file():
    known = sorted(path.stem for path in _CONFIGS.glob('*.py'))
    near = difflib.get_close_matches(path.stem, known, 1)
    hint = f'\ndid you mean {_CONFIGS / near[0]}.py?' if near else ''
    raise UserError(f'--config: no such file: {path.absolute()}{hint}')
  if not isinstance(flag.value, ConfigDict):
    raise UserError(
      f'--config: get_config() of {flag.config_filename} returns '
      f'{type(flag.value).__name__}\nreturn a ConfigDict: begin with '
      'experiments.configs.base.get_config()'
    )
  return flag.value


def config_name() -> str:
  """Returns the name of the configuration's file, with its argument."""
  name = pathlib.Path(flags.FLAGS['config'].config_filename).name
  return name.replace('.py:', '_').removesuffix('.py')


def given(*names: str) -> dict[str, Any]:
  """Returns the values of flags by name, without those that are None."""
  values = {name: flags.FLAGS[name].value for name in names}
  return {k: value for k, value in values.items() if value is not None}


def require(**examples: str) -> None:
  """Raises UserError if a flag has no value; the message shows examples."""
  for name in examples:
    if flags.FLAGS[name].value is None:
      shown = ' '.join(f'--{key}={value}' for key, value in examples.items())
      raise UserError(f'--{name} is missing\nfor example {shown}')


def write_output(path, content: str | bytes) -> None:
  """Writes a file that a flag names, in a folder made for it.

  Raises:
    UserError: it cannot be written.
  """
  try:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
  except OSError as error:
    raise cannot_write(path, error) from error


def write_files(folder: pathlib.Path, files: dict[str, str | bytes]) -> None:
  """Writes files by name as `write_output` does."""
  for name, content in files.items():
    write_output(folder / name, content)


def cannot_write(path, error: OSError) -> UserError:
  """Returns the error to raise where a file of a flag cannot be written."""
  return UserError(
    f'{path} cannot be written: {error.strerror}\nname another path, or make '
    'room'
  )


def run(main: Callable[[], int | None]) -> NoReturn:
  """Parses the flags and calls `main`, with the user's compilation cache.

  A `UserError` or a wrong flag ends with the message on standard error and
  status 2, an interrupt with a word and its own status; any other error keeps
  its traceback, for a bug report.  When one of several processes fails, it
  reports why, and all end with its status.
  """

  def guarded(arguments) -> int | None:
    logging.set_verbosity(logging.WARNING)
    if len(arguments) > 1:
      _fail(f'unexpected argument {arguments[1]!r}\nflags begin with --')
    missing = compilation.use()
    if missing:
      say(missing)
    try:
      status = main()
      processes.finish()
      return status
    except UserError as error:
      _fail(str(error))
    except KeyboardInterrupt:
      say('interrupted')
      processes.fail(128 + signal.SIGINT)
      return 128 + signal.SIGINT
    except BrokenPipeError:
      if not _output_is_closed():  # The error is another pipe's.
        raise
      return _leave_output()
    except Exception as error:
      if starting_backend(error):
        _fail(no_backend(error))
      if processes.count() == 1:
        raise
      if _is_of_runtime(error):
        processes.wait_for_loss()
      processes.fail(1, traceback.print_exc)

  # Data and traced programs are hundreds of thousands of lasting objects: with
  # Python's threshold of 700 their collection takes a tenth of the start.
  gc.set_threshold(50_000, 10, 10)
  _leave_out_plugins()
  # Errors of a configuration are reported once, by `_parse`.
  logging.set_verbosity(logging.ERROR)
  try:
    app.run(guarded, flags_parser=_parse)
  except BrokenPipeError:  # of --help
    sys.exit(_leave_output())


def _leave_out_plugins() -> None:
  """Selects CPUs where JAX's CUDA plug-ins would find no device.

  They are installed for `experiments.planning.plan`, and each would report at
  length what it lacks.  Other plug-ins, and the platform that the user (or JAX
  on a TPU machine) chose, are left alone.
  """
  if jax.config.jax_platforms or any(map(glob.glob, _ACCELERATORS)):
    return
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  if all('cuda' in plugin.name for plugin in plugins):
    jax.config.update('jax_platforms', 'cpu')


def _is_of_runtime(error: Exception) -> bool:
  """Returns True if XLA failed, as a collective does when a process is lost.

  Called from C++, an error of an unknown kind is a ValueError.
  """
  unknown = isinstance(error, ValueError) and str(error).startswith('UNKNOWN: ')
  return unknown or isinstance(error, jax.errors.JaxRuntimeError)


def starting_backend(error: Exception) -> bool:
  """Returns True if JAX raised an error while it looked for devices."""
  return any(
    frame.name == 'backends' and frame.filename.endswith('xla_bridge.py')
    for frame in traceback.extract_tb(error.__traceback__)
  )


def no_backend(error: Exception) -> str:
  """Returns the message for an error of `starting_backend`."""
  platforms = os.environ.get('JAX_PLATFORMS')
  setting = f' for JAX_PLATFORMS={platforms}' if platforms else ''
  reason = _text(error) or 'no plug-in for it is installed'
  return (
    f'JAX starts no device{setting}: {reason[:300]}\n'
    "pip install -e '.[cuda13]', '.[cuda12]' or '.[tpu]', or unset "
    'JAX_PLATFORMS'
  )


def _output_is_closed() -> bool:
  """Returns True if the rest of the output has no reader."""
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    return True
  return False


def _leave_output() -> int:
  """Abandons a standard output without a reader, as before `| head`.

  Returns:
    The exit status, as of a program that SIGPIPE ends.
  """
  # Python writes the rest once more as it ends.
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 128 + signal.SIGPIPE


def _parse(arguments: list[str]) -> list[str]:
  try:
    rest = flags.FLAGS([each for each in arguments if each not in _HELP])
  except (Exception, SystemExit) as error:
    message = _explained(error, arguments)
    if message is None:
      raise
    _fail(message)
  for name in flags.FLAGS:
    flag = flags.FLAGS[name]
    if name in _PATHS and flag.present and flag.value == '':
      _fail(f'--{name} is empty\nis a shell variable in it not set?')
  if _HELP.intersection(arguments):
    _help()
  return rest


def _explained(error: BaseException, arguments: list[str]) -> str | None:
  """Returns the message for an error in parsing flags; None for others."""
  path, cause = _config_path(arguments), error
  while cause is not None:
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
      if frame.filename == str(path):
        return f'{path}, line {frame.lineno}: {_described(cause)}'
    cause = cause.__context__
  if isinstance(error, flags.UnrecognizedFlagError):
    near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
    hint = f'did you mean --{near[0]}?' if near else '--help lists the flags'
    if error.flagname.startswith('config.'):
      hint = 'it changes a field of the file that --config=FILE.py names'
    return f'unknown flag --{error.flagname}\n{hint}'
  if isinstance(error, flags.Error):
    text = str(error)
    # ml_collections puts a traceback in some messages.
    last = text.strip().split('\n')[-1]
    return f'{path}: {last}' if 'Traceback' in text else text
  if isinstance(error, SyntaxError):
    return f'{path}, line {error.lineno}: {_described(error)}'
  if isinstance(error, AttributeError) and 'get_config' in str(error):
    return f'--config: {path} has no function get_config()'
  if isinstance(error, KeyError | AttributeError):
    return _unknown_field(error, arguments)
  if isinstance(error, IndexError):
    indexed = [a.partition('=')[0] for a in arguments if '[' in a]
    return (
      f'{", ".join(indexed) or "--config"}: {_text(error)}\n'
      'set the whole tuple, as in --config.task.operations=(1,2)'
    )
  if isinstance(error, TypeError | ValueError):
    return f'--config: {_described(error)}'
  return None


def _help() -> NoReturn:
  """Prints the flags and the fields of the configuration."""
  shown, title = None, 'fields of a configuration, with their defaults'
  if 'config' in flags.FLAGS:
    shown = base.get_config()
    if flags.FLAGS['config'].present:
      title = f'fields of {flags.FLAGS["config"].config_filename}'
      try:
        shown = config()
      except UserError as error:
        _fail(str(error))
  print(usage.text(shown, title), flush=True)
  sys.exit(0)


def _config_path(arguments: list[str]) -> pathlib.Path | None:
  """Returns the configuration file in the command line."""
  for i, argument in enumerate(arguments):
    match = re.fullmatch(r'--?config(?:=(.*))?', argument)
    if match:
      return pathlib.Path(match[1] or ''.join(arguments[i + 1 : i + 2]))
  return None


def _unknown_field(error: Exception, arguments: list[str]) -> str:
  """Names the flag whose field the configuration lacks."""
  # ml_collections reports the last part only, and quotes it more than once.
  match = re.match(
    r"""\W*([\w.]+)(?:.*Did you mean \W*([\w.]+))?""", _text(error)
  )
  key, near = match.groups() if match else ('', None)
  pattern = rf'--?(config\.(?:[\w.]+\.)?{re.escape(key)})(?:[.=].*)?'
  given = [match for a in arguments if (match := re.fullmatch(pattern, a))]
  flag = f'--{given[0][1]}' if given else f'--config: {key!r}'
  if near:
    hint = f'did you mean {near!r}?'
  elif set(flag.split('.')) & _OPEN:
    hint = 'such a field has to be in the file before a flag can set it'
  else:
    hint = '--help lists the fields'
  return f'{flag}: the configuration has no such field\n{hint}'


def _text(error: Exception) -> str:
  """Returns an error's message in one line, without a KeyError's quotes."""
  text = error.args[0] if error.args else ''
  return ' '.join(str(text).replace('\\n', ' ').split())


def _described(error: Exception) -> str:
  return f'{type(error).__name__}: {_text(error)}'


def _fail(message: str) -> NoReturn:
  first, *rest = message.strip().split('\n')
  text = '\n'.join([f'error: {first}', *rest[:2]])
  processes.fail(2, lambda: say(text))
  sys.exit(2)
