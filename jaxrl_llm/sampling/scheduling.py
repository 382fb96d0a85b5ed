"""Assigns branches to decode rows so that few rows idle.

A row holds the keys and values of one response and decodes its branches one
after another, those that fork last first: a branch writes after all forks still
to come, so the next one only needs to set the row's index back.  A row whose
response has no branch left takes over the response with most work left, whose
keys and values are copied.  When the rest fits into half of the rows, the
others are dropped, twice: a quarter remains to the end.  All rows of a prompt
read its keys and values at once, up to twice the rows of an even distribution.

This module neither calls a model nor draws tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# A prompt has room for this many times the rows of an even distribution.
_CROWD = 2
# Idle rows take over other responses once they are this share of all rows.
_PATIENCE = 1 / 16
# Divisors of the number of rows as the work runs out, and the fewest rows for
# which another program is worth compiling.
_DIVISORS = 1, 2, 4
_FEWEST = 16


class Jobs(NamedTuple):
  """Up to N branches of each of R responses to P prompts.

  They are sorted by position, the last first; those that exist come first.

  Attributes:
    positions: [R, N] int32, tokens of the response that a branch keeps.
    branches: [R, N] int32, the branch's number among the caller's R · N.
    inputs: [R, N] int32, its first input: the last token that it keeps.
    work: [R, N + 1] float32, tokens that branches n, n + 1, … write at most.
    count: [R] int32, number of branches that exist.
    prompts: P, a Python int.
    length: T, the capacity of a row's suffix, a Python int.
    crowd: maximum number of rows that decode branches of one prompt at one
      time, a Python int.
  """

  positions: Array
  branches: Array
  inputs: Array
  work: Array
  count: Array
  prompts: int
  length: int
  crowd: int


class Rows(NamedTuple):
  """State of B rows, and the branches begun so far.

  Attributes:
    response: [B] int32, the response whose keys and values it holds.
    branch: [B] int32, the branch that it decodes; R · N if it is idle.
    start: [B] int32, tokens in its suffix when the branch began.
    index: [B] int32, tokens in its suffix now; T if it is idle.
    token: [B] int32, its next input.
    begun: [R] int32, number of branches of each response that have been begun.
  """

  response: Array
  branch: Array
  start: Array
  index: Array
  token: Array
  begun: Array


def make_jobs(tokens: Array, positions: Array, rows: int) -> Jobs:
  """Lists the branches to decode with `rows` rows.

  Args:
    tokens: [P, G, T] int32, the responses.
    positions: [P, G, N] int32, tokens that each branch keeps; outside of
      1 … T − 1 it does not exist.
    rows: B.
  """
  prompts, samples, length = tokens.shape
  tokens = tokens.reshape(prompts * samples, length)
  positions = positions.reshape(prompts * samples, -1)
  inside = (positions > 0) & (positions < length)
  positions = jnp.where(inside, positions, 0)
  order = jnp.argsort(-positions, axis=1)
  sort = lambda x: jnp.take_along_axis(x, order, axis=1).astype(jnp.int32)
  number = jnp.arange(positions.size).reshape(positions.shape)
  ordered = sort(positions)
  most = jnp.where(ordered > 0, length - ordered, 0).astype(jnp.float32)
  work = jnp.cumsum(most[:, ::-1], axis=1)[:, ::-1]
  return Jobs(
    positions=ordered,
    branches=sort(number),
    inputs=jnp.take_along_axis(tokens, jnp.maximum(ordered - 1, 0), axis=1),
    work=jnp.pad(work, ((0, 0), (0, 1))),
    count=(ordered > 0).sum(axis=1, dtype=jnp.int32),
    prompts=prompts,
    length=length,
    crowd=min(rows, _CROWD * -(-rows // prompts)),
  )


def run(
  jobs: Jobs, count: int, source: Any, step: Callable, carry: Any
) -> tuple[Any, Array, Array]:
  """Decodes all branches.

  Args:
    jobs: the branches.
    count: B, initial number of rows.
    source: arrays [R, ...] of the responses; only copies are written.
    step: (readers, rows, held, carry) → (tokens [B], ended [B], held, carry),
      one token of every row.  `readers` are [P, g] int32, the rows that decode
      branches of each prompt, and B for none.
    carry: whatever `step` passes on.

  Returns:
    carry, rows times steps (float32), and rows that were copied (int32).
  """
  rows, held = _start(jobs, count), source
  if count != jobs.count.size:
    held = jax.tree.map(lambda x: x[rows.response], source)
  copies, row_steps = jnp.int32(count), jnp.float32(0)
  sizes = [count // by for by in _DIVISORS if by == 1 or count // by >= _FEWEST]
  for i, size in enumerate(sizes):
    if i:
      rows, held = _shrink(jobs, rows, held, size)
      copies += size
    floor = sizes[i + 1] if i + 1 < len(sizes) else 0
    state = _State(rows, held, carry, jnp.int32(0), copies)
    state = _run_batch(jobs, source, step, floor, state)
    rows, held, carry, steps, copies = state
    row_steps += steps.astype(jnp.float32) * size
  return carry, row_steps, copies


class _State(NamedTuple):
  rows: Rows
  held: Any
  carry: Any
  steps: Array
  copies: Array


def _run_batch(jobs, source, step, floor: int, state: _State) -> _State:
  """Decodes with B rows for as long as more than `floor` can be busy."""
  patience = max(1, int(state.rows.branch.size * _PATIENCE))

  def lasts(state):
    return _wanted(jobs, state.rows) > floor

  def is_full(state):
    idle = _is_idle(jobs, state.rows)
    none_left = (_work_left(jobs, state.rows) == 0).all()
    full = (idle.sum() < patience) | none_left
    return lasts(state) & full & ~idle.all()

  def decode(readers, state):
    rows, held, carry = state.rows, state.held, state.carry
    tokens, ended, held, carry = step(readers, rows, held, carry)
    rows = _advance(jobs, rows, tokens, ended)
    return _State(rows, held, carry, state.steps + 1, state.copies)

  def fill_and_decode(state):
    rows, held, copies = _deal(jobs, state.rows, state.held, source)
    state = state._replace(rows=rows, held=held, copies=state.copies + copies)
    readers = _readers(jobs, rows)
    return jax.lax.while_loop(is_full, lambda s: decode(readers, s), state)

  return jax.lax.while_loop(lasts, fill_and_decode, state)


def _start(jobs: Jobs, rows: int) -> Rows:
  """Begins branches of all responses, or of evenly chosen ones."""
  even = np.arange(rows, dtype=np.int64) * jobs.count.size // rows
  full = lambda x: jnp.full(rows, x, jnp.int32)
  idle = Rows(
    response=jnp.asarray(even, jnp.int32),
    branch=full(jobs.branches.size),
    start=full(jobs.length),
    index=full(jobs.length),
    token=full(0),
    begun=jnp.zeros(jobs.count.size, jnp.int32),
  )
  return _begin(jobs, idle, jnp.ones(rows, bool))


def _is_idle(jobs: Jobs, rows: Rows) -> Array:
  """Marks idle rows, [B] bool."""
  return rows.branch == jobs.branches.size


def _advance(jobs: Jobs, rows: Rows, tokens: Array, ended: Array) -> Rows:
  """Updates rows after a step that wrote `tokens` and `ended` branches, [B].

  Rows whose branch ended begin the next one of the response that they hold.
  """
  free = ended | _is_idle(jobs, rows)
  rows = rows._replace(index=rows.index + 1, token=tokens)
  return _begin(jobs, rows, free)


def _deal(
  jobs: Jobs, rows: Rows, held: Any, source: Any
) -> tuple[Rows, Any, Array]:
  """Assigns idle rows to responses, those with most work left first.

  Args:
    jobs, rows: the branches, and the state of the rows.
    held: arrays [B, ...] of the rows, to be written in place.
    source: the same arrays of the responses, [R, ...].

  Returns:
    Rows, their arrays, and the number of copied rows.
  """

  samples = jobs.count.size // jobs.prompts

  def more(state):
    rows, _, _ = state
    return _is_idle(jobs, rows).any() & (_work_left(jobs, rows) > 0).any()

  def take_over(state):
    """Assigns one row per prompt at most, to its response with most work."""
    rows, held, copies = state
    left = _work_left(jobs, rows).reshape(jobs.prompts, samples)
    order = jnp.argsort(-left.max(axis=1))
    turn = jnp.cumsum(_is_idle(jobs, rows)) - 1
    takes = _is_idle(jobs, rows) & (turn < (left.max(axis=1) > 0).sum())
    prompt = order.at[turn].get(mode='clip').astype(jnp.int32)
    busiest = prompt * samples + left.argmax(axis=1).astype(jnp.int32)[prompt]
    response = jnp.where(takes, busiest, rows.response)
    rows = _begin(jobs, rows._replace(response=response), takes)
    number = jnp.argsort(~takes, stable=True)

    def copy_row(i, held):
      row = number[i]

      def copy(x, y):
        y = jax.lax.dynamic_slice_in_dim(y, response[row], 1, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(x, y, row, axis=0)

      return jax.tree.map(copy, held, source)

    count = takes.sum(dtype=jnp.int32)
    held = jax.lax.fori_loop(0, count, copy_row, held)
    return rows, held, copies + count

  return jax.lax.while_loop(more, take_over, (rows, held, jnp.int32(0)))


def _work_left(jobs: Jobs, rows: Rows) -> Array:
  """Returns the most tokens that branches not yet begun write, [R] float32.

  It is 0 for responses to prompts that have no room for another row.
  """
  left = jnp.take_along_axis(jobs.work, rows.begun[:, None], axis=1)[:, 0]
  room = _busy_rows(jobs, rows) < jobs.crowd
  return jnp.where(jnp.repeat(room, left.size // jobs.prompts), left, 0)


def _wanted(jobs: Jobs, rows: Rows) -> Array:
  """Returns the most rows that can be busy from now on, an int32 scalar."""
  left = (jobs.count - rows.begun).reshape(jobs.prompts, -1).sum(axis=1)
  return jnp.minimum(_busy_rows(jobs, rows) + left, jobs.crowd).sum()


def _shrink(jobs: Jobs, rows: Rows, held: Any, count: int) -> tuple[Rows, Any]:
  """Keeps `count` rows, all busy ones among them, and their arrays."""
  kept = jnp.argsort(_is_idle(jobs, rows), stable=True)[:count]
  fields = {name: x[kept] for name, x in rows._asdict().items()}
  fields['begun'] = rows.begun
  return Rows(**fields), jax.tree.map(lambda x: x[kept], held)


def _readers(jobs: Jobs, rows: Rows) -> Array:
  """Returns the rows that decode branches of each prompt, [P, g]; B: none."""
  count = rows.branch.size
  most = min(jobs.crowd, count)
  busy = ~_is_idle(jobs, rows)
  prompt = _prompt(jobs, rows)
  place = prompt * most + _rank(prompt, busy)
  place = jnp.where(busy, place, jobs.prompts * most)
  nobody = jnp.full(jobs.prompts * most, count, jnp.int32)
  number = jnp.arange(count, dtype=jnp.int32)
  return nobody.at[place].set(number, mode='drop').reshape(-1, most)


def _begin(jobs: Jobs, rows: Rows, free: Array) -> Rows:
  """Begins branches on free rows, [B] bool, or makes the rows idle."""
  turn = rows.begun[rows.response] + _rank(rows.response, free)
  starts = free & (turn < jobs.count[rows.response])
  job = rows.response * jobs.branches.shape[1] + turn

  def pick(table, nothing, kept):
    value = table.reshape(-1).at[job].get(mode='clip')
    return jnp.where(free, jnp.where(starts, value, nothing), kept)

  index = pick(jobs.positions, jobs.length, rows.index)
  return rows._replace(
    branch=pick(jobs.branches, jobs.branches.size, rows.branch),
    start=jnp.where(free, index, rows.start),
    index=index,
    token=pick(jobs.inputs, 0, rows.token),
    begun=rows.begun.at[rows.response].add(starts.astype(jnp.int32)),
  )


def _prompt(jobs: Jobs, rows: Rows) -> Array:
  return rows.response // (jobs.count.size // jobs.prompts)


def _busy_rows(jobs: Jobs, rows: Rows) -> Array:
  """Counts the rows that decode branches of each prompt, [P] int32."""
  busy = (~_is_idle(jobs, rows)).astype(jnp.int32)
  none = jnp.zeros(jobs.prompts, jnp.int32)
  return none.at[_prompt(jobs, rows)].add(busy)


def _rank(group: Array, member: Array) -> Array:
  """Counts the members of its group before each member, [B] int32."""
  key = jnp.where(member, group, jnp.iinfo(jnp.int32).max)
  order = jnp.argsort(key, stable=True)
  grouped, place = key[order], jnp.arange(group.size, dtype=jnp.int32)
  begins = jnp.append(True, grouped[1:] != grouped[:-1])
  rank = place - jax.lax.cummax(jnp.where(begins, place, 0))
  return jnp.zeros_like(group).at[order].set(rank)
