"""Chat templates: which one is used, and messages as it writes them.

A template comes with a model's folder, as a program in Jinja's language.
`transformers` runs it in Jinja's sandbox, where it reaches no file and changes
no object; here it is ended as well when it does not end by itself.
"""

import ctypes
import threading
import time

from jaxrl_llm.errors import UserError

# Of one rendering, which takes a fraction of a millisecond.
MAX_SECONDS = 10.0

_POLL = 0.5
_lock = threading.Lock()
# Threads that render, and since when by the monotonic clock.
_begun: dict[int, float] = {}
_watched = False


class _TooLong(BaseException):
  """No Exception: Jinja would take it for one of the template's."""


def template_text(
  tokenizer, chat_template: str | None, system_prompt: str | None
) -> str | None:
  """The chat template that `prompts.encode_prompts` uses; None for none.

  Raises:
    UserError: the tokenizer has several, or a system prompt has no place.
  """
  template = chat_template
  if chat_template == 'auto':
    template = tokenizer.chat_template
    if isinstance(template, dict):
      raise UserError(
        f'the tokenizer has several chat templates: {sorted(template)}.\n'
        'Pass the text of one as chat_template.'
      )
  if system_prompt is not None and template is None:
    raise UserError(
      'system_prompt needs a chat template, and there is none in use.\n'
      'Pass a chat_template, or put the text into the prompts.'
    )
  return template


def render(tokenizer, template: str, messages: list[dict], **settings) -> str:
  """Messages as the template writes them; `settings` of `transformers`.

  Raises:
    UserError: the template fails on them, or takes more than `MAX_SECONDS`.
  """
  try:
    return _in_time(
      lambda: tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **settings
      )
    )
  except _TooLong:
    reason = f'it takes more than {MAX_SECONDS:g} seconds'
  except Exception as error:  # A template can raise what it likes.
    reason = ' '.join(str(error).split())[:200]
  roles = [message['role'] for message in messages]
  raise UserError(
    f'the chat template fails on messages of the roles {roles}:\n{reason}'
  )


def _in_time(call):
  """What `call()` gives; raises `_TooLong` in its midst if it takes too long.

  What Jinja compiles is Python, which another thread can end between two of its
  steps; a single step of the interpreter's, such as a huge power, it cannot.
  """
  global _watched
  thread = threading.get_ident()
  with _lock:
    _begun[thread] = time.monotonic()
    if not _watched:
      _watched = True
      threading.Thread(target=_watch, daemon=True).start()
  try:
    return call()
  finally:
    with _lock:
      _begun.pop(thread, None)
      _raise_in(thread, None)  # Takes back one that has not been raised yet.


def _watch() -> None:
  """Ends what takes too long, until nothing is rendered any more."""
  global _watched
  while True:
    time.sleep(_POLL)
    with _lock:
      if not _begun:
        _watched = False
        return
      for thread, start in list(_begun.items()):
        if time.monotonic() - start > MAX_SECONDS:
          # Once: it is raised wherever the thread is, and that may be where it
          # has just ended by itself.
          del _begun[thread]
          _raise_in(thread, _TooLong)


def _raise_in(thread: int, kind: type | None) -> None:
  ctypes.pythonapi.PyThreadState_SetAsyncExc(
    ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind)
  )
