"""Which row of a decode batch decodes which branch, so that few are idle.

A row holds the keys and values of one response and decodes branches of it one
after another, those that fork last first: what a branch writes lies behind all
forks still to come, so that the next one costs no more than setting the row's
index back.  A row whose response has no branch left takes over the response
with most work left, whose keys and values are copied.  When what is left fits
into half of the rows, the others are dropped, and once more: a quarter stays to
the end.  A prompt's keys and values are read by all its rows at once, for which
there is room: for twice the rows of an even distribution.

No model is called here, and no token drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# A prompt has room for this many times the rows of an even distribution.
_CROWD = 2
# Rows wait until this share of all is idle before they take over others.
_PATIENCE = 1 / 16
# What the rows are divided by when what is left fits into so many, and the
# fewest for which another program is worth compiling.
_DIVISORS = 1, 2, 4
_FEWEST = 16


class Jobs(NamedTuple):
  """Up to N branches of each of R responses to P prompts.

  They are sorted by position, the last first; those that exist are in front.

  Attributes:
    positions: [R, N] int32, how many tokens of the response it keeps.
    branches: [R, N] int32, the branch's number among the caller's R · N.
    inputs: [R, N] int32, its first input: the last token that it keeps.
    work: [R, N + 1] float32, tokens that branches n, n + 1, … write at most.
    count: [R] int32, how many branches exist.
    prompts: P, a Python int.
    length: T, the capacity of a row's suffix, a Python int.
    crowd: the most rows that decode branches of one prompt at one time, a
      Python int.
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
  """What each of B rows is at, and what has been begun.

  Attributes:
    response: [B] int32, whose keys and values it holds.
    branch: [B] int32, the branch that it decodes; R · N if it is idle.
    start: [B] int32, tokens in its suffix when the branch began.
    index: [B] int32, tokens in its suffix now; T if it is idle.
    token: [B] int32, its next input.
    begun: [R] int32, how many branches of each response have been begun.
  """

  response: Array
  branch: Array
  start: Array
  index: Array
  token: Array
  begun: Array


def make_jobs(tokens: Array, positions: Array, rows: int) -> Jobs:
  """What there is to do for `rows` rows.

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
  at = sort(positions)
  most = jnp.where(at > 0, length - at, 0).astype(jnp.float32)
  work = jnp.cumsum(most[:, ::-1], axis=1)[:, ::-1]
  return Jobs(
    positions=at,
    branches=sort(number),
    inputs=jnp.take_along_axis(tokens, jnp.maximum(at - 1, 0), axis=1),
    work=jnp.pad(work, ((0, 0), (0, 1))),
    count=(at > 0).sum(axis=1, dtype=jnp.int32),
    prompts=prompts,
    length=length,
    crowd=min(rows, _CROWD * -(-rows // prompts)),
  )


def run(
  jobs: Jobs, count: int, source: Any, step: Callable, carry: Any
) -> tuple[Any, Array, Array]:
  """Decodes all branches.

  Args:
    jobs: what there is to do.
    count: B, rows to begin with.
    source: arrays [R, ...] of what the responses hold; copies are written.
    step: (readers, rows, held, carry) → (tokens [B], ended [B], held, carry),
      one token of every row.  `readers` are [P, g] int32, the rows that decode
      branches of each prompt, and B for nobody.
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
  """All responses, or evenly chosen ones, are held and their branches begun."""
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
  """[B] bool."""
  return rows.branch == jobs.branches.size


def _advance(jobs: Jobs, rows: Rows, tokens: Array, ended: Array) -> Rows:
  """Rows after a step that wrote `tokens`, [B], and so `ended`, [B], branches.

  Rows whose branch ended begin the next one of the response that they hold.
  """
  free = ended | _is_idle(jobs, rows)
  rows = rows._replace(index=rows.index + 1, token=tokens)
  return _begin(jobs, rows, free)


def _deal(
  jobs: Jobs, rows: Rows, held: Any, source: Any
) -> tuple[Rows, Any, Array]:
  """Idle rows take over responses, those with most work left first.

  Args:
    jobs, rows: what there is to do, and what is being done.
    held: arrays [B, ...] of what the rows hold, to be written in place.
    source: arrays [R, ...] of the same of the responses.

  Returns:
    Rows, what they hold, and how many were copied.
  """

  samples = jobs.count.size // jobs.prompts

  def more(state):
    rows, _, _ = state
    return _is_idle(jobs, rows).any() & (_work_left(jobs, rows) > 0).any()

  def take_over(state):
    """One row at most for each prompt, whose response with most work left."""
    rows, held, copies = state
    left = _work_left(jobs, rows).reshape(jobs.prompts, samples)
    order = jnp.argsort(-left.max(axis=1))
    turn = jnp.cumsum(_is_idle(jobs, rows)) - 1
    takes = _is_idle(jobs, rows) & (turn < (left.max(axis=1) > 0).sum())
    prompt = order.at[turn].get(mode='clip').astype(jnp.int32)
    found = prompt * samples + left.argmax(axis=1).astype(jnp.int32)[prompt]
    response = jnp.where(takes, found, rows.response)
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
  """[R] float32, tokens that branches not yet begun write at most.

  0 for responses to prompts that have no room for another row.
  """
  left = jnp.take_along_axis(jobs.work, rows.begun[:, None], axis=1)[:, 0]
  room = _busy_rows(jobs, rows) < jobs.crowd
  return jnp.where(jnp.repeat(room, left.size // jobs.prompts), left, 0)


def _wanted(jobs: Jobs, rows: Rows) -> Array:
  """int32 scalar, the most rows that can be busy from now on."""
  left = (jobs.count - rows.begun).reshape(jobs.prompts, -1).sum(axis=1)
  return jnp.minimum(_busy_rows(jobs, rows) + left, jobs.crowd).sum()


def _shrink(jobs: Jobs, rows: Rows, held: Any, count: int) -> tuple[Rows, Any]:
  """`count` rows, all busy ones among them, and what they hold."""
  kept = jnp.argsort(_is_idle(jobs, rows), stable=True)[:count]
  fields = {name: x[kept] for name, x in rows._asdict().items()}
  fields['begun'] = rows.begun
  return Rows(**fields), jax.tree.map(lambda x: x[kept], held)


def _readers(jobs: Jobs, rows: Rows) -> Array:
  """[P, g] int32, the rows that decode branches of each prompt; B: nobody."""
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
  """Free rows, [B] bool, begin branches of what they hold, or become idle."""
  turn = rows.begun[rows.response] + _rank(rows.response, free)
  found = free & (turn < jobs.count[rows.response])
  job = rows.response * jobs.branches.shape[1] + turn

  def pick(table, nothing, kept):
    value = table.reshape(-1).at[job].get(mode='clip')
    return jnp.where(free, jnp.where(found, value, nothing), kept)

  index = pick(jobs.positions, jobs.length, rows.index)
  return rows._replace(
    branch=pick(jobs.branches, jobs.branches.size, rows.branch),
    start=jnp.where(free, index, rows.start),
    index=index,
    token=pick(jobs.inputs, 0, rows.token),
    begun=rows.begun.at[rows.response].add(found.astype(jnp.int32)),
  )


def _prompt(jobs: Jobs, rows: Rows) -> Array:
  return rows.response // (jobs.count.size // jobs.prompts)


def _busy_rows(jobs: Jobs, rows: Rows) -> Array:
  """[P] int32, rows that decode branches of each prompt."""
  busy = (~_is_idle(jobs, rows)).astype(jnp.int32)
  none = jnp.zeros(jobs.prompts, jnp.int32)
  return none.at[_prompt(jobs, rows)].add(busy)


def _rank(group: Array, member: Array) -> Array:
  """[B] int32, members in front of each member that are of its group."""
  key = jnp.where(member, group, jnp.iinfo(jnp.int32).max)
  order = jnp.argsort(key, stable=True)
  grouped, place = key[order], jnp.arange(group.size, dtype=jnp.int32)
  begins = jnp.append(True, grouped[1:] != grouped[:-1])
  rank = place - jax.lax.cummax(jnp.where(begins, place, 0))
  return jnp.zeros_like(group).at[order].set(rank)
