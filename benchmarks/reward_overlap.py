"""Time that a step gains by waiting for its rewards last.

    python -m benchmarks.reward_overlap --workers=4 \\
      --config=experiments/configs/quickstart.py --config.algorithm.kl=0.04

A reward that takes some milliseconds per response, without computing, is
awaited in three ways: in this process, one response after another; in worker
processes, as soon as the responses exist; and in worker processes after the
device has received all its work, as in the training script.  Steps of the three
ways alternate, so that other load on the machine slows all down alike.  The
work meanwhile consists of the reference's log-probabilities, the trainer's own
where the sampler's are not exact enough, a critic's values, and branches.

Prints a line of JSON for each duration:

  milliseconds: the reward's time per response.
  here, at_once, last: seconds per step; medians over the rounds.
  here_to_last, at_once_to_last: medians of the ratios within a round.

Measured with --rounds=5 on 2 slow CPU cores under other load (a load of 7):
ratios are accurate to some 10 %.  The first columns are for the command above,
256 responses a step; the last for --workers=2,
--config.algorithm.name=trepo, --config.rollout.prompts=16 and
--config.rollout.samples=4, 64 responses and their branches.

                     grpo, 4 workers          trepo, 2 workers
  milliseconds       1      4      16         4      16
  here_to_last       1.13   1.41   2.25       1.31   1.70
  at_once_to_last    0.99   1.10   0.98       1.31   1.19

Besides sampling and update, the reference's log-probabilities are little work
to overlap, and gain nothing; branches are much.
"""

import contextlib
import json
import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import build, checks, cli, online
from jaxrl_llm import training
from jaxrl_llm.rewards import RewardPart, Workers, calling

_WAITS = """
import time

def waits(completions):
  time.sleep({seconds} * len(completions))
  return [float(len(text) % 2) for text in completions]
"""


class AwaitedAtOnce(Workers):
  """Workers whose scores are complete when `submit` returns."""

  def submit(self, *arguments):
    pending = super().submit(*arguments)
    pending.result()
    return pending


@contextlib.contextmanager
def ways(milliseconds: float, workers: int) -> Iterator[dict[str, Any]]:
  """Yields the reward function in each of the three ways, by name."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'waits.py')
    text = _WAITS.format(seconds=milliseconds / 1000.0)
    path.write_text(text, encoding='utf-8')
    name, settings = f'{path}:waits', dict(workers=workers, timeout=60.0)
    with (
      AwaitedAtOnce(name, **settings) as at_once,
      Workers(name, **settings) as last,
    ):
      here = calling.load_reward(name, {}, 'reward')
      yield {'here': here, 'at_once': at_once, 'last': last}


def measure(
  rl: online.Steps,
  state: training.TrainState,
  milliseconds: float,
  workers: int,
  rounds: int,
) -> tuple[training.TrainState, dict[str, Any]]:
  """Returns the state after all steps, and a summary of their times."""
  times = {}
  with ways(milliseconds, workers) as functions:
    for number in range(rounds + 1):  # The first one compiles.
      for name, function in functions.items():
        rl.rewards = [RewardPart('waits', function)]
        result = rl.step(state, number)
        state = jax.block_until_ready(result.state)
        times.setdefault(name, []).append(result.timings['step_time'])
  times = {name: seconds[1:] for name, seconds in times.items()}
  fields = {'benchmark': 'reward_overlap', 'milliseconds': milliseconds}
  fields |= {name: statistics.median(times[name]) for name in times}
  for name in ('here', 'at_once'):
    pairs = zip(times[name], times['last'], strict=True)
    fields[f'{name}_to_last'] = statistics.median(a / b for a, b in pairs)
  return state, fields


def main() -> None:
  """Measures as the flags specify."""
  config, values = cli.config(), flags.FLAGS
  checks.check(config)
  model = build.model(config.model, config.seed)
  data = build.dataset(config, model.tokenizer)
  rl = online.Steps(config, model, data.train, jax.random.key(0))
  rl.reference = model.params
  state = rl.begin(jax.tree.map(jnp.copy, model.params))
  for text in values.milliseconds:
    state, fields = measure(
      rl, state, float(text), values.workers, values.rounds
    )
    rounded = {
      name: round(value, 3) if isinstance(value, float) else value
      for name, value in fields.items()
    }
    print(json.dumps(rounded), flush=True)


if __name__ == '__main__':
  flags.DEFINE_integer('workers', 2, 'Number of worker processes.', 1)
  flags.DEFINE_integer('rounds', 9, 'Steps of each way.', 1)
  flags.DEFINE_list('milliseconds', ['1', '4', '16'], 'Times per response.')
  cli.define_config_flag()
  cli.run(main)
