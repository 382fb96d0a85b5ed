"""The environment variables that a worker process is given.

A list of what is kept, not of what is left out: that a variable holds a
credential need not show in its name.  Kept is what Python, JAX, their libraries
and the dynamic loader read to find files, a locale and devices.  Proxies, whose
addresses may hold passwords, are not.

What is left out is out of reach of what the function and its libraries send or
log by themselves.  It is no wall: the function has the user's files, and where
`containment` cannot hide other processes it may read theirs in /proc.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_llm import credentials
from jaxrl_llm.errors import UserError

_KEPT = frozenset(
  # The user, the system, the locale.
  ['HOME', 'LOGNAME', 'PATH', 'SHELL', 'TERM', 'USER']
  + ['LANG', 'LANGUAGE', 'TZ', 'TZDIR']
  + ['TEMP', 'TMP', 'TMPDIR']
  + ['XDG_CACHE_HOME', 'XDG_CONFIG_HOME', 'XDG_DATA_HOME', 'XDG_RUNTIME_DIR']
  # Loader and allocator.
  + ['DYLD_FALLBACK_LIBRARY_PATH', 'DYLD_LIBRARY_PATH', 'GLIBC_TUNABLES']
  + ['LD_LIBRARY_PATH', 'LD_PRELOAD', 'MALLOC_ARENA_MAX']
  # Python's environments.
  + ['CONDA_DEFAULT_ENV', 'CONDA_PREFIX', 'JAVA_HOME', 'VIRTUAL_ENV']
  # Files of libraries.
  + ['CURL_CA_BUNDLE', 'REQUESTS_CA_BUNDLE', 'SSL_CERT_DIR', 'SSL_CERT_FILE']
  + ['HF_DATASETS_CACHE', 'HF_DATASETS_OFFLINE', 'HF_HOME', 'HF_HUB_CACHE']
  + ['HF_HUB_OFFLINE', 'HUGGINGFACE_HUB_CACHE', 'MPLCONFIGDIR', 'NLTK_DATA']
  + ['TIKTOKEN_CACHE_DIR', 'TOKENIZERS_PARALLELISM', 'TORCH_HOME']
  + ['TRANSFORMERS_CACHE', 'TRANSFORMERS_OFFLINE']
)
_KEPT_FAMILIES = ('CUDA_', 'JAX_', 'LC_', 'NVIDIA_', 'PYTHON', 'XLA_')

# A worker computes on one core and leaves accelerators alone.
_SET = {
  'JAX_PLATFORMS': 'cpu',
  'MKL_NUM_THREADS': '1',
  'OMP_NUM_THREADS': '1',
  'OPENBLAS_NUM_THREADS': '1',
}

# Characters.  What is shorter, such as a 1, is in every text.
_SHORTEST_SECRET = 4

_NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')


def scrubbed(
  environment: Mapping[str, str], named: Sequence[str]
) -> dict[str, str]:
  """Of an environment, what a worker is given.

  Args:
    environment: such as `os.environ`.
    named: variables that are kept whatever they are.
  """
  kept = {
    name: value
    for name, value in environment.items()
    if name in named
    or name in _KEPT
    or name.startswith(_KEPT_FAMILIES)
    and not credentials.is_name(name)
  }
  return kept | {n: value for n, value in _SET.items() if n not in named}


def hiding(named: Sequence[str]) -> Callable[[str], str]:
  """What puts '***' in a message for credentials.

  For those that have the form of one, and for the values that the named
  variables have now.
  """
  values = {os.environ.get(name, '') for name in named}
  # The longer first: one may be a part of another.
  secrets = sorted(values, key=len, reverse=True)

  def hide(text: str) -> str:
    for secret in secrets:
      if len(secret) >= _SHORTEST_SECRET:
        text = text.replace(secret, '***')
    return credentials.censored(text)

  return hide


def check(named: Any, field: str) -> None:
  """Raises UserError unless all that is named is a variable that is set.

  Args:
    named: what the user gave as names.
    field: what the message begins with.
  """
  if not isinstance(named, list | tuple) or not all(
    isinstance(name, str) and _NAME.fullmatch(name) for name in named
  ):
    # Not shown: it may be the credential itself.
    raise UserError(
      f'{field}: environment is no list of names of variables\n'
      "write environment=('OPENAI_API_KEY',), and set the variable's value in "
      'the shell'
    )
  unset = [name for name in named if name not in os.environ]
  if unset:
    raise UserError(
      f'{field}: environment names {", ".join(unset)}, which is not set\n'
      'export it before the start, or leave it out'
    )
