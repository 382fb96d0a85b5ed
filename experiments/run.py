"""Starts or resumes a run in a folder, on a mesh of devices."""

import contextlib
import pathlib
import signal
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import build, checks, cli, schedule, stored_runs, usage
from experiments.loop import Run
from experiments.offline import WarmStart
from experiments.schedule import MakePhase, Script
from jaxrl_llm import processes, sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import interruptible
from jaxrl_llm.runs.folder import RunFolder, open_run
from jaxrl_llm.runs.progress import say
from jaxrl_llm.signals import StopRequested, StopSignal

# Fields that may differ when a run is resumed.
_MUTABLE = frozenset({'steps', 'tokens', 'mesh', 'checkpoints', 'log.samples'})
_RECORDS = ('checkpoints', 'metrics.jsonl', 'timings.jsonl', 'samples.jsonl')


def _mutable(config) -> frozenset[str]:
  """Returns fields that may differ; a decay depends on the last step."""
  decays = {config.optimizer.decay, config.critic.optimizer.decay}
  return _MUTABLE if decays == {'constant'} else _MUTABLE - {'steps'}


def train(
  script: Script,
  config,
  workdir,
  resume: bool = False,
  allow_change: Sequence[str] = (),
) -> int:
  """Trains in a folder.

  Args:
    script: the script that trains.
    config: configuration with the fields of `configs.base`.
    workdir: the run's folder.
    resume: continue the run in the folder.
    allow_change: further fields that may differ from the folder's.

  Returns:
    The exit status: 0, or 128 + the number of the signal that stopped it.

  Raises:
    UserError: for every error that the user can fix.
  """
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  script.check(config)
  try:
    with contextlib.ExitStack() as files:
      files.enter_context(_mesh(config))
      return _train(script, config, workdir, resume, allow_change, files)
  except KeyboardInterrupt:
    say('interrupted: --resume continues from the last checkpoint')
    processes.fail(128 + signal.SIGINT)
    return 128 + signal.SIGINT


def _known(config, fields: Sequence[str], resume: bool) -> frozenset[str]:
  """Returns the names of fields; raises UserError for an unknown one."""
  if fields and not resume:
    raise UserError('--allow_change is for --resume: a new run sets any field')
  known = {name for name, _ in usage.fields(config)}
  for field in fields:
    if field not in known:
      raise UserError(
        f'--allow_change={field}: the configuration has no such field\n'
        'name it as in config.json, such as optimizer.learning_rate'
      )
  return frozenset(fields)


def _mesh(config):
  """Returns the context of the mesh in a configuration."""
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def dry_run(script: Script, config) -> int:
  """Prints the configuration and a summary; neither trains nor writes.

  Args:
    script: the script that would train.
    config: configuration with the fields of `configs.base`.

  Returns:
    The exit status, 0.

  Raises:
    UserError: as in `train` before its first step.
  """
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  script.check(config)
  with _mesh(config):
    lines = _plan(config, script.phase)
  if processes.is_main():
    values = usage.values(config)
    print('\n'.join([*values, '', *lines, *_counts(config)]))
  return 0


def _plan(config, make_phase: MakePhase) -> list[str]:
  """Describes a run before it starts, from the shapes of its parameters."""
  model = build.outline(config.model)
  task = build.dataset(config, model.tokenizer)
  WarmStart(config, model, task.demonstrations)  # for its checks
  key = jax.random.key(config.seed)
  main = make_phase(config, model._replace(params=None), task, key, '')
  return schedule.describe(model, main.shapes(model.params), main, task)


def _counts(config) -> list[str]:
  """Describes the numbers of steps, updates and tokens, a line each."""
  rollout, warm = config.rollout, config.warm_start
  steps = f'training: {config.steps:,} steps'
  if config.tokens:
    steps += f' or {config.tokens:,} generated tokens'
  if checks.script(config.algorithm.name) == 'train':
    updates = config.training.epochs * config.training.minibatches
    steps += (
      f', each of {rollout.prompts:,} prompts x {rollout.samples:,} responses '
      f'and {updates:,} update(s)'
    )
  elif not config.rounds.sampling:
    steps += f', each an update on {config.rounds.batch:,}'
  return [
    f'warm start: {warm.steps:,} steps, each an update on {warm.batch:,}',
    steps,
    f'at most {config.prompts.max_tokens:,} tokens per prompt and '
    f'{rollout.max_tokens:,} per response',
  ]


def _train(
  script: Script,
  config,
  workdir,
  resume,
  allow_change,
  files: contextlib.ExitStack,
) -> int:
  folder = files.enter_context(
    open_run(
      workdir,
      resume,
      config.to_dict(),
      _mutable(config) | _known(config, allow_change, resume),
      build.code_files(config),
    )
  )
  if processes.is_main():
    for note in folder.notes:
      say(f'warning: {note}')
  records = processes.on_main(
    lambda: [name for name in _RECORDS if (folder.path / name).exists()],
    'records of the run folder',
  )
  if records and not folder.resuming:
    _leave_unused(folder)
    raise UserError(
      f'{folder.path} holds {", ".join(records)} but no config.json\n'
      'choose another --workdir, or restore config.json and pass --resume'
    )
  stop = files.enter_context(StopSignal())
  files.enter_context(interruptible.checked(stop.check_alone))
  try:
    run = Run(config, folder, stop, files, script.phase)
  except (UserError, StopRequested) as error:
    # Nothing has started: the corrected configuration may use the folder.
    if not folder.resuming:
      _leave_unused(folder)
    if isinstance(error, UserError):
      raise
    return _stopped(error, 'before it began: repeat the command')
  folder.describe(run.schedule.step)
  try:
    run.train()
    run.finish()
  except StopRequested as request:
    step = run.schedule.step
    where = f'after step {step}; everything is saved: continue with --resume'
    return _stopped(request, where)
  return 0


def _stopped(request: StopRequested, where: str) -> int:
  """Reports where a signal stopped the run; returns the exit status."""
  if processes.is_main():
    say(f'stopped by {request} {where}')
  return 128 + signal.Signals[str(request)]


def _leave_unused(folder: RunFolder) -> None:
  """Removes the file that marks the folder as a run."""
  if processes.is_main():
    (folder.path / 'config.json').unlink()


def define_flags() -> None:
  """Defines the flags of a script that trains."""
  flags.DEFINE_string('workdir', None, 'Folder of the run.')
  flags.DEFINE_bool('resume', False, 'Continue the run in the folder.')
  cli.define_trust_flag()
  flags.DEFINE_bool(
    'dry_run', False, 'Print configuration and counts, then exit.'
  )
  flags.DEFINE_list(
    'allow_change', [], 'Fields that --resume may change, besides steps.'
  )
  cli.define_process_flags()
  cli.define_config_flag()


def _config() -> ConfigDict:
  """Returns the user's configuration, or that of the folder to resume."""
  values = flags.FLAGS
  if values['config'].present or not values.resume or values.workdir is None:
    return cli.config()
  return stored_runs.read_config(
    values.workdir, () if values.trust_code else build.CODE
  )


def main(script: Script) -> int:
  """Reads the flags, joins the other processes and trains."""
  config = _config()
  cli.join_processes()
  if flags.FLAGS.dry_run:
    return dry_run(script, config)
  workdir = flags.FLAGS.workdir
  if workdir is None:
    workdir = pathlib.Path('runs') / cli.config_name()
  values = flags.FLAGS
  return train(script, config, workdir, values.resume, values.allow_change)
