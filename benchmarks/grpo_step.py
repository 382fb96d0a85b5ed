"""How long a step of GRPO takes in a real training run.

    python -m benchmarks.grpo_step --vocabulary=32000

Trains for some steps with `experiments.train`, in a folder of its own: rewards
on texts, records, sample tables and progress as in every run.  The time of a
step is that between two calls of the reward function: update, records, the
next step's prompts and responses.  Beside the fields of `measuring` it prints:

  rollout_seconds, update_seconds: of a step, after the run's `timings.jsonl`;
    what the two leave of `seconds` are records.
  tokens_per_second: generated, of the median step.
  roofline: `rollout`, `update` and `step`: the seconds that the arithmetic
    takes at this machine's best, and which fraction of the time that is.
"""

import contextlib
import json
import pathlib
import statistics
import sys
import tempfile

from absl import flags
from ml_collections import ConfigDict

from benchmarks import arithmetic, job, measuring, reward
from experiments import cli, train
from experiments.configs import base
from jaxrl_llm import runs


def configuration(
  model: pathlib.Path, data: pathlib.Path, dtype: str, given
) -> ConfigDict:
  """The run's configuration.

  Args:
    model: a Hugging Face folder.
    data: folder with train.jsonl and held_out.jsonl.
    dtype: of matrix products.
    given: flags.
  """
  config = base.get_config()
  config.steps = given.warmup + given.rounds
  config.model.update(
    path=str(model), dtype=dtype, remat=given.remat, unroll=given.unroll
  )
  config.task = dict(
    name='jsonl',
    train=str(data / 'train.jsonl'),
    held_out=str(data / 'held_out.jsonl'),
  )
  config.prompts.max_tokens = given.prompt_tokens
  config.rewards = dict(vowels=dict(name='benchmarks.reward:vowels'))
  config.algorithm = dict(name='grpo', kl=0.0)
  config.mesh.update(data=-1, fsdp=1)
  config.rollout.update(
    prompts=given.prompts, samples=given.samples, max_tokens=given.new_tokens
  )
  config.training.update(micro_prompts=given.micro_prompts, chunk=given.chunk)
  config.optimizer = base.optimizer(1e-5)
  # Of the run's start and end alone; no step that counts waits for them.
  config.evaluation.update(every=10**6, prompts=8, batch=8)
  config.checkpoints.every = 10**6
  return config


def write_rows(folder: pathlib.Path, prompt_tokens: int) -> None:
  """Prompts to train on, and others to evaluate with."""
  texts = job.prompts(512, prompt_tokens)
  for name, part in (('train', texts[8:]), ('held_out', texts[:8])):
    lines = [json.dumps({'prompt': text}) + '\n' for text in part]
    (folder / f'{name}.jsonl').write_text(''.join(lines), encoding='utf-8')


def run(model: pathlib.Path, dtype: str, given) -> dict[str, list[float]]:
  """Trains, and gives the seconds of the steps that count.

  Args:
    model, dtype, given: as for `configuration`.

  Returns:
    `step`, `rollout` and `update`, each for `given.rounds` steps.
  """
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    write_rows(folder, given.prompt_tokens)
    config = configuration(model, folder, dtype, given)
    # Of standard output this command has one line.
    with contextlib.redirect_stdout(sys.stderr):
      train.train(config, folder / 'run')
    records = runs.read_metrics(folder / 'run' / 'timings.jsonl')
  own = [record for record in records if 'rollout_time' in record]
  own = own[given.warmup :]
  # Evaluations call the reward too: before the first step, after the last.
  steps = reward.intervals()[-given.rounds - 1 : -1]
  return {
    'step': steps,
    'rollout': [record['rollout_time'] for record in own],
    'update': [record['step_time'] - record['rollout_time'] for record in own],
  }


def main() -> None:
  """Measures what the flags name."""
  given = flags.FLAGS
  job.use_devices()
  compilations = measuring.Compilations()
  shape = job.shape()
  times = run(job.folder(shape, given.models), shape.dtype, given)
  calls = reward.calls[-given.rounds - 2 : -1]
  found, roofline = measuring.report(
    'grpo_step',
    times['step'],
    compilations.found(),
    shape.dtype,
    recompiled=compilations.between(calls[0], calls[-1]),
    shape=shape._asdict(),
    devices=given.devices,
    prompts=given.prompts,
    samples=given.samples,
    prompt_tokens=given.prompt_tokens,
    new_tokens=given.new_tokens,
  )
  job_size = (
    job.config(shape),
    given.prompts,
    given.samples,
    given.prompt_tokens,
    given.new_tokens,
  )
  least = {
    'rollout': roofline.seconds(*arithmetic.generation(*job_size)),
    'update': roofline.seconds(*arithmetic.update(*job_size)),
  }
  least['step'] = sum(least.values())
  medians = {name: statistics.median(times[name]) for name in least}
  tokens = given.prompts * given.samples * given.new_tokens
  found |= {
    'rollout_seconds': measuring.summary(times['rollout']),
    'update_seconds': measuring.summary(times['update']),
    'tokens_per_second': measuring.rounded(tokens / medians['step']),
    'roofline': {
      name: measuring.beside(least[name], medians[name]) for name in least
    },
  }
  measuring.show(found)


if __name__ == '__main__':
  job.define_flags()
  flags.DEFINE_integer('prompts', 8, 'P.', 1)
  flags.DEFINE_integer('samples', 4, 'G.', 2)
  flags.DEFINE_integer('prompt_tokens', 64, 'Of each prompt; even.', 2)
  flags.DEFINE_integer('new_tokens', 64, 'Of each response.', 1)
  flags.DEFINE_integer('micro_prompts', 4, 'At one time; 0 for all.', 0)
  flags.DEFINE_integer('chunk', 256, 'Positions whose logits exist.', 1)
  flags.DEFINE_integer('unroll', 1, 'Layers per step of their scan.', 1)
  flags.DEFINE_bool('remat', False, 'Computes each layer again going back.')
  flags.DEFINE_integer('warmup', 3, 'Steps that do not count.', 2)
  flags.DEFINE_integer('rounds', 9, 'Steps that do.', 1)
  cli.run(main)
