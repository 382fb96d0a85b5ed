"""The exception for mistakes that the user can correct."""


class UserError(ValueError):
  """The problem, its place and the remedy, in at most three lines.

  Scripts print the message without a traceback and exit with status 2.
  """
