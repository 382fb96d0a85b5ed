"""Accuracy, pass@k, maj@k and best of k of a run or a Hugging Face folder.

    python -m experiments.evaluate --workdir=runs/quickstart
    python -m experiments.evaluate --workdir=runs/quickstart --step=best \\
      --samples=16 --temperature=1 --greedy --k=1,4,16 --maj=1,4,16
    python -m experiments.evaluate --workdir=runs/mine --temperature=1 \\
      --best_of=1,4,16 --judge=preference --metric=correct
    python -m experiments.evaluate --model=FOLDER --config=FILE.py

A run is evaluated on its held-out prompts with the settings of the
configuration in its folder; flags override them.  The run may still be in
progress: nothing in its folder is changed.  A Hugging Face folder needs a
configuration for the task and the rewards.

--maj counts the votes of answers, not of texts.  The --metric also reads the
answers if it is one of `jaxrl_llm.rewards.functions.READERS`; else name one of
these, or a function of your own from a text to its answer:
--answer=mine.py:read_answer.

--best_of lets one reward, the --judge, choose among k responses; another, the
--metric, scores the choice.  A reward of weight 0 judges without being trained
on.

Where the --metric gives other scores than 0 and 1, none is right or wrong
without a --threshold: the mean score takes the place of accuracy, pass@k, maj@k
and best_of@k.

Greedy decoding needs no samples: --greedy adds its accuracy to the numbers of
sampling, at the cost of one more response per prompt.

A reward or task that a run's configuration names as file.py:function or
module:function is executed with --trust_code alone: read it first.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import build, checks, cli, schedule, stored_runs
from experiments.schedule import failure_messages
from jaxrl_llm import evaluation, naming, rollouts
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import RewardPart, functions
from jaxrl_llm.rollouts.collect import failure_counts
from jaxrl_llm.runs.progress import visible


def measure(
  config,
  model: build.Model,
  *,
  ks: Sequence[int] = (),
  majs: Sequence[int] = (),
  best_of: Sequence[int] = (),
  judge: str | None = None,
  greedy: bool = False,
  answer: str | None = None,
  metric: str | None = None,
  threshold: float | None = None,
  **changes: Any,
) -> dict[str, Any]:
  """Returns numbers of a model on a configuration's held-out prompts.

  A response is right if the reward function `metric` gives it at least
  `threshold`.  A prompt with a response that the function does not score is
  left out of accuracy, pass@k, maj@k and best_of@k, and counted as `unscored`.
  Without a threshold, if there are scores besides 0 and 1, `score` takes the
  place of these four, and greedy/score that of greedy/accuracy.

  Best of k is the response of k that the reward function `judge` scores
  highest.  best_of@k is the chance that it is right; metric_best_of@k and
  judge_best_of@k are the mean scores that the two functions give it.  Where the
  judge's rises with k and the metric's does not, the judge is over-optimised.
  A prompt with a response that the judge alone does not score is left out, and
  counted as `unjudged`.

  Args:
    config: task, prompts, rewards, response length and seed.
    model: the model.
    ks, majs, best_of: the k of pass@k (pass@1 is the accuracy), of maj@k and of
      best_of@k.
    judge: name in `config.rewards`, of any weight, 0 included.
    greedy: also decodes greedily, once per prompt, for greedy/accuracy.
    answer: reads the answers to vote on: the name of a reward of
      `functions.READERS`, or 'file.py:function'; None for `metric`'s reader.
    metric: name in `config.rewards`; None for that of greatest weight (a
      ConfigDict does not keep the order in which they were written).
    threshold: the least score of a right response; None for 1 where all scores
      are 0 or 1.
    **changes: samples, temperature, prompts or batch in place of those of
      `config.evaluation`.

  Returns:
    JSON values: the settings, the means, and each estimate with the bounds of
    its 95 % bootstrap interval over prompts.

  Raises:
    UserError: the settings conflict.
  """
  data = build.task(config, model.tokenizer)
  # The key of the evaluations during training: equal settings reproduce the
  # numbers of the run's record.
  seeds = config.seed, 4
  held = build_held_out(config, model, data.held_out, seeds, **changes)
  metric = choose_metric(held.setting.rewards, metric)
  _check_judge(held.setting.rewards, metric, judge, best_of)
  reader = _reader(answer, config.rewards[metric].name) if majs else None
  settings = held.setting.generation
  _check_samples(
    settings, greedy, {'pass': ks, 'maj': majs, 'best_of': best_of}
  )
  answers, scores, scored = _answer(held, model, 'held-out responses', metric)
  numbers, all_scores = evaluation.summary(answers), {'': scores}
  if greedy:
    setting = held.setting._replace(generation=rollouts.greedy(settings))
    once = held._replace(setting=setting)
    greedily, best, known = _answer(once, model, 'greedy responses', metric)
    numbers['greedy/unscored'] = int((~known).sum())
    for name, count in failure_counts(greedily.failures).items():
      numbers[name.replace('eval/', 'greedy/', 1)] = count
    all_scores['greedy/'] = best
  if all(np.isin(each, (0, 1)).all() for each in all_scores.values()):
    threshold = 1.0 if threshold is None else threshold
  name, right, estimates = 'score', None, {}
  if threshold is not None:
    all_scores = {k: each >= threshold for k, each in all_scores.items()}
    name, right = 'accuracy', all_scores['']
    estimates = {f'pass@{k}': evaluation.pass_at_k(right, k) for k in ks}
  means = {f'{k}{name}': x.mean(axis=1) for k, x in all_scores.items()}
  estimates = means | estimates
  if majs and right is not None:
    texts = np.array(answers.completions, object).reshape(scored.size, -1)
    votes = evaluation.votes(texts[scored], reader)
    numbers['answered'] = float((votes >= 0).mean())
    estimates |= {
      f'maj@{k}': evaluation.maj_at_k(votes, right, k) for k in majs
    }
  if best_of:
    proxy = answers.parts[judge][scored]
    numbers['unjudged'], chosen = _best_of(proxy, scores, right, best_of)
    estimates |= chosen
  return {
    'prompts': len(scored),
    'over_budget': held.encoded.dropped,
    'unscored': int((~scored).sum()),
    'samples': settings.samples,
    'temperature': float(settings.decoding.temperature),
    'metric': metric,
    **({} if right is None else {'threshold': threshold}),
    **({'judge': judge} if judge else {}),
    **{name.removeprefix('eval/'): value for name, value in numbers.items()},
    **{
      name: evaluation.bootstrap(values)._asdict()
      for name, values in estimates.items()
    },
  }


def build_held_out(
  config, model: build.Model, rows, seeds: Sequence[int], **changes: Any
) -> evaluation.HeldOut:
  """Builds a held-out set that `config.rewards` score.

  Args:
    config, model: as for `measure`.
    rows: rows with prompts.
    seeds: seed of the key, and numbers to fold in.
    **changes: in place of the settings in `config.evaluation`.

  Raises:
    UserError: all samples of a prompt would be equal.
  """
  seed, *rest = seeds
  key = functools.reduce(jax.random.fold_in, rest, jax.random.key(seed))
  rewards = build.reward_parts(config)
  held = schedule.build_held_out(config, model, rows, rewards, key, **changes)
  samples = held.setting.generation.samples
  if samples > 1 and held.setting.generation.decoding.greedy:
    raise UserError(
      f'at temperature 0 all {samples} samples of a prompt are equal\n'
      'set --temperature above 0'
    )
  return held


def choose_metric(rewards: Sequence[RewardPart], metric: str | None) -> str:
  """Returns `metric`, or the name of the reward of greatest weight for None.

  Raises:
    UserError: no reward has this name.
  """
  weights = {part.name: part.weight for part in rewards}
  if metric is None:
    return max(weights, key=weights.get)
  if metric not in weights:
    raise UserError(
      f'--metric is {metric!r}\nthe rewards are {", ".join(weights)}'
    )
  return metric


def _check_samples(
  settings, greedy: bool, counts: dict[str, Sequence[int]]
) -> None:
  """Raises UserError for a k without k samples, or for greedy sampling."""
  for kind, ks in counts.items():
    if settings.samples < max(ks, default=1):
      raise UserError(
        f'{kind}@{max(ks)} needs {max(ks)} samples per prompt; '
        f'--samples is {settings.samples}'
      )
  if greedy and settings.decoding.greedy:
    raise UserError(
      '--greedy is given, but at temperature 0 the accuracy is the greedy one\n'
      'set --temperature above 0, or leave out --greedy'
    )


def _check_judge(
  rewards: Sequence[RewardPart], metric: str, judge: str | None, best_of
) -> None:
  """Raises UserError unless a judge is named exactly where one is needed."""
  names = ', '.join(part.name for part in rewards)
  if (judge is None) == bool(best_of):
    given, missing = ('best_of', 'judge') if best_of else ('judge', 'best_of')
    raise UserError(
      f'--{given} is given but no --{missing}\n'
      f'--best_of=1,4 --judge=NAME ranks responses by a reward of: {names}'
    )
  if judge is not None and judge not in names.split(', '):
    raise UserError(f'--judge is {judge!r}\nthe rewards are {names}')
  if judge == metric:
    raise UserError(
      f'{judge} is --judge and --metric: nothing else says what its choice is '
      f'worth\nset --metric to another of the rewards {names}'
    )


def _answer(
  held: evaluation.HeldOut, model: build.Model, responses: str, metric: str
) -> tuple[evaluation.Answers, np.ndarray, np.ndarray]:
  """Answers a set, and reports failures in reward workers.

  Returns:
    The answers, the scores of the P' scored prompts, [P', n], and which of all
    are scored, [P] bool.

  Raises:
    UserError: no prompt is scored.
  """
  answers = evaluation.answer(held, model.params)
  print_failures(answers, responses)
  scores = answers.parts[metric]
  scored = ~np.isnan(scores).any(axis=1)
  if not scored.any():
    raise UserError(f'{metric} scores no prompt: choose another --metric')
  return answers, scores[scored], scored


def _best_of(
  proxy: np.ndarray,
  gold: np.ndarray,
  right: np.ndarray | None,
  ks: Sequence[int],
) -> tuple[int, dict[str, np.ndarray]]:
  """Returns the number of unjudged prompts, and estimates over the others."""
  judged = ~np.isnan(proxy).any(axis=1)
  if not judged.any():
    raise UserError(
      '--judge scores no prompt that --metric scores\nchoose another --judge'
    )
  worth = {'best_of': right, 'metric_best_of': gold, 'judge_best_of': proxy}
  return int((~judged).sum()), {
    f'{name}@{k}': evaluation.best_of_n(proxy[judged], values[judged], k)
    for k in ks
    for name, values in worth.items()
    if values is not None
  }


def print_failures(answers: evaluation.Answers, responses: str) -> None:
  """Prints a line for each kind of failure in reward workers."""
  where = f'of the {responses}'
  for line in failure_messages(answers.failures, where, set()):
    print(visible(line.removeprefix('eval/')))


def _reader(answer: str | None, reward: str) -> Callable[[str], Any]:
  """Returns the function that reads the answer in a response.

  Raises:
    UserError: no such function.
  """
  if answer is not None and ':' in answer:
    return naming.find(functions, answer, '--answer')
  readers = functions.READERS
  if (answer or reward) in readers:
    return readers[answer or reward]
  problem = f'--answer is {answer!r}' if answer else f'{reward} reads no answer'
  raise UserError(
    f'--maj: {problem}\n'
    f'set --answer to file.py:function or one of {", ".join(readers)}'
  )


def table(title: str, result: dict[str, Any]):
  """Returns the numbers as a `rich` table."""
  from rich.table import Table
  from rich.text import Text

  # Text, not str: rich would read a name in brackets as markup.
  heading = Text(visible(title), style='table.title')
  shown = Table(title=heading, title_justify='left')
  shown.add_column('on held-out prompts')
  shown.add_column('value', justify='right')
  shown.add_column('95 % interval', justify='right')
  for name, value in result.items():
    cells = [f'{value:.4g}' if isinstance(value, float) else str(value)]
    if isinstance(value, dict):
      bounds = f'{value["low"]:.4f} – {value["high"]:.4f}'
      cells = [f'{value["mean"]:.4f}', bounds]
    shown.add_row(*(Text(visible(text)) for text in (name, *cells)))
  return shown


def define_subject_flags() -> None:
  """Defines the flags that `subject` reads, and those of sampling."""
  flags.DEFINE_string('workdir', None, 'Folder of a run.')
  flags.DEFINE_string('step', 'newest', "'newest', 'best' or a number.")
  flags.DEFINE_string('model', None, 'Hugging Face folder, with --config.')
  flags.DEFINE_float('temperature', None, 'Of sampling; 0 is greedy.', 0.0)
  flags.DEFINE_integer('batch', None, 'Prompts sampled together.', 1)
  cli.define_trust_flag()
  cli.define_config_flag()


def define_metric_flags() -> None:
  """Defines the flags that decide which responses are right."""
  flags.DEFINE_string('metric', None, 'Reward that decides what is right.')
  flags.DEFINE_float('threshold', None, 'Least score of a right response.')


def subject() -> tuple[ConfigDict, build.Model, str]:
  """Loads what --workdir, or --model and --config, name.

  Returns:
    Configuration, model, and the model's name in words.

  Raises:
    UserError: neither or both are named, or loading failed.
  """
  values = flags.FLAGS
  if (values.workdir is None) == (values.model is None):
    raise UserError(
      'name either a run with --workdir or a Hugging Face folder with --model'
    )
  if values.workdir is not None:
    if values['config'].value is not None:
      raise UserError(
        "--workdir brings the run's own configuration: leave out --config"
      )
    untrusted = () if values.trust_code else ('task', 'rewards')
    config, model, step = stored_runs.load(
      values.workdir, values.step, untrusted
    )
    return config, model, f'{values.workdir}, step {step}'
  config = cli.config()
  config.model.path = values.model
  checks.check(config)
  return config, build.model(config.model, config.seed), values.model


def define_flags() -> None:
  """Defines the flags of this script."""
  define_subject_flags()
  define_metric_flags()
  flags.DEFINE_integer('samples', None, 'Responses per prompt.', 1)
  flags.DEFINE_list('k', [], 'The k of pass@k, as 1,4,16.')
  flags.DEFINE_list('maj', [], 'The k of maj@k, as 1,4,16.')
  flags.DEFINE_string('answer', None, 'Reader of answers, for --maj.')
  flags.DEFINE_list('best_of', [], 'The k of best_of@k, as 1,4,16.')
  flags.DEFINE_string('judge', None, 'Reward that chooses, for --best_of.')
  flags.DEFINE_bool('greedy', False, 'Greedy accuracy beside that of samples.')
  flags.DEFINE_integer('prompts', None, 'Held-out prompts; 0 for all.', 0)
  flags.DEFINE_string('output', None, 'JSON file for the numbers.')


def main() -> None:
  """Evaluates what the flags name."""
  from rich.console import Console

  values = flags.FLAGS
  ks, majs, best_of = (
    _ks(name, values[name].value) for name in ('k', 'maj', 'best_of')
  )
  if values.answer is not None and not majs:
    raise UserError('--answer is given but no --maj, which alone reads it')
  config, model, title = subject()
  least = max([config.evaluation.samples, *ks, *majs, *best_of])
  settings = cli.given(
    *('samples', 'temperature', 'prompts', 'batch', 'judge', 'greedy'),
    *('answer', 'metric', 'threshold'),
  )
  result = measure(
    config,
    model,
    ks=ks,
    majs=majs,
    best_of=best_of,
    **{'samples': least} | settings,
  )
  Console().print(table(title, result))
  if 'threshold' not in result:
    print(
      f'{visible(result["metric"])} gives scores besides 0 and 1: to count '
      'right responses (accuracy, pass@k, maj@k, best_of@k) pass --threshold'
    )
  if values.output is not None:
    text = json.dumps({'model': title, **result}, indent=2)
    cli.write_output(values.output, text + '\n')


def _ks(flag: str, texts: Sequence[str]) -> list[int]:
  if not all(text.isdecimal() and int(text) for text in texts):
    raise UserError(
      f'--{flag} is {",".join(texts)!r}: give numbers, as --{flag}=1,4,16'
    )
  return sorted({int(text) for text in texts})


if __name__ == '__main__':
  define_flags()
  cli.run(main)
