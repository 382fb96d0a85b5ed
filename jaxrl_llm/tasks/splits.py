"""Held-out rows that share no prompt with the rest."""

import random

from jaxrl_llm.errors import UserError


def split(
  rows: list[dict], held_out: int, seed: int = 0
) -> tuple[list[dict], list[dict]]:
  """Divides rows into (training, held-out), both in their original order.

  The draw is random because generators and files rarely are (rows
  drawn without repetition get longer as the short ones run out).  Rows that
  share a prompt stay together, so no held-out prompt occurs in training.

  Args:
    rows: each with a 'prompt'.
    held_out: number of distinct prompts to hold out.
    seed: of the draw.

  Raises:
    UserError: nothing would be left to train on.
  """
  prompts = list(dict.fromkeys(row['prompt'] for row in rows))
  if not 0 <= held_out < len(prompts):
    raise UserError(
      f'cannot hold out {held_out} of {len(prompts)} distinct prompts.\n'
      'held_out must be at least 0 and leave at least one prompt.'
    )
  chosen = set(random.Random(seed).sample(prompts, held_out))
  return (
    [row for row in rows if row['prompt'] not in chosen],
    [row for row in rows if row['prompt'] in chosen],
  )
