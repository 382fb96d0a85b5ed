"""Rows, jobs and what the rows hold, without a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.sampling import scheduling

T = 9


@functools.partial(jax.jit, static_argnames='rows')
def follow(tokens, positions, lengths, rows):
  """Runs branches of known lengths, whose tokens are their numbers.

  A row holds, for each of its T slots, whose input stands there: −1 − r for
  response r, or the number of a branch.

  Args:
    tokens: [P, G, T], responses.
    positions: [P, G, N].
    lengths: [P · G · N], how many tokens each branch writes.

  Returns:
    What was written, [P · G · N, T]: 1 + how often each branch wrote its n-th
    token; faults, by name; row steps, copied rows.
  """
  prompts, samples, length = tokens.shape
  jobs = scheduling.make_jobs(tokens, positions, rows)
  flat, at = tokens.reshape(-1, length), positions.reshape(-1)
  each = positions.shape[2]
  response = jnp.arange(prompts * samples)
  source = jnp.broadcast_to(-1 - response[:, None], (len(flat), T))

  def step(readers, now, held, carry):
    written, faults = carry
    busy = now.branch < at.size
    mine = jnp.minimum(now.branch, at.size - 1)
    done = now.index - now.start
    slot = jnp.arange(T)[None]
    prefix = slot < now.start[:, None]
    own = (slot >= now.start[:, None]) & (slot < now.index[:, None])
    # The last token that it keeps, in the slot behind those before it.
    first = flat[mine // each, jnp.maximum(now.start - 1, 0)]
    found = {
      'another response': now.response != mine // each,
      'another fork': now.start != at[mine],
      'first input': (done == 0) & (now.token != first),
      'later inputs': (done > 0) & (now.token != 100 + mine),
      'prefix': (prefix & (held != -1 - now.response[:, None])).any(1),
      'own tokens': (own & (held != mine[:, None])).any(1),
    }
    place = now.response // samples
    number = jnp.arange(now.branch.size)[:, None, None]
    reads = readers[None] == number
    ours = jnp.arange(prompts)[None, :, None] == place[:, None, None]
    found['readers'] = (reads & ours).sum((1, 2)) != 1
    found['reads others'] = (reads & ~ours).any((1, 2))
    faults = {
      name: faults[name] + (fault & busy).sum() for name, fault in found.items()
    }
    number = jnp.arange(now.branch.size)
    held = held.at[number, now.index].set(mine, mode='drop')
    written = written.at[now.branch, done].add(1, mode='drop')
    ended = done + 1 >= lengths[mine]
    return 100 + mine, ended, held, (written, faults)

  names = 'another response', 'another fork', 'first input', 'later inputs'
  names += 'prefix', 'own tokens', 'readers', 'reads others'
  carry = (
    jnp.zeros((at.size, length), jnp.int32),
    {name: jnp.int32(0) for name in names},
  )
  (written, faults), steps, copies = scheduling.run(
    jobs, rows, source, step, carry
  )
  return written, faults, steps, copies


def draw(seed, prompts, samples, places):
  random = np.random.default_rng(seed)
  tokens = random.integers(0, 50, (prompts, samples, T)).astype(np.int32)
  positions = random.integers(-1, T + 2, (prompts, samples, places))
  positions = np.where(random.random(positions.shape) < 0.3, 0, positions)
  inside = (positions > 0) & (positions < T)
  lengths = random.integers(1, T, positions.shape)
  lengths = np.where(inside, np.minimum(lengths, T - positions), 0)
  return tokens, positions.astype(np.int32), lengths.ravel().astype(np.int32)


@pytest.mark.parametrize(
  'shape, rows',
  [((3, 4, 6), 5), ((3, 4, 6), 17), ((1, 1, 30), 4), ((4, 1, 1), 1)],
)
def test_every_branch_is_decoded_once_from_its_own_prefix(shape, rows):
  for seed in range(8):
    tokens, positions, lengths = draw(seed, *shape)
    written, faults, steps, _ = jax.device_get(
      follow(tokens, positions, lengths, rows)
    )
    assert not any(faults.values()), faults
    expected = np.arange(T)[None] < lengths[:, None]
    np.testing.assert_array_equal(written, expected)
    assert steps >= lengths.sum()


def test_nothing_to_do_takes_no_step():
  tokens, positions, lengths = draw(0, 2, 3, 4)
  for nowhere in (0, -2, T, T + 5):
    written, _, steps, _ = follow(
      tokens, np.full_like(positions, nowhere), 0 * lengths, 4
    )
    assert int(steps) == 0 and not np.asarray(written).any()


def test_rows_are_busy_though_lengths_differ():
  """64 responses of 3 to 9 tokens, 16 branches each: 85 % of the row steps."""
  random = np.random.default_rng(0)
  tokens = np.zeros((8, 8, T), np.int32)
  ends = random.integers(3, T + 1, (8, 8, 1))
  places = np.sort(random.integers(1, ends, (8, 8, 4)), axis=2)
  positions = np.repeat(places, 4, axis=2).astype(np.int32)
  lengths = random.integers(1, T + 1 - positions).ravel().astype(np.int32)
  written, faults, steps, copies = jax.device_get(
    follow(tokens, positions, lengths, 64)
  )
  assert not any(faults.values()), faults
  np.testing.assert_array_equal(written.sum(1), lengths)
  assert lengths.sum() / steps > 0.85
  # Far fewer than the 1,024 branches.
  assert copies < 4 * 64


def test_all_work_in_one_prompt():
  """Its rows are as many as a prompt has room for, and the rest is dropped."""
  tokens = np.zeros((8, 4, T), np.int32)
  positions = np.zeros((8, 4, 40), np.int32)
  positions[5] = 2
  lengths = np.where(positions > 0, T - 2, 0).ravel().astype(np.int32)
  written, faults, steps, _ = jax.device_get(
    follow(tokens, positions, lengths, 32)
  )
  assert not any(faults.values()), faults
  np.testing.assert_array_equal(written.sum(1), lengths)
  # 8 of 16 rows are busy: what 32 rows began with does not need them.
  assert lengths.sum() / steps == 0.5
