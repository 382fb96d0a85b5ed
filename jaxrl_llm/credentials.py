"""Tells credentials by their names, and a few by their form.

A rule of thumb that keeps mistakes from being written down; what hides under a
harmless name and has no known form is not found.
"""

import re
from collections.abc import Sequence
from typing import Any

_WORD = re.compile(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+')
_SECRETS = frozenset(
  ['secret', 'secrets', 'password', 'passwords', 'passwd', 'passphrase', 'pwd']
  + ['credential', 'credentials', 'auth', 'authorization', 'bearer', 'apikey']
  + ['cookie', 'cookies', 'jwt', 'oauth', 'pgpass', 'pgpassword', 'dbpass']
)
# Before 'key'; a key alone is mostly that of a dictionary.
_KEYS = frozenset(
  ['api', 'access', 'private', 'secret', 'auth', 'encryption', 'signing', 'ssh']
  + ['account', 'license', 'subscription', 'wandb', 'openai', 'anthropic']
  + ['gemini', 'google', 'azure', 'aws', 'hf', 'huggingface', 'mistral']
  + ['cohere', 'groq', 'deepseek', 'openrouter']
)
# Before 'pass', which is else one over the data, and before 'pat'.
_OWNERS = {
  'pass': {'db', 'pg', 'database', 'user', 'admin', 'root', 'mail', 'smtp'},
  'pat': {'gh', 'github', 'gl', 'gitlab', 'azure'},
}
# With a word before them, in capitals as variables are: GH_PAT, SOME_KEY.
_VARIABLES = frozenset(['key', 'pass', 'pat'])
# Before 'token', which is then one of a text.
_TEXT = frozenset(
  ['eos', 'bos', 'pad', 'unk', 'sep', 'cls', 'mask', 'special', 'stop', 'end']
  + ['begin', 'start', 'first', 'last', 'next', 'per', 'every', 'a']
)
# Behind it: where a credential is, not what it is.
_POINTERS = frozenset(
  ['file', 'path', 'dir', 'folder', 'env', 'environment', 'variable', 'name']
  + ['length', 'type', 'url']
)

_IN_ADDRESS = re.compile(r'(?i)(\bhttps?://)[^/\s@]+@|(://)[^/\s:@]*:[^/\s@]+@')
# What stands in quotes, in brackets, or alone, behind a name in quotes.
_IN_JSON = re.compile(
  r'((["\'])([\w.-]+)\2\s*:\s*)'
  r'("(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|\[[^\]]{0,999}\]|[^\s,}\]"\'\[{]+)'
)
_IN_QUERY = re.compile(r'([?&]([^=&?\s]+)=)[^&\s]+')
# Of Hugging Face, OpenAI and its like, GitHub, GitLab, Slack, AWS, Google;
# of HTTP; JSON web tokens.
_KNOWN = re.compile(
  r'\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[opsu]_[A-Za-z0-9]{20,}'
  r'|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}'
  r'|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{35}|Bearer\s+[\w.~+/-]{16,})'
  r'|(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{5,}\.[\w-]{5,}'
)
_HIDDEN = '***'


def is_name(name: str) -> bool:
  """Whether what has this name is a credential: 'hub_token', 'apiKey'.

  A dotted name is judged by its last part.  Tokens of a text are none
  ('max_tokens', 'pad_token'), nor is where one lies ('api_key_file').
  """
  name = name.rpartition('.')[2]
  words = [word.lower() for word in _WORD.findall(name)]
  while words and words[-1].isdecimal():
    words.pop()
  if not words:
    return False
  # The address is the credential.
  if 'webhook' in words and words[-1] in ('webhook', 'url'):
    return True
  if words[-1] in _POINTERS:
    return False
  before = dict(zip(words[1:], words, strict=False))
  if words[-1] == 'token' and before.get('token') not in _TEXT:
    return True
  if before.get(words[-1]) in _OWNERS.get(words[-1], ()):
    return True
  if before and words[-1] in _VARIABLES and name.isupper():
    return True
  keys = before.get('key'), before.get('keys')
  return bool(_SECRETS & set(words)) or not _KEYS.isdisjoint(keys)


def masked(arguments: Sequence[str]) -> list[str]:
  """A command line with '***' for each credential in it."""
  shown, hidden = [], False
  for argument in arguments:
    if hidden and not argument.startswith('--'):
      shown.append(_HIDDEN)
      hidden = False
      continue
    name, equals, _ = argument.partition('=')
    hidden = name.startswith('-') and is_name(name)
    if hidden and equals:
      argument, hidden = f'{name}={_HIDDEN}', False
    shown.append(censored(argument))
  return shown


def censored(text: str) -> str:
  """A text with '***' for each credential that shows as one.

  By its form, or by the name before it in an address or in JSON.
  """
  text = _IN_JSON.sub(
    lambda match: f'{match[1]}"{_HIDDEN}"' if is_name(match[3]) else match[0],
    text,
  )
  return _without_forms(text)


def find(settings: Any, name: str = '') -> str | None:
  """The dotted name of the first setting that is a credential, or None.

  Args:
    settings: nested dictionaries and sequences.
    name: of `settings` itself.
  """
  if isinstance(settings, dict):
    for key, value in settings.items():
      found = find(value, f'{name}.{key}' if name else str(key))
      if found is not None:
        return found
  elif isinstance(settings, list | tuple):
    for value in settings:
      found = find(value, name)
      if found is not None:
        return found
  elif _is_credential(name, settings):
    return name
  return None


def _is_credential(name: str, value: Any) -> bool:
  if isinstance(value, str):
    named = bool(value.strip()) and is_name(name)
    return named or _without_forms(value) != value
  # A number named 'token' is one of a vocabulary.
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and is_name(name) and not name.lower().endswith('token')


def _without_forms(text: str) -> str:
  """A text with '***' for what shows by its form that it is a credential."""
  text = _IN_ADDRESS.sub(
    lambda match: f'{match[1] or match[2]}{_HIDDEN}@', text
  )
  text = _IN_QUERY.sub(
    lambda match: match[1] + _HIDDEN if is_name(match[2]) else match[0], text
  )
  return _KNOWN.sub(_HIDDEN, text)
