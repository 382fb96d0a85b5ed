"""The one exception that stands for a mistake the user can correct."""


class UserError(ValueError):
  """What is wrong, where, and what to do, in at most three lines.

  Scripts print the message without a traceback and exit with status 2.
  """
