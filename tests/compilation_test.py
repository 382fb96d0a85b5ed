"""What a process compiles, and that a steady run compiles nothing."""

import threading

import jax
import jax.numpy as jnp
import pytest
import scripts
import steps

from jaxrl_llm.runs import Meter, read_metrics


def test_a_program_counts_once():
  x, y = jnp.ones(3), jnp.ones(5)
  double = jax.jit(lambda x: x * 2.0)
  meter = Meter()
  assert meter.take() == (0, 0.0)
  double(x)
  found = meter.take()
  assert found.programs == 1 and found.seconds > 0
  double(x)
  assert meter.take().programs == 0
  double(y)
  jnp.flip(jnp.sinh(x))  # Operations outside of jit are programs, too.
  assert meter.take().programs == 3


def test_meters_are_independent_and_hear_all_threads():
  early = Meter()
  jax.jit(lambda x: x - 2.0)(3.0)
  before, late = early.take().programs, Meter()
  thread = threading.Thread(target=jax.jit(lambda x: x - 3.0), args=(3.0,))
  thread.start()
  thread.join()
  assert before == 1
  assert early.take() == late.take() and late.take().programs == 0


@pytest.mark.slow
def test_a_run_compiles_at_its_beginnings_alone():
  """Warm start, first checkpoint, first evaluation, first step of RL."""
  records = read_metrics(scripts.undisturbed() / 'timings.jsonl')
  found = [record['compiled_programs'] for record in records]
  assert len(found) == scripts.TOTAL
  warm, checkpoint = scripts.WARM, scripts.EVERY
  # A record has what came after the one before: the checkpoint's is the next.
  beginnings = {0, checkpoint, warm - 1, warm}
  assert {i for i, programs in enumerate(found) if programs} <= beginnings
  assert found[0] and found[warm]
  assert (records[0]['compile_time'] > 0) and not records[1]['compile_time']


# With prompts of one length `reinforcement_test` asserts it, of TRePO and PPO.
@pytest.mark.slow
@pytest.mark.parametrize(
  'algorithm',
  [dict(name='trepo', count=2, samples=2), dict(name='ppo')],
  ids=lambda algorithm: algorithm['name'],
)
def test_a_repeated_step_compiles_nothing(algorithm):
  """Prompts differ in length, branches in their places."""
  config = scripts.tiny_config()
  config.algorithm = algorithm
  config.task.update(train=64, held_out=8, operations=(1, 3))
  config.rollout.update(prompts=2, samples=2, max_tokens=6)
  pay = lambda completions: [len(text) for text in completions]
  rl, state, _ = steps.begin(config, pay)
  meter, lengths, programs = Meter(), set(), []
  for step in range(4):
    result = rl.step(state, step)
    state = result.state
    programs.append(meter.take().programs)
    lengths |= set(jax.device_get(result.responses.prompts.lengths).tolist())
  assert len(lengths) > 1 and programs[0] > 5
  assert programs[1:] == [0, 0, 0]
