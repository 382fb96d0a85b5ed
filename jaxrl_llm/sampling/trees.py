"""Grows prefix trees: a prefix that several responses share is decoded once.

The live nodes of all trees have one depth and share one pool of slots, each
with keys and values of its own.  A node that gets several children hands its
slot to one of them and copies it for the others.  The pool is as large as a few
sizes allow: when it does not suffice, or a smaller one would, the host goes on
with the program of another size.  What a tree becomes depends on neither.

How children are chosen is a value, of `allocation`.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxrl_llm import sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import head, transformer
from jaxrl_llm.models.config import ModelConfig, check_length
from jaxrl_llm.models.prompts import Prompts, last_tokens, prefill_prompts
from jaxrl_llm.sampling.allocation import Allocation, Children, Nodes, Rows
from jaxrl_llm.sampling.decoding import Settings, is_end
from jaxrl_llm.sampling.policy import Decoding, adjust_logits
from jaxrl_llm.sampling.sampler import Samples

Array = jax.Array

# Ratio of the pool's sizes, of which the smallest is the number of trees.
_GROWTH = 2 ** (1 / 3)
# All slots of a prompt read its keys and values at once, with room for so many
# times the slots of an even distribution.
_CROWD = 4


@chex.dataclass(frozen=True)
class Grown:
  """Trees of P prompts with R rows each: their responses.

  Attributes:
    samples: [P, R, T]; a row that there is not has no tokens.
    parents, forked_at: [P, R, 1] int32, as in `Rollouts`.
    node_weights: [P, R, T] float32, likewise; 0 outside the mask.
    nodes: int32 scalar, tokens that were drawn: one per distinct prefix.
    row_steps: int32 scalar, slots times steps that this took.
  """

  samples: Samples
  parents: Array
  forked_at: Array
  node_weights: Array
  nodes: Array
  row_steps: Array


class _State(NamedTuple):
  """Trees that grow: Q of them with M rows, B slots.

  Attributes:
    index: int32 scalar, depth: tokens of each live row.
    rows: [Q, M, ...], what allocation reads.
    slot: [Q, M] int32, the slot of a row's node; B where it has none.
    token: [B] int32, input of each slot.
    logits: [B, V] float32 after the slots' tokens, adjusted.
    held: keys and values of the slots, by layer.
    written: {name: [Q, M, T]}.
    nodes, row_steps: as in `Grown`, of these trees.
    wanted: int32 scalar, slots needed to go on.
  """

  index: Array
  rows: Rows
  slot: Array
  token: Array
  logits: Array
  held: Any
  written: dict[str, Array]
  nodes: Array
  row_steps: Array
  wanted: Array


def grow(
  config: ModelConfig,
  params,
  prompts: Prompts,
  key: Array,
  *,
  allocation: Allocation,
  max_tokens: int,
  decoding: Decoding = Decoding(),
  eos_ids: tuple[int, ...] = (),
  pad_id: int = 0,
  statistics: tuple[str, ...] = (),
) -> Grown:
  """Grows the trees of P prompts.  Not for use under `jax.jit`.

  Args:
    config, params: the model, in the layout of sampling.
    prompts: P prompts.
    key: PRNG key.
    allocation: how children are chosen.
    max_tokens: T, EOS included.
    decoding, eos_ids, pad_id, statistics: as in `sample`.

  Raises:
    UserError: as in `sample`; greedy decoding.
  """
  if decoding.greedy or max_tokens < 1:
    raise UserError(f'trees need {max_tokens=} ≥ 1 and a temperature above 0')
  check_length(config, prompts.tokens.shape[1] + max_tokens)
  settings = Settings(decoding, eos_ids, pad_id, statistics)
  count = prompts.tokens.shape[0]
  shards = sharding.shards(sharding.row_spec(count))
  trees = count // shards * allocation.trees
  sizes = _sizes(trees, trees * allocation.rows)
  segment, state = _start(
    config, params, prompts, allocation, max_tokens, settings, sizes[0]
  )
  size = sizes[0]
  while wanted := int(state.wanted):
    larger = next(each for each in sizes if each >= wanted)
    if larger != size:
      state, size = _resize(state, larger, count), larger
    floor = max((each for each in sizes if each < size), default=0)
    state = _run(
      config, params, segment, key, allocation, settings, count, floor, state
    )
  return _finish(state, allocation, count, pad_id)


def _sizes(fewest: int, most: int) -> list[int]:
  """Lists the sizes of a device's pool, ascending."""
  sizes, size = [], float(fewest)
  while size < most:
    sizes.append(int(size))
    size *= _GROWTH
  return [*sizes, most]


def _specs(rows: P) -> _State:
  """Returns the PartitionSpecs of a state."""
  one = P(rows[0])
  return _State(
    index=P(),
    rows=one,
    slot=one,
    token=one,
    logits=one,
    held=one,
    written=one,
    nodes=one,
    row_steps=one,
    wanted=P(),
  )


@functools.partial(
  jax.jit,
  static_argnames=('config', 'allocation', 'max_tokens', 'settings', 'size'),
)
def _start(config, params, prompts, allocation, max_tokens, settings, size):
  """Reads the prompts, and plants a tree, or several, at the end of each."""
  rows = sharding.row_spec(prompts.tokens.shape[0])
  trees, most = allocation.trees, allocation.rows

  def of_rows(params, prompts):
    params = transformer.split_layers(params)
    segment = prefill_prompts(config, params, prompts).split()
    count = prompts.lengths.size * trees
    first = jnp.repeat(last_tokens(prompts), trees)
    suffix = transformer.new_cache(config, (), size, max_tokens).suffix
    shape = count, most, max_tokens
    written = {'tokens': jnp.full(shape, settings.pad_id, jnp.int32)}
    for name in ('log_probs', 'node_weights', *settings.statistics):
      written[name] = jnp.zeros(shape, jnp.float32)
    written['mask'] = jnp.zeros(shape, bool)
    number = jnp.arange(count, dtype=jnp.int32)
    slot = jnp.full((count, most), size, jnp.int32).at[:, 0].set(number)
    state = _State(
      index=jnp.int32(0),
      rows=allocation.start(count),
      slot=slot,
      token=jnp.zeros(size, jnp.int32).at[:count].set(first),
      logits=jnp.zeros((size, config.vocab_size), jnp.float32),
      held=(suffix.keys, suffix.values),
      written=written,
      nodes=jnp.zeros(1, jnp.int32),
      row_steps=jnp.zeros(1, jnp.int32),
      wanted=jnp.int32(count),
    )
    return segment, _read(config, params, segment, settings.decoding, state)

  run = sharding.over_rows(
    of_rows, (P(), P(rows[0])), (P(rows[0]), _specs(rows))
  )
  return run(params, prompts)


@functools.partial(jax.jit, static_argnames=('size', 'prompts'))
def _resize(state: _State, size: int, prompts: int) -> _State:
  """Moves the trees into a pool of another size, live slots first."""
  rows = sharding.row_spec(prompts)

  def of_rows(state):
    old = state.token.size
    idle = jnp.ones(old, bool).at[state.slot].set(False, mode='drop')
    kept = jnp.argsort(idle, stable=True)[:size]
    kept = jnp.pad(kept, (0, size - kept.size))
    place = jnp.full(old + 1, size, jnp.int32)
    number = jnp.arange(min(old, size), dtype=jnp.int32)
    place = place.at[kept[: number.size]].set(number)
    live = state.slot < old
    slot = jnp.where(live, place[state.slot], size)
    of_slots = state.held, state.token, state.logits
    held, token, logits = jax.tree.map(lambda x: x[kept], of_slots)
    return state._replace(slot=slot, held=held, token=token, logits=logits)

  specs = (_specs(rows),)
  return sharding.over_rows(of_rows, specs, specs[0])(state)


@functools.partial(
  jax.jit,
  static_argnames=('config', 'allocation', 'settings', 'prompts', 'floor'),
  donate_argnames='state',
)
def _run(
  config, params, segment, key, allocation, settings, prompts, floor, state
) -> _State:
  """Decodes while the pool suffices and more than `floor` slots are busy."""
  rows = sharding.row_spec(prompts)
  trees = allocation.trees
  axes = sharding.flat(rows) if sharding.row_devices() > 1 else None
  # Random numbers are those of the tree, wherever it grows.
  numbers = jnp.arange(prompts * trees, dtype=jnp.int32)

  def of_rows(params, segment, key, numbers, state):
    params = transformer.split_layers(params)
    size = state.token.size

    def lasts(state):
      return (state.wanted > floor) & (state.wanted <= size)

    def step(state):
      uniform = allocation.uniform(
        jax.random.fold_in(key, state.index), numbers, prompts * trees
      )
      return _step(
        config, params, segment, allocation, settings, axes, uniform, state
      )

    state = jax.lax.while_loop(lasts, step, state)
    return state

  run = sharding.over_rows(
    of_rows,
    (P(), P(rows[0]), P(), P(rows[0]), _specs(rows)),
    _specs(rows),
  )
  return run(params, segment, key, numbers, state)


def _step(
  config, params, segment, allocation, settings, axes, uniform, state: _State
) -> _State:
  """Draws a token for every slot and reads it, unless slots are too few."""
  size, index = state.token.size, state.index
  nodes = Nodes.of(state.logits)
  children = allocation.choose(state.rows, nodes, state.slot, uniform, index)
  capacity = state.written['tokens'].shape[2]
  ended = is_end(children.token, settings.eos_ids) | (index + 1 == capacity)
  goes_on = children.exists & children.owns & ~ended
  wanted = _wanted(goes_on, segment.rows, axes)
  state = state._replace(wanted=wanted)
  new = (children.exists & children.owns).sum(dtype=jnp.int32)

  def commit(state):
    slot, copies, sources = _assign(goes_on, children.source, state.slot, size)
    token = jnp.zeros(size, jnp.int32)
    token = token.at[slot].set(children.token, mode='drop')
    rows = allocation.advance(state.rows, children, ended, index)
    finished = children.exists & is_end(children.token, settings.eos_ids)
    state = state._replace(
      index=index + 1,
      rows=rows._replace(finished=rows.finished | finished),
      slot=slot,
      token=token,
      held=_copy(state.held, copies, sources),
      written=_write(state, children, nodes, index),
      nodes=state.nodes + new,
    )
    read = functools.partial(_read, config, params, segment, settings.decoding)
    return jax.lax.cond(wanted > 0, read, lambda state: state, state)

  # The same tokens are drawn again in a larger pool.
  return jax.lax.cond(wanted <= size, commit, lambda state: state, state)


def _read(config, params, segment, decoding, state: _State) -> _State:
  """Computes the logits after all slots' tokens."""
  size = state.token.size
  by_prompt = jnp.sort(state.slot.reshape(segment.rows, -1), axis=1)
  crowd = min(by_prompt.shape[1], _CROWD * -(-size // segment.rows))
  suffix = transformer.Segment(
    keys=state.held[0], values=state.held[1], lengths=state.token
  )
  cache = transformer.Cache(
    prefixes=(segment.replace(readers=by_prompt[:, :crowd]),),
    suffix=suffix,
    index=state.index,
  )
  hidden, cache = transformer.apply(config, params, state.token[:, None], cache)
  logits = transformer.logits(config, params, hidden[:, 0])
  return state._replace(
    logits=adjust_logits(logits, decoding),
    held=(cache.suffix.keys, cache.suffix.values),
    row_steps=state.row_steps + size,
  )


def _wanted(goes_on: Array, prompts: int, axes: tuple | None) -> Array:
  """Returns the slots that a depth needs, on the device that needs most.

  Of a pool, one prompt's nodes have at most `_CROWD` times the even share.
  """
  by_prompt = goes_on.reshape(prompts, -1).sum(axis=1, dtype=jnp.int32)
  wanted = jnp.maximum(by_prompt.sum(), prompts * -(-by_prompt.max() // _CROWD))
  most = prompts * (goes_on.size // prompts)
  wanted = jnp.minimum(wanted, most)
  return jax.lax.pmax(wanted, axes) if axes else wanted


def _assign(goes_on, source, slot, size):
  """Gives every row that goes on a slot.

  The first child of a node takes over its slot, the others free ones.

  Returns:
    slots [Q, M]; and the slots to copy to and from, [Q · M], B for none.
  """
  trees, most = slot.shape
  same = (source[:, :, None] == source[:, None]) & goes_on[:, None]
  first = jnp.argmax(same, axis=2) == jnp.arange(most)[None]
  inherits = goes_on & first
  of_node = jnp.take_along_axis(slot, source, axis=1)
  taken = jnp.zeros(size, bool)
  taken = taken.at[jnp.where(inherits, of_node, size)].set(True, mode='drop')
  free = jnp.argsort(taken, stable=True).astype(jnp.int32)
  fresh = (goes_on & ~first).reshape(-1)
  rank = jnp.cumsum(fresh) - 1
  given = free.at[rank].get(mode='clip').reshape(trees, most)
  new = jnp.where(inherits, of_node, jnp.where(goes_on, given, size))
  order = jnp.argsort(~fresh, stable=True)
  copies = jnp.where(fresh, new.reshape(-1), size)[order]
  return new, copies, of_node.reshape(-1)[order]


def _copy(held, copies, sources):
  """Copies keys and values, a slot at a time."""
  size = jax.tree.leaves(held)[0].shape[0]

  def copy(i, held):
    def of_array(x):
      y = jax.lax.dynamic_slice_in_dim(x, sources[i], 1, axis=0)
      return jax.lax.dynamic_update_slice_in_dim(x, y, copies[i], axis=0)

    return jax.tree.map(of_array, held)

  return jax.lax.fori_loop(0, (copies < size).sum(), copy, held)


def _write(state: _State, children: Children, nodes: Nodes, index):
  """Records the children's tokens and statistics at a depth."""
  slot = jnp.take_along_axis(state.slot, children.source, axis=1)
  flat = slot.reshape(-1), children.token.reshape(-1)
  shaped = lambda x: x.reshape(slot.shape)
  known = {
    'tokens': children.token,
    'mask': children.exists,
    'node_weights': children.weight,
    'log_probs': shaped(nodes.log_probs.at[flat].get(mode='clip')),
  }
  if {'entropy', 'score_norms'} & state.written.keys():
    found = head.statistics(nodes.log_probs, jnp.zeros_like(state.token))
    known['entropy'] = shaped(found.entropy.at[flat[0]].get(mode='clip'))
    squares = jnp.square(nodes.probabilities).sum(axis=1)
    squares = shaped(squares.at[flat[0]].get(mode='clip'))
    chosen = jnp.exp(known['log_probs'])
    norms = jnp.maximum(1.0 - 2.0 * chosen + squares, 0.0)
    known['score_norms'] = norms

  def put(name, buffer):
    old = jax.lax.dynamic_index_in_dim(buffer, index, axis=2, keepdims=False)
    new = jnp.where(children.exists, known[name], old).astype(buffer.dtype)
    return jax.lax.dynamic_update_index_in_dim(buffer, new, index, axis=2)

  return {name: put(name, x) for name, x in state.written.items()}


@functools.partial(jax.jit, static_argnames=('allocation', 'prompts', 'pad_id'))
def _finish(state: _State, allocation, prompts: int, pad_id: int) -> Grown:
  """Completes the rows by what they share with their parents."""
  rows = sharding.row_spec(prompts)

  def of_rows(state):
    written, parents = state.written, state.rows.parents
    forked_at = state.rows.forked_at
    time = jnp.arange(written['tokens'].shape[2])
    number = jnp.arange(parents.shape[1])

    def complete(r, written):
      before = time[None] < forked_at[:, r, None]

      def inherit(x):
        of_parent = jnp.take_along_axis(x, parents[:, r, None, None], axis=1)
        return x.at[:, r].set(jnp.where(before, of_parent[:, 0], x[:, r]))

      return jax.tree.map(inherit, written)

    written = jax.lax.fori_loop(1, number.size, complete, written)
    # Numbers of rows are those among all trees of a prompt.
    trees = allocation.trees
    first = (jnp.arange(parents.shape[0]) % trees) * number.size
    parents = parents + first[:, None]
    join = lambda x: x.reshape(-1, trees * number.size, *x.shape[2:])
    written = jax.tree.map(join, written)
    written['finished'] = join(state.rows.finished[..., None])
    own = {'parents': parents, 'forked_at': forked_at}
    return written | {name: join(x[..., None]) for name, x in own.items()}

  one = P(rows[0])
  found = sharding.over_rows(of_rows, (_specs(rows),), one)(state)
  known = ('parents', 'forked_at', 'node_weights')
  return Grown(
    samples=Samples(**{k: x for k, x in found.items() if k not in known}),
    **{name: found[name] for name in known},
    nodes=state.nodes.sum(),
    row_steps=state.row_steps.sum(),
  )
