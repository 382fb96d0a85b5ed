"""Duration of a GRPO step in a real training run.

    python -m benchmarks.grpo_step --vocabulary=32000

Trains for some steps with `experiments.train`, in a folder of its own: rewards
on texts, records, sample tables and progress as in every run.  A step's time is
that between two calls of the reward function: update, records, the next step's
prompts and responses.  Besides the fields of `measuring` it prints:

  rollout_seconds, update_seconds: of a step, from the run's `timings.jsonl`;
    the rest of `seconds` goes to records.
  tokens_per_second: generated tokens, in the median step.
  roofline: `rollout`, `update` and `step`: the seconds of the arithmetic at
    this machine's best, and their fraction of the measured time.
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
  model: pathlib.Path, data: pathlib.Path, dtype: str, options
) -> ConfigDict:
  """Returns the run's configuration.

  Args:
    model: a Hugging Face folder.
    data: folder with train.jsonl and held_out.jsonl.
    dtype: of matrix products.
    options: flags.
  """
  config = base.get_config()
  config.steps = options.warmup + options.rounds
  config.model.update(
    path=str(model), dtype=dtype, remat=options.remat, unroll=options.unroll
  )
  config.task = dict(
    name='jsonl',
    train=str(data / 'train.jsonl'),
    held_out=str(data / 'held_out.jsonl'),
  )
  config.prompts.max_tokens = options.prompt_tokens
  config.rewards = dict(vowels=dict(name='benchmarks.reward:vowels'))
  config.algorithm = dict(name='grpo', kl=0.0)
  config.mesh.update(data=-1, fsdp=1)
  config.rollout.update(
    prompts=options.prompts,
    samples=options.samples,
    max_tokens=options.new_tokens,
  )
  config.training.update(
    micro_prompts=options.micro_prompts, chunk=options.chunk
  )
  config.optimizer = base.optimizer(1e-5)
  # Only at the run's start and end; no step that counts waits for them.
  config.evaluation.update(every=10**6, prompts=8, batch=8)
  config.checkpoints.every = 10**6
  return config


def write_rows(folder: pathlib.Path, prompt_tokens: int) -> None:
  """Writes prompts to train on, and others to evaluate with."""
  texts = job.prompts(512, prompt_tokens)
  for name, part in (('train', texts[8:]), ('held_out', texts[:8])):
    lines = [json.dumps({'prompt': text}) + '\n' for text in part]
    (folder / f'{name}.jsonl').write_text(''.join(lines), encoding='utf-8')


def run(model: pathlib.Path, dtype: str, options) -> dict[str, list[float]]:
  """Trains, and returns the seconds of the steps that count.

  Args:
    model, dtype, options: as in `configuration`.

  Returns:
    `step`, `rollout` and `update`, each for `options.rounds` steps.
  """
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    write_rows(folder, options.prompt_tokens)
    config = configuration(model, folder, dtype, options)
    # This command prints one line to standard output.
    with contextlib.redirect_stdout(sys.stderr):
      train.train(config, folder / 'run')
    records = runs.read_metrics(folder / 'run' / 'timings.jsonl')
  counted = [record for record in records if 'rollout_time' in record]
  counted = counted[options.warmup :]
  # Evaluations call the reward too: before the first step, after the last.
  steps = reward.intervals()[-options.rounds - 1 : -1]
  return {
    'step': steps,
    'rollout': [record['rollout_time'] for record in counted],
    'update': [
      record['step_time'] - record['rollout_time'] for record in counted
    ],
  }


def main() -> None:
  """Measures as the flags specify."""
  options = flags.FLAGS
  job.use_devices()
  compilations = measuring.Compilations()
  shape = job.shape()
  times = run(job.folder(shape, options.models), shape.dtype, options)
  calls = reward.calls[-options.rounds - 2 : -1]
  fields, roofline = measuring.report(
    'grpo_step',
    times['step'],
    compilations.found(),
    shape.dtype,
    recompiled=compilations.between(calls[0], calls[-1]),
    shape=shape._asdict(),
    devices=options.devices,
    prompts=options.prompts,
    samples=options.samples,
    prompt_tokens=options.prompt_tokens,
    new_tokens=options.new_tokens,
  )
  job_size = (
    job.config(shape),
    options.prompts,
    options.samples,
    options.prompt_tokens,
    options.new_tokens,
  )
  least = {
    'rollout': roofline.seconds(*arithmetic.generation(*job_size)),
    'update': roofline.seconds(*arithmetic.update(*job_size)),
  }
  least['step'] = sum(least.values())
  medians = {name: statistics.median(times[name]) for name in least}
  tokens = options.prompts * options.samples * options.new_tokens
  fields |= {
    'rollout_seconds': measuring.summary(times['rollout']),
    'update_seconds': measuring.summary(times['update']),
    'tokens_per_second': measuring.rounded(tokens / medians['step']),
    'roofline': {
      name: measuring.beside(least[name], medians[name]) for name in least
    },
  }
  measuring.show(fields)


if __name__ == '__main__':
  job.define_flags()
  flags.DEFINE_integer('prompts', 8, 'P.', 1)
  flags.DEFINE_integer('samples', 4, 'G.', 2)
  flags.DEFINE_integer('prompt_tokens', 64, 'Tokens per prompt; even.', 2)
  flags.DEFINE_integer('new_tokens', 64, 'Tokens per response.', 1)
  flags.DEFINE_integer('micro_prompts', 4, 'Prompts at a time; 0 for all.', 0)
  flags.DEFINE_integer('chunk', 256, 'Positions with logits at one time.', 1)
  flags.DEFINE_integer('unroll', 1, 'Layers per step of their scan.', 1)
  flags.DEFINE_bool('remat', False, 'Recompute layers in the backward pass.')
  flags.DEFINE_integer('warmup', 3, 'Steps that do not count.', 2)
  flags.DEFINE_integer('rounds', 9, 'Steps that count.', 1)
  cli.run(main)
