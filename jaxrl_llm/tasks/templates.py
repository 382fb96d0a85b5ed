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


def render(
  tokenizer,
  template: str,
  system_prompt: str | None,
  turns: dict[str, str],
  **settings,
) -> str:
  """Renders a dialogue with the template.

  Args:
    tokenizer: of `transformers`.
    template: from `template_text`.
    system_prompt: comes first; None for none.
    turns: role → text, in their order.
    **settings: as in `transformers`.

  Raises:
    UserError: the template fails on them.
  """
  system = {} if system_prompt is None else {'system': system_prompt}
  turns = system | turns
  messages = [{'role': role, 'content': x} for role, x in turns.items()]
  try:
    return tokenizer.apply_chat_template(
      messages, chat_template=template, tokenize=False, **settings
    )
  except Exception as error:  # A template can raise anything.
    reason = ' '.join(str(error).split())[:200]
  raise UserError(
    f'the chat template fails on messages of the roles {[*turns]}:\n{reason}'
  )
