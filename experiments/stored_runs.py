"""What a run leaves in its folder: read, also while it goes on, and shown."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments import build, checks
from jaxrl_llm import processes, rollouts, runs, sharding
from jaxrl_llm.atomic import write_atomically
from jaxrl_llm.errors import UserError
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.runs.checkpoints import Checkpoints


class Trained(NamedTuple):
  """A checkpoint of a run.

  Attributes:
    config: the run's configuration.
    model: the model with the checkpoint's parameters.
    step: steps done, warm start included.
  """

  config: ConfigDict
  model: build.Model
  step: int


def read_config(workdir, untrusted: Sequence[str] = ()) -> ConfigDict:
  """The configuration that a run stored, locked and checked field by field.

  Args:
    workdir: the run's folder.
    untrusted: sections of `build.CODE` whose functions the caller will execute
      without the user's consent to the folder's code: a user's function that is
      named there is refused.

  Raises:
    UserError: the folder holds no run, its configuration was damaged, or an
      untrusted section names code.
  """
  path = pathlib.Path(workdir) / 'config.json'
  try:
    stored = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(stored, dict):
      raise UserError('it is not a JSON object')
    config = ConfigDict(stored).lock()
    checks.check_fields(config)
    _refuse_code(build.code_names(config, untrusted))
  except FileNotFoundError as error:
    raise UserError(
      f'{workdir} holds no run: {path.absolute()} is missing\n'
      'name the folder of a run, as runs/quickstart after the quickstart'
    ) from error
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {error}') from error
  return config


def _refuse_code(names: Mapping[str, str]) -> None:
  if names:
    shown = ', '.join(f'{field} is {name!r}' for field, name in names.items())
    raise UserError(
      f'{shown}: code that this command would execute\n'
      'read it, then add --trust_code'
    )


def load(
  workdir, step: str = 'newest', untrusted: Sequence[str] = ()
) -> Trained:
  """The model of a run's checkpoint, verified.

  Args:
    workdir: the run's folder, in which nothing is changed.
    step: 'newest', 'best' (highest held-out reward) or a number.
    untrusted: as in `read_config`; loading itself executes no code.

  Raises:
    UserError: no run, no such checkpoint, none that verifies, or code that is
      not trusted.
  """
  config = read_config(workdir, untrusted)
  folder = pathlib.Path(workdir) / 'checkpoints'
  with Checkpoints(folder, read_only=True) as checkpoints:
    if not checkpoints.steps():
      raise UserError(
        f'{workdir} has no checkpoint yet\n'
        f'config.checkpoints.every is {config.checkpoints.every} steps'
      )
    number = _step_number(checkpoints, step)
    model = build.outline(config.model)
    # The policy alone: an algorithm in a user's file, which may ask for a
    # critic, is not executed.
    template = {'state': {'trainable': {'policy': model.params}}}
    number, tree, _ = checkpoints.restore(template, number, part=True)
  params = tree['state']['trainable']['policy']
  return Trained(config, model._replace(params=params), number)


def export(model: build.Model, path) -> None:
  """Writes a folder that `transformers` opens, and reads it back.

  Raises:
    UserError: the folder holds something else, cannot be written, or does not
      read back: each tensor bit for bit, the tokenizer token for token.
  """
  folders.save(
    path,
    model.config,
    model.params,
    tokenizer=model.tokenizer,
    source=model.source,
  )
  tokenizer = folders.load_tokenizer(path)
  if tokenizer.get_vocab() != model.tokenizer.get_vocab():
    raise UserError(
      f'{path} does not read back as it was written: the tokenizer differs\n'
      'check the disk, and export again'
    )


def changes(records: list[dict]) -> list[str]:
  """A line for each number of the last evaluation, beside the first."""
  evaluated = [r for r in records if any(n.startswith('eval/') for n in r)]
  first, last = evaluated[0], evaluated[-1]
  lines = []
  for name in last:
    if name.startswith('eval/'):
      # The KL to the reference is not measured where they are the same.
      start = f'{first[name]:8.4f}' if name in first else ' ' * 8
      lines.append(f'{name:34} {start}  →  {last[name]:8.4f}')
  return lines


def write_batch(path, responses: rollouts.Responses, advantages) -> None:
  """Keeps a batch for whoever has to find out what is wrong with it.

  Args:
    path: of an npz file, which holds `prompts` [P, S] and their `lengths` [P],
      `tokens`, `mask` and the sampler's `log_probs` [P, G, T], and of each
      response, [P, G], `rewards`, `valid` (whether it has one), `advantages`
      and the parts of its reward, `rewards/NAME`, NaN where there is none.
    responses: P prompts, G responses each.
    advantages: [P, G].

  Raises:
    UserError: the disk is full or the folder cannot be written.
  """
  prompts, samples = sharding.to_host((responses.prompts, responses.samples))
  scores, shape = responses.scores, advantages.shape
  if not processes.is_main():
    return
  parts = {
    f'rewards/{name}': found.reshape(shape)
    for name, found in scores.parts.items()
  }
  memory = io.BytesIO()
  np.savez(
    memory,
    prompts=prompts.tokens,
    lengths=prompts.lengths,
    tokens=samples.tokens,
    mask=samples.mask,
    log_probs=samples.log_probs,
    rewards=scores.total.reshape(shape),
    valid=scores.valid.reshape(shape),
    advantages=advantages,
    **parts,
  )
  try:
    write_atomically(path, memory.getvalue())
  except OSError as error:
    raise UserError(
      f'{path}, a batch to look at, cannot be written: {error.strerror}\n'
      'make room, then resume or replay'
    ) from error


def plot(
  path, records: list[dict], curves: Mapping[str, str], first: int
) -> None:
  """Draws the training reward and held-out numbers against the step.

  Of a sum of rewards each held-out part has a panel of its own, those of weight
  0 too: there a proxy rises while what it stands for does not.

  Args:
    path: of the figure.
    records: of the run.
    curves: of the main phase, metric → label.
    first: steps of the warm start.
  """
  series = {}
  rewards = [(r['step'], r['reward']) for r in records if 'reward' in r]
  if rewards:
    steps, values = map(np.array, zip(*rewards, strict=True))
    width = max(len(values) // 20, 1)
    kernel = np.ones(width) / width
    smooth = np.convolve(values, kernel, mode='valid')
    label = f'training reward (mean of {width} steps)'
    series[label] = (steps[width - 1 :], smooth)
  for name, label in curves.items():
    series[label] = _points(records, name)
  parts = [
    name
    for name in dict.fromkeys(n for record in records for n in record)
    if name.startswith('eval/rewards/') and name.count('/') == 2
  ]
  runs.plot_curve(
    path,
    series,
    xlabel='step',
    ylabel='mean reward per response' if rewards else next(iter(series)),
    title=path.parent.name,
    marks={'the warm start ends': first} if first else None,
    below={
      f'held-out {name.rpartition("/")[2]}': _points(records, name)
      for name in (parts if len(parts) > 1 else ())
    },
  )


def _points(records: list[dict], name: str) -> tuple[list, list]:
  """Steps at which a number was recorded, and the numbers."""
  held = [record for record in records if name in record]
  return [r['step'] for r in held], [r[name] for r in held]


def _step_number(checkpoints: Checkpoints, step: str) -> int | None:
  """The step to restore; None for the newest that verifies."""
  if step == 'newest':
    return None
  if step == 'best':
    best = checkpoints.best_step()
    if best is None:
      raise UserError(
        f'no checkpoint in {checkpoints.folder} was evaluated\n'
        f'choose one of the steps {checkpoints.steps()}'
      )
    return best
  if not step.isdigit():
    raise UserError(f"--step is {step!r}: give 'newest', 'best' or a number")
  return int(step)
