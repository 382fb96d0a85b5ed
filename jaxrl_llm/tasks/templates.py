"""Chat templates: their selection, and messages rendered with them.

A template comes with a model's folder, as a program in Jinja's language.
`transformers` runs it in Jinja's sandbox, where it cannot reach files or change
objects.  Its running time is not limited.
"""

from jaxrl_llm.errors import UserError


def template_text(
  tokenizer, chat_template: str | None, system_prompt: str | None
) -> str | None:
  """Returns the chat template that `prompts.encode_prompts` uses, or None.

  Raises:
    UserError: the tokenizer has several, or a system prompt has no template.
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
  """Renders messages with the template; `settings` as in `transformers`.

  Raises:
    UserError: the template fails on them.
  """
  try:
    return tokenizer.apply_chat_template(
      messages, chat_template=template, tokenize=False, **settings
    )
  except Exception as error:  # A template can raise anything.
    reason = ' '.join(str(error).split())[:200]
  roles = [message['role'] for message in messages]
  raise UserError(
    f'the chat template fails on messages of the roles {roles}:\n{reason}'
  )
