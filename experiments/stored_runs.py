"""Reads what a run leaves in its folder, also meanwhile, and shows it."""

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
from jaxrl_llm.runs.progress import visible


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
  """Returns a run's stored configuration, locked and checked field by field.

  Args:
    workdir: the run's folder.
    untrusted: sections of `build.CODE` whose functions the caller will execute
      without the user's consent: user functions named there are refused.

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
    if names := build.code_names(config, untrusted):
      shown = ', '.join(f'{name} is {code!r}' for name, code in names.items())
      raise UserError(
        f'{shown}: code that this command would execute\n'
        'read it, then add --trust_code'
      )
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


def load(
  workdir, step: str = 'newest', untrusted: Sequence[str] = ()
) -> Trained:
  """Loads the verified model of a run's checkpoint.

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
    # The policy alone: a user's algorithm, which may need a critic, is not
    # executed.
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


def before_after(
  folder: pathlib.Path, first: int, last: int
) -> tuple[list[runs.Sample], list[runs.Sample]]:
  """Returns held-out samples of two steps of a run."""
  samples = runs.read_samples(folder / 'samples.jsonl')
  kept = [sample for sample in samples if sample.advantage is None]
  return tuple(
    [sample for sample in kept if sample.step == step] for step in (first, last)
  )


def changes(records: list[dict]) -> list[str]:
  """Returns a line per number of the last evaluation, beside the first's."""
  evaluated = [r for r in records if any(n.startswith('eval/') for n in r)]
  first, last = evaluated[0], evaluated[-1]
  lines = []
  for name in filter(lambda name: name.startswith('eval/'), last):
    # The KL to the reference is not measured where they are the same.
    start = f'{first[name]:8.4f}' if name in first else ' ' * 8
    lines.append(f'{visible(name):34} {start}  →  {last[name]:8.4f}')
  return lines


def write_batch(path, responses: rollouts.Responses, advantages) -> None:
  """Keeps a batch for debugging.

  Args:
    path: of an npz file, which holds `prompts` [P, S] and their `lengths` [P],
      `tokens`, `mask` and the sampler's `log_probs` [P, G, T], and of each
      response, [P, G], `rewards`, `valid` (False without a reward),
      `advantages` and the parts of its reward, `rewards/NAME`, NaN where there
      is none.
    responses: P prompts, G responses each.
    advantages: [P, G].

  Raises:
    UserError: the disk is full or the folder cannot be written.
  """
  prompts, samples = sharding.to_host((responses.prompts, responses.samples))
  scores = responses.scores
  if not processes.is_main():
    return
  per_response = {f'rewards/{name}': x for name, x in scores.parts.items()}
  per_response |= {'rewards': scores.total, 'valid': scores.valid}
  memory = io.BytesIO()
  np.savez(
    memory,
    prompts=prompts.tokens,
    lengths=prompts.lengths,
    tokens=samples.tokens,
    mask=samples.mask,
    log_probs=samples.log_probs,
    advantages=advantages,
    **{n: x.reshape(advantages.shape) for n, x in per_response.items()},
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

  Each held-out part of a sum of rewards has a panel, those of weight 0 too:
  they show a proxy that rises while its purpose does not.

  Args:
    path: of the figure.
    records: of the run.
    curves: of the main phase, metric → label.
    first: steps of the warm start.
  """
  points = lambda name: [
    [record[key] for record in records if name in record]
    for key in ('step', name)
  ]
  series = {}
  steps, rewards = points('reward')
  if rewards:
    width = max(len(rewards) // 20, 1)
    smooth = np.convolve(rewards, np.ones(width) / width, mode='valid')
    label = f'training reward (mean of {width} steps)'
    series[label] = (np.array(steps[width - 1 :]), smooth)
  series |= {label: points(name) for name, label in curves.items()}
  parts = [
    name
    for name in dict.fromkeys(n for record in records for n in record)
    if name.startswith('eval/rewards/') and name.count('/') == 2
  ]
  panels = parts if len(parts) > 1 else []
  runs.plot_curve(
    path,
    series,
    xlabel='step',
    ylabel='mean reward per response' if rewards else next(iter(series)),
    title=path.parent.name,
    marks={'the warm start ends': first} if first else None,
    below={f'held-out {name.split("/")[2]}': points(name) for name in panels},
  )


def _step_number(checkpoints: Checkpoints, step: str) -> int | None:
  """Returns the step to restore; None for the newest that verifies."""
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
