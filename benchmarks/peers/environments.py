"""Virtual environments of the peers, made with pip, each with its own pins."""

import json
import pathlib
import subprocess
import sys
import venv

from jaxrl_llm.errors import UserError

# Packages that pip installs, call by call; of torch first the CPU build.
REQUIREMENTS = {
  'transformers': (('torch==2.13.0',), ('transformers==5.23.0',)),
  'trl': (('torch==2.13.0',), ('trl==1.16.0', 'transformers==5.23.0')),
  'tunix': (
    ('google-tunix==0.1.7', 'jax==0.10.2', 'flax==0.12.8', 'optax==0.2.8'),
  ),
}
_TORCH = 'https://download.pytorch.org/whl/cpu'
_MADE = 'made.json'


def python(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns the interpreter of a peer's environment, made if it is missing.

  Args:
    name: one of `REQUIREMENTS`.
    folder: holds the environments of all peers.

  Raises:
    UserError: pip fails.
  """
  path = folder / name
  interpreter, made = path / 'bin' / 'python', path / _MADE
  wanted = json.dumps(REQUIREMENTS[name])
  if made.is_file() and made.read_text(encoding='utf-8') == wanted:
    return interpreter
  print(f'making {path}', file=sys.stderr)
  venv.create(path, with_pip=True)
  for packages in REQUIREMENTS[name]:
    command = [interpreter, '-m', 'pip', 'install', '--quiet', *packages]
    if packages[0].startswith('torch=='):
      command += ['--extra-index-url', _TORCH]
    if subprocess.run(command).returncode:
      raise UserError(
        f'{path}: pip cannot install {" ".join(packages)}\n'
        'its messages are above'
      )
  made.write_text(wanted, encoding='utf-8')
  return interpreter
