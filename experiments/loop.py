"""Runs the phases of a run in a folder: trains, records, saves, evaluates.

The scripts `experiments.train`, `sft`, `preference`, `rest_em` and
`reward_model` differ in the main phase, which follows the warm start.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build, stored_runs
from experiments.offline import WarmStart
from experiments.schedule import (
  MakePhase,
  Result,
  Schedule,
  describe,
  failure_messages,
  to_samples,
)
from jaxrl_llm import processes, runs, sharding, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.signals import StopRequested

_MAX_SKIPPED = 3
_MAX_UNSCORED = 3
# Seconds that a failing process waits for the others to fail as well.
_FAIL_TOGETHER = 10.0


class Run:
  """A run: its parts, its progress and its records.

  Args:
    config: the whole configuration.
    folder: `runs.folder.RunFolder`.
    stop: polled stop signal; None if the run is never asked to stop.
    files: exit stack that closes the run's files.
    make_phase: the script's `MakePhase`.
    silent: print and record nothing, for `advance`.

  Attributes:
    schedule: schedule and progress.
    state: the current `TrainState`.
  """

  def __init__(
    self, config, folder, stop, files, make_phase: MakePhase, silent=False
  ):
    self._config = config
    self._silent = silent
    self._folder = folder.path
    self._stop = stop
    self._reported = set()
    self._compiled = runs.Meter()
    self._key = jax.random.key(config.seed)
    model = build.model(config.model, config.seed)
    # Only the state holds the parameters.
    self._model = model._replace(params=None)
    task = build.dataset(config, self._model.tokenizer)
    self._warm = WarmStart(config, self._model, task.demonstrations)
    self._main = make_phase(config, self._model, task, self._key, self._folder)
    warm = config.warm_start.steps
    self.schedule = Schedule(
      warm, warm + config.steps, config.tokens, self._main.cycle
    )
    # Computed before training: some data has no fingerprint.
    self._prompts = self._fingerprint()
    self._keep = files.enter_context(
      Checkpoints(
        self._folder / 'checkpoints',
        config.checkpoints.keep_latest,
        config.checkpoints.keep_best,
      )
    )
    self._reference = files.enter_context(
      Checkpoints(self._folder / 'reference', keep_latest=1, keep_best=0)
    )
    # False if this step's evaluation is due but failed or was stopped.
    self._evaluated = bool(warm)
    self._score = None  # of the evaluation at this step, if any
    # True if this step's record is written, and if a checkpoint holds the step.
    self._recorded = self._saved = False
    self._unscored = 0  # steps in a row without any score
    self._lines = []  # about how the run was restored
    restored = self._restore(model.params)
    if not (restored or silent):
      folder.refuse_loss()
    self._metrics = self._samples = self._progress = runs.Silent()
    self._watch = runs.Silent()
    if processes.is_main() and not silent:
      self._open_records(files, self.schedule.step if restored else None)
    if restored:
      self._lines.append(
        f'resumed at step {self.schedule.step} of {self.schedule.total}'
      )
    elif folder.resuming:
      self._lines.append('no step is saved: the run starts from its beginning')
    lines = describe(self._model, self.state, self._main, task)
    self._progress.print(*lines, *self._lines)

  def _open_records(self, files, written: int | None) -> None:
    """Opens records and displays; keeps existing records up to a step."""
    self._metrics = files.enter_context(
      runs.MetricsWriter(self._folder, written)
    )
    records = runs.read_metrics(self._folder / 'metrics.jsonl')
    steps = range(self.schedule.first + 1, self.schedule.step + self._evaluated)
    earlier = [record for record in records if record['step'] in steps]
    self._watch = runs.Watch(self._folder, earlier)
    self._samples = files.enter_context(
      runs.SampleLog(self._folder, written, self._evaluated)
    )
    self._progress = files.enter_context(
      runs.Progress(self.schedule.total, self.schedule.step)
    )

  def train(self) -> None:
    """Runs the remaining steps; also saves if it is interrupted."""
    try:
      if not self._evaluated:
        self._repeat_evaluation()
      while not self.schedule.ended:
        self._stop.check()
        self._one_step()
        self._save_if_due()
    except (UserError, StopRequested):
      self._save_the_rest()
      raise
    self._keep.wait()

  def _save_if_due(self) -> None:
    """Saves if due; repeats a failed save once: a clock may have jumped."""
    try:
      if self.schedule.checkpoint_is_due(self._config.checkpoints.every):
        self._save()
      self._keep.poll()
    except UserError as error:
      if processes.count() > 1:
        raise
      self._progress.print(f'{error}\nthe state is saved again')
      self._save()
      self._keep.wait()

  def _save_the_rest(self) -> None:
    """Saves unsaved progress of an interrupted run.

    Raises:
      UserError: it could not be saved.
    """
    failed = None
    try:
      self._keep.wait()
    except UserError as error:
      # The files of that save are removed: a new save may have enough space.
      failed = error
    # A step without its record is not saved: a resumed run repeats it.
    unsaved = self._recorded and (failed or not self._saved)
    # One process cannot save alone, and the others may not have failed.
    if unsaved and processes.all_come('the end', _FAIL_TOGETHER):
      self._save()
      self._keep.wait()
    elif failed:
      raise failed

  def finish(self) -> None:
    """Exports the model; shows and writes the results.

    Raises:
      StopRequested: a stop was requested before this began; a resumed run
        finishes.
    """
    self._stop.check()
    exported = self._main.finish(self.state.trainable, self._folder)
    if not processes.is_main():
      return
    records = runs.read_metrics(self._folder / 'metrics.jsonl')
    stored_runs.plot(
      self._folder / 'curve.png',
      records,
      self._main.curves,
      self.schedule.first,
    )
    before, after = stored_runs.before_after(
      self._folder, self.schedule.first, self.schedule.step
    )
    written = ['curve.png', *exported]
    if before or after:
      self._samples.write_html(self._folder.name, before, after)
      self._progress.print(runs.before_after_table(before, after))
      written.insert(1, 'samples.html')
    print('\n'.join(stored_runs.changes(records)))
    print(f'{self._folder}: {", ".join(written)}')

  def advance(self) -> Result:
    """Takes one step of the current phase without recording it.

    A run that is only advanced, never evaluated or saved, computes the same
    states as one that trains.
    """
    schedule = self.schedule
    if schedule.in_warm_start:
      result = self._warm.step(self.state, schedule.step)
    else:
      number = schedule.step - schedule.first
      if not number:
        self._begin_main()
      result = self._main.step(self.state, number, self._stop)
    self.state, self._saved, self._recorded = result.state, False, False
    schedule.advance(result.tokens)
    return result

  def _one_step(self) -> None:
    """Takes one step and records it."""
    schedule, result = self.schedule, self.advance()
    shown = []
    if result.responses is not None:
      shown = to_samples(
        result.responses,
        schedule.step,
        result.advantages,
        self._config.log.samples,
      )
    self._report(result.failures)
    self._samples.write(shown)
    self._score = None
    self._record(result.metrics, result.timings)
    if shown and self._score is not None:
      title = f'Step {schedule.step}'
      self._progress.print(runs.sample_table(shown, title=title))
      self._samples.write_html(self._folder.name)
    self._check(result)

  def _check(self, result: Result) -> None:
    """Ends a run that learns nothing; keeps a batch that is not finite."""
    step = f'up to step {self.schedule.step}'
    if result.metrics.get('skipped', 0) >= _MAX_SKIPPED:
      advice = 'inspect the training data'
      if result.responses is not None:
        path = self._folder / 'nonfinite_batch.npz'
        stored_runs.write_batch(path, result.responses, result.advantages)
        advice = f'inspect the batch in {path}'
      raise UserError(
        f'{int(result.metrics["skipped"])} updates in a row were not finite, '
        f'{step}; parameters unchanged\n--resume --allow_change='
        f'optimizer.learning_rate with a lower one, or {advice}'
      )
    if result.responses is None:
      return
    scored = result.responses.scores.valid.any()
    self._unscored = 0 if scored else self._unscored + 1
    if self._unscored >= _MAX_UNSCORED:
      raise UserError(
        f'no response had a score in {self._unscored} steps in a row, {step}: '
        'nothing was learned\nread the first failure above, fix the reward, '
        'then --resume'
      )

  def _report(self, failures) -> None:
    """Prints the kinds of failed rewards that were not reported before."""
    when = f'at step {self.schedule.step}'
    self._progress.print(*failure_messages(failures, when, self._reported))

  def _begin_main(self) -> None:
    """Sets the initial state and the reference of the main phase."""
    if self.schedule.first:
      # The new state has another structure.  If the save at the end of the
      # warm start failed, it must not be repeated with this state.
      self._keep.wait()
      self.state = self._main.begin(self.state.trainable['policy'])
    if self._main.keeps_reference:
      policy = self.state.trainable['policy']
      # A copy, since updates reuse the memory of the parameters they change.
      self._main.reference = jax.tree.map(jnp.copy, policy)
      if not self._silent:
        self._reference.save(self.schedule.first, self._main.reference, {})
        self._reference.wait()
    self._progress.print(*self._main.start(self.state))

  def _record(self, metrics: dict, timings: dict, again: bool = False) -> None:
    """Evaluates if due, and writes the step's record.

    Args:
      metrics, timings: of the step.
      again: replaces a record without an evaluation.
    """
    due = self._config.evaluation
    self._evaluated = not self.schedule.evaluation_is_due(
      due.every, due.every_tokens
    )
    try:
      if not self._evaluated:
        start = time.perf_counter()
        evaluation = self._main.evaluate(
          self.state.trainable, self.schedule.step, self._stop
        )
        self._report(evaluation.failures)
        self._samples.write(evaluation.samples)
        metrics = metrics | evaluation.metrics
        timings = timings | {'evaluation_time': time.perf_counter() - start}
        self._score = metrics[next(iter(self._main.curves))]
        self._evaluated = True
    finally:
      # If the evaluation failed or was stopped, a resumed run repeats it.
      self._write(metrics, timings, again)

  def _write(self, metrics: dict, timings: dict, again: bool) -> None:
    """Writes the record of the current step."""
    step = self.schedule.step
    metrics = metrics | {'num_tokens': self.schedule.tokens}
    compiled = self._compiled.take()
    timings = timings | {
      'compile_time': compiled.seconds,
      'compiled_programs': compiled.programs,
    }
    self._metrics.write(step, metrics, timings, again)
    self._recorded = step > 0
    if step > self.schedule.first:
      plain = {name: np.asarray(x).item() for name, x in metrics.items()}
      self._progress.print(*self._watch.add({'step': step, **plain}))
    shown = ('warm_start/loss', 'loss', 'reward', *self._main.curves)
    if self._config.tokens:
      shown += ('num_tokens',)
    numbers = {name: metrics[name] for name in shown if name in metrics}
    self._progress.update(step, **numbers)

  def _repeat_evaluation(self) -> None:
    """Evaluates a step whose record lacks it, or the initial model."""
    if not self.schedule.step:
      self._record({}, {})
      return
    metrics, timings = self._metrics.last()
    for name in [n for n in metrics if n.startswith('eval/')] + ['num_tokens']:
      metrics.pop(name, None)
    self._record(metrics, timings, again=True)
    self._save()

  def _initial_state(self, params) -> training.TrainState:
    if not self.schedule.first:
      return self._main.begin(params)
    return build.init_state(params, self._warm.optimizer, self._main.estimator)

  def _template(self, params, step: int) -> dict:
    """Returns the shapes in a checkpoint, so that memory holds one state."""
    first = self.schedule.first
    if step > first or not first:
      state = self._main.shapes(params)
    else:
      state = jax.eval_shape(self._initial_state, params)
      state = sharding.with_shardings(state)
    return self._tree(state)

  def _tree(self, state) -> dict:
    """Returns the content of a checkpoint, for a state or its shapes."""
    return {'state': state, 'key': jax.random.key_data(self._key)}

  def _fingerprint(self) -> dict:
    fingerprint = self._main.fingerprint()
    if self.schedule.first:
      fingerprint['warm_start'] = self._warm.source.fingerprint()
    return fingerprint

  def _save(self) -> None:
    self._metrics.sync()
    self._samples.sync()
    self._keep.save(
      self.schedule.step,
      self._tree(self.state),
      {
        'tokens': self.schedule.tokens,
        'tokens_before': self.schedule.tokens_before,
        'main': self._main.save(),
        'prompts': self._prompts,
        'evaluated': self._evaluated,
        'score': self._score,
      },
      self._score,
    )
    self._saved = True

  def _restore(self, params) -> bool:
    """Restores the newest checkpoint that verifies, or initialises."""
    if not self._keep.steps():
      self.state = self._initial_state(params)
      return False
    template = functools.partial(self._template, params)
    schedule = self.schedule
    schedule.step, tree, metadata = self._keep.restore(
      template, self._recorded_step()
    )
    stored, now = metadata['prompts'], self._prompts.copy()
    if schedule.step <= schedule.first:
      # The main phase has not used its training prompts yet.
      now.pop('training', None)
    if any(stored.get(name) != now[name] for name in now):
      phase = next(name for name in now if stored.get(name) != now[name])
      differ = [k for k in now[phase] if stored[phase].get(k) != now[phase][k]]
      raise UserError(
        f'the {phase} prompts are not those of step {schedule.step}: '
        f'{", ".join(differ)} changed\nrestore the data and the tokenizer, or '
        'start in another --workdir'
      )
    self.state = tree['state']
    self._key = jax.random.wrap_key_data(tree['key'])
    self._main.key = self._key
    schedule.tokens = metadata['tokens']
    schedule.tokens_before = metadata['tokens_before']
    self._evaluated, self._score = metadata['evaluated'], metadata['score']
    # A run evaluates at its end: without a score it continued past the end.
    unscored = self._evaluated and self._score is None
    if schedule.ended and (unscored or schedule.overran):
      raise UserError(
        f'the run has done {schedule.step - schedule.first} steps of RL and '
        f'generated {schedule.tokens} tokens, more than configured\n'
        'raise config.steps or config.tokens, whichever is too low'
      )
    self._main.load(metadata['main'])
    if schedule.step > schedule.first and self._main.keeps_reference:
      self._main.reference = self._restore_reference()
    self._saved = self._recorded = True
    return True

  def _recorded_step(self) -> int | None:
    """Returns the newest checkpoint whose steps are recorded; None for all."""
    path = self._folder / 'metrics.jsonl'
    steps = self._keep.steps()
    recorded = processes.on_main(lambda: runs.last_step(path), 'the records')
    older = [step for step in steps if step <= recorded]
    if self._silent or steps[-1] <= recorded or not older:
      return None
    self._lines.append(
      f'{path} has no record of step {recorded + 1}: the run continues from '
      f'checkpoint {older[-1]}, not {steps[-1]}'
    )
    return older[-1]

  def _restore_reference(self):
    """Returns the policy at the start of the main phase, verified."""
    restored = self._reference.restore(self.state.trainable['policy'])
    if restored is None:
      raise UserError(
        f'{self._reference.folder} has no reference policy\n'
        'restore the folder from a copy, or start in another --workdir'
      )
    return restored[1]
