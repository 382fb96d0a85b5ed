"""The program that a completion contains is found."""

import pytest

from jaxrl_llm.rewards import programs

HEAD = 'import math\n\ndef help(x):\n  return x\n\ndef f(x):\n  """Doc."""\n'
BODY = '  return help(x)\n'


@pytest.mark.parametrize(
  'completion, program',
  [
    (BODY, HEAD + BODY),
    ('\n' + BODY, HEAD + '\n' + BODY),
    (BODY + '\ndef g():\n  pass', HEAD + BODY),
    (BODY + '\n# Then', HEAD + BODY),
    (BODY + '```\nThis returns x.', HEAD + BODY[:-1]),
    (BODY + '\nif __name__ == 1:\n  f()\nprint(f)', HEAD + BODY),
    ('  # a comment\n' + BODY, HEAD + '  # a comment\n' + BODY),
    (f'```python\n{BODY}```', HEAD + BODY),
    ('return x', HEAD + 'return x'),
  ],
)
def test_a_completion_continues_a_prompt_that_is_code(completion, program):
  assert programs.find_program(HEAD, completion, 'f') == program


@pytest.mark.parametrize(
  'text',
  [
    '{0}',
    '```python\n{0}```',
    '```py\n{0}```\n',
    '```\n{0}```',
    '```python\nprint("def f")\n```\nSo:\n```Python\n{0}```\n```sh\nls\n```',
    '```python\n{0}```\nAs in\n```python\nf(3)\n```',
    'It is\n```python\n{0}',  # Cut off, or never closed.
    ' Sure!\n\n~~\n```python\n{0}```',
    '~~~python\n{0}~~~',
    '```python:main.py\n{0}```',
    '``` python title="main.py"\n{0}```',
    '````python\n{0}````\n```\n```',
  ],
)
@pytest.mark.parametrize('prompt', [HEAD, 'Write a function f(x).'])
def test_a_completion_is_a_whole_program(text, prompt):
  program = 'def f(x):\n  return x\n\n# End\nclass A:\n  pass\n'
  found = programs.find_program(prompt, text.format(program), 'f')
  rest = 'import math\n\ndef help(x):\n    return x\n' if prompt == HEAD else ''
  assert found == rest + program


@pytest.mark.parametrize(
  'completion, program',
  [
    ('x = 1', 'x = 1'),
    ('```\nx = 1\n```\n```python\nx = 2\n```', 'x = 2\n'),
    (
      '1. This:\n   ```python\n   if 1:\n     x = 2\n   ```',
      'if 1:\n  x = 2\n',
    ),
    ('```js\nx\n```', '```js\nx\n```'),
    ('```\nx = 1', '```\nx = 1'),
    ('```python\n\n```', '```python\n\n```'),
    ('', ''),
  ],
)
def test_a_program_without_a_name_to_look_for(completion, program):
  assert programs.find_program('Write.', completion) == program


def test_a_prompt_is_code_if_it_can_be_continued():
  head = 'def f(x):\n'  # No Python yet, but what it begins is.
  assert programs.find_program(head, BODY + '\nprint(1)', 'f') == head + BODY
  # A prompt that only mentions code is no code.
  prompt = f'Complete this:\n```python\n{HEAD}```\n'
  assert programs.find_program(prompt, 'x = 1', 'f') == 'x = 1'
