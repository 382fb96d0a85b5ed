"""Splits of arrays whose first axis counts prompts.

Every split keeps whole prompts, with all their responses, together.
"""

from collections.abc import Iterator
from typing import Any

import jax

from jaxrl_llm.errors import UserError

Array = jax.Array


def minibatches(tree: Any, count: int, key: Array) -> Iterator[Any]:
  """Shuffles whole prompts and splits them into `count` equal parts.

  Args:
    tree: arrays [P, ...].
    count: number of parts; must divide P.
    key: PRNG key of the shuffle.

  Raises:
    UserError: `count` does not divide P.
  """
  prompts = jax.tree.leaves(tree)[0].shape[0]
  check_divides(count, prompts, 'the number of minibatches')
  if count == 1:
    yield tree
    return
  order = jax.random.permutation(key, prompts).reshape(count, -1)
  for rows in order:
    yield _take(tree, rows)


# One program: with several processes, each array's own would be a rendezvous.
@jax.jit
def _take(tree: Any, rows: Array) -> Any:
  return jax.tree.map(lambda x: x[rows], tree)


def split_prompts(tree: Any, micro_prompts: int) -> Any:
  """Splits arrays [P, ...] into [P / micro_prompts, micro_prompts, ...].

  Strided, so that rows sharded over devices stay spread over all of them.

  Raises:
    UserError: `micro_prompts` does not divide P.
  """
  prompts = jax.tree.leaves(tree)[0].shape[0]
  check_divides(micro_prompts, prompts, 'the number of prompts per micro-batch')

  def split(x: Array) -> Array:
    shape = (micro_prompts, prompts // micro_prompts) + x.shape[1:]
    return x.reshape(shape).swapaxes(0, 1)

  return jax.tree.map(split, tree)


def check_divides(
  number: int, prompts: int, name: str, source: str = ''
) -> None:
  """Raises UserError, with possible values, if `number` does not divide P.

  Args:
    number: number of parts, or of prompts per part.
    prompts: P.
    name: the number's name, for the message.
    source: the origin of P, for the message.
  """
  if number < 1 or prompts % number:
    possible = [n for n in range(1, prompts + 1) if prompts % n == 0]
    raise UserError(
      f'{name} is {number}, which does not divide {prompts} prompts'
      f'{source and f" ({source})"}\n'
      f'choose one of {possible}'
    )
