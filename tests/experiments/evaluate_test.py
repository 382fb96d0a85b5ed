"""Evaluation of runs and folders, against numbers computed another way."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
import scripts
from rich.console import Console

from experiments import build, evaluate, stored_runs
from jaxrl_llm import evaluation
from jaxrl_llm.errors import UserError


@pytest.fixture(scope='module')
def trained():
  return stored_runs.load(scripts.undisturbed())


def last_record() -> dict:
  lines = (scripts.undisturbed() / 'metrics.jsonl').read_text().splitlines()
  return json.loads(lines[-1])


def with_rewards(trained, file, source, **rewards):
  """The run's configuration with rewards that a file defines."""
  file.write_text(source)
  config = trained.config.copy_and_resolve_references().unlock()
  config.rewards = {
    name: {'name': f'{file}:{name}', **more} for name, more in rewards.items()
  }
  return config


def test_repeats_the_numbers_of_the_run(trained):
  result = evaluate.measure(trained.config, trained.model, metric='correct')
  record = last_record()
  assert trained.step == scripts.TOTAL
  for name in ('reward', 'rewards/symbols', 'completions/mean_length'):
    assert result[name] == record[f'eval/{name}'], name
  assert result['accuracy']['mean'] == record['eval/rewards/correct']
  assert result['prompts'] == scripts.HELD_OUT and result['unscored'] == 0


GRADED = """
import json


def note(name, values):
  with open(__file__ + '.log', 'a') as log:
    log.write(json.dumps([name, values]) + '\\n')


def gold(completion_ids, completions, prompts, **kwargs):
  scores = [sum(ids) % 3 / 2 for ids in completion_ids]
  note('texts', completions)
  note('gold', scores)
  return [None if p[0] in '01' else s for p, s in zip(prompts, scores)]


def rank(completion_ids, prompts, **kwargs):
  scores = [float(ids[0] % 4) for ids in completion_ids]
  note('rank', scores)
  return [None if p[0] in '23' else s for p, s in zip(prompts, scores)]
"""


def test_estimates_are_those_of_the_responses(trained, tmp_path):
  """The estimates themselves are compared with subsets in their own test."""
  file, reader = tmp_path / 'graded.py', tmp_path / 'reader.py'
  config = with_rewards(trained, file, GRADED, gold={}, rank={'weight': 0.0})
  reader.write_text('def first(text):\n  return text[:1] or None\n')
  data = build.dataset(config, trained.model.tokenizer)
  first = np.array([int(row['prompt'][0]) for row in data.held_out])
  arguments = dict(ks=(1, 2, 4), majs=(1, 3), answer=f'{reader}:first')
  arguments |= dict(best_of=(1, 2, 4), judge='rank', greedy=True, samples=4)
  arguments |= dict(temperature=3.0, prompts=len(first), batch=4)
  model = trained.model
  result = evaluate.measure(config, model, threshold=1.0, **arguments)
  seen = {'gold': [], 'rank': [], 'texts': []}
  for line in (tmp_path / 'graded.py.log').read_text().splitlines():
    name, values = json.loads(line)
    seen[name] += values
  # The greedy responses follow those of sampling.
  scored, known, size = first > 1, first > 3, 4 * len(first)
  gold, rank, texts = (
    np.array(seen[name][:size], object).reshape(-1, 4) for name in seen
  )
  assert result['unscored'] == (~scored).sum() > 0
  assert result['unjudged'] == (scored & ~known).sum() > 0
  assert result['metric'] == 'gold' and result['judge'] == 'rank'
  assert result['samples'] == 4 and result['temperature'] == 3.0
  gold, rank = gold.astype(float), rank.astype(float)
  right = gold >= 1.0
  votes = evaluation.votes(texts[scored], lambda text: text[:1] or None)
  expected = {'accuracy': right[scored].mean(axis=1)}
  for k in (1, 2, 4):
    expected[f'pass@{k}'] = evaluation.pass_at_k(right[scored], k)
    values = {'best_of': right, 'metric_best_of': gold, 'judge_best_of': rank}
    for name, each in values.items():
      best = evaluation.best_of_n(rank[known], each[known], k)
      expected[f'{name}@{k}'] = best
  for k in (1, 3):
    expected[f'maj@{k}'] = evaluation.maj_at_k(votes, right[scored], k)
  for name, values in expected.items():
    assert result[name] == evaluation.bootstrap(values)._asdict(), name
  assert result['answered'] == (votes >= 0).mean()
  assert 0 < result['accuracy']['mean'] < result['pass@4']['mean'] < 1

  # Without a threshold, a score of a half is neither right nor wrong.
  graded = evaluate.measure(config, model, **arguments)
  score = evaluation.bootstrap(gold[scored].mean(axis=1))._asdict()
  assert graded['score'] == score != graded['greedy/score']
  left_out = {'threshold', 'answered', 'greedy/accuracy', *expected}
  kept = {x for x in expected if x.startswith(('metric_', 'judge_'))}
  assert result.keys() - graded.keys() == left_out - kept
  assert all(graded[name] == result[name] for name in kept)


def test_greedy_beside_samples_repeats_the_numbers_of_the_run(trained):
  given = dict(metric='correct', samples=2, temperature=2.0)
  result = evaluate.measure(trained.config, trained.model, greedy=True, **given)
  # The run evaluates greedily.
  expected = last_record()['eval/rewards/correct']
  assert result['greedy/accuracy']['mean'] == expected
  assert result['greedy/unscored'] == 0
  without = evaluate.measure(trained.config, trained.model, **given)
  assert without == {k: v for k, v in result.items() if 'greedy' not in k}


def test_failures_in_workers_are_counted_and_told(trained, tmp_path, capsys):
  source = (
    'def even(prompts, completions):\n'
    '  if int(prompts[0][0]) % 2: raise ValueError("odd\\u202e")\n'
    '  return [1.0]\n'
  )
  file = tmp_path / 'even.py'
  config = with_rewards(trained, file, source, even={'workers': 1})
  data = build.dataset(config, trained.model.tokenizer)
  odd = sum(int(row['prompt'][0]) % 2 for row in data.held_out)
  changes = dict(samples=2, temperature=1.0, greedy=True, batch=4)
  result = evaluate.measure(config, trained.model, **changes)
  assert 0 < odd < scripts.HELD_OUT
  assert result['rewards/even/failed'] == 2 * odd
  assert result['greedy/rewards/even/failed'] == odd
  assert result['unscored'] == result['greedy/unscored'] == odd
  # The prompts without a failure are the scored ones.
  assert result['accuracy']['mean'] == 1.0 and result['reward'] == 1.0
  sampled, greedy = capsys.readouterr().out.splitlines()
  assert sampled.startswith(f'rewards/even: {2 * odd} of the held-out')
  assert greedy.startswith(f'rewards/even: {odd} of the greedy')
  assert 'by error: ValueError: odd' in sampled and sampled.isprintable()


def test_table_shows_names_as_they_are():
  console = Console(file=io.StringIO(), width=80)
  result = {'rewards/[b]n\x1b\u202e': 0.5, 'score': dict(mean=1, low=0, high=2)}
  console.print(evaluate.table('runs/[i]\u200f', result))
  text = console.file.getvalue()
  assert 'rewards/[b]n␛\\u202e' in text and 'runs/[i]\\u200f' in text


TWO = dict(samples=2, temperature=1.0)


@pytest.mark.parametrize(
  'arguments, text',
  [
    (dict(metric='exact'), "--metric is 'exact'"),
    (dict(best_of=(1,)), '--best_of is given but no --judge'),
    (dict(judge='symbols'), '--judge is given but no --best_of'),
    (dict(best_of=(1,), judge='exact'), "--judge is 'exact'"),
    (
      dict(best_of=(1,), judge='correct', metric='correct'),
      'is --judge and --',
    ),
    (TWO | dict(best_of=(2, 4), judge='correct'), 'best_of@4 needs 4 samples'),
    (TWO | dict(ks=(4,)), 'pass@4 needs 4 samples'),
    (TWO | dict(majs=(4,), metric='correct'), 'maj@4 needs 4 samples'),
    (dict(greedy=True), 'leave out --greedy'),
    (dict(samples=3), 'at temperature 0 all 3 samples'),
    (dict(majs=(1,), metric='symbols'), 'reads no answer'),
    (dict(majs=(1,), answer='exact'), "--answer is 'exact'"),
    (dict(majs=(1,), answer='/no/file.py:f'), 'no such Python file'),
  ],
)
def test_refusals(arguments, text, trained):
  with pytest.raises(UserError, match=text) as caught:
    evaluate.measure(trained.config, trained.model, **arguments)
  assert len(str(caught.value).splitlines()) <= 3


def test_script_on_a_run_and_on_its_export(tmp_path):
  run = scripts.undisturbed()
  listed = sorted(run.rglob('*'))
  outputs = tmp_path / 'a' / 'run.json', tmp_path / 'folder.json'
  flags = ['--metric=correct', '--prompts=5', '--k=1,2', '--temperature=0.7']
  config = scripts.shared_folder() / 'config' / 'config.py'
  sources = (
    [f'--workdir={run}', '--trust_code'],
    [f'--model={run / "hf"}', f'--config={config}'],
  )
  for source, output in zip(sources, outputs, strict=True):
    last = f'--output={output}'
    ended = scripts.run(
      'evaluate', *source, *flags, last, cache=scripts.cache()
    )
    assert ended.code == 0, ended.err
    assert 'pass@2' in ended.out and '95 % interval' in ended.out
  results = [json.loads(output.read_text()) for output in outputs]
  # The exported folder is the same model: the same samples come out.
  assert results[0].pop('model') != results[1].pop('model')
  assert results[0] == results[1]
  assert sorted(run.rglob('*')) == listed


@pytest.mark.parametrize(
  'flags, shown, missing',
  [
    (['--maj=1', '--metric=correct'], ['maj@1', 'step'], ['pass@', '--thr']),
    (
      ['--samples=8', '--temperature=1.0', '--k=1,8']
      + ['--maj=4', '--answer=exact_match', '--greedy']
      + ['--best_of=1,4', '--judge=symbols', '--metric=correct'],
      ['pass@1', 'pass@8', 'maj@4', 'greedy/accuracy', 'judge_best_of@4'],
      [' score'],
    ),
    (
      ['--metric=symbols', '--k=1', '--samples=4', '--temperature=3'],
      ['score', 'symbols gives scores besides 0 and 1', 'pass --threshold'],
      ['accuracy  '],
    ),
    (['--metric=symbols', '--threshold=0.5'], ['accuracy'], [' score']),
  ],
)
def test_script_as_it_is_usually_called(flags, shown, missing):
  flags = [f'--workdir={scripts.undisturbed()}', '--trust_code', *flags]
  ended = scripts.run('evaluate', *flags, cache=scripts.cache())
  assert ended.code == 0, ended.err
  assert [text for text in shown if text not in ended.out] == []
  assert [text for text in missing if text in ended.out] == []


@pytest.mark.parametrize(
  'flags, text',
  [
    ([], 'either a run with --workdir or a Hugging Face folder'),
    (['--workdir=/no/run'], '/no/run holds no run'),
    (['--workdir=RUN', '--step=3'], 'no checkpoint step 3'),
    (['--workdir=RUN', '--step=last'], "--step is 'last'"),
    (['--workdir=RUN', '--config=CONFIG'], 'leave out --config'),
    (['--workdir=RUN', '--k=0'], "--k is '0'"),
    (['--workdir=RUN', '--maj=a'], "--maj is 'a'"),
    (['--workdir=RUN', '--answer=exact_match'], 'no --maj'),
    (['--workdir=RUN', '--samples=0'], '--samples=0'),
    (['--workdir=RUN', '--best_of=0'], "--best_of is '0'"),
    (['--model=/no/model', '--config=CONFIG'], 'no model folder /no/model'),
    (['--model=RUN'], '--config is missing'),
  ],
)
def test_script_refuses(flags, text):
  config = scripts.shared_folder() / 'config' / 'config.py'
  flags = [flag.replace('CONFIG', str(config)) for flag in flags]
  flags = [flag.replace('RUN', str(scripts.undisturbed())) for flag in flags]
  ended = scripts.run('evaluate', *flags, '--trust_code')
  assert ended.code == 2 and text in ended.err, ended
  assert len(ended.err.splitlines()) <= 3


def test_step_names(trained):
  run = scripts.undisturbed()
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  rewards = {r['step']: r.get('eval/reward') for r in map(json.loads, lines)}
  best = stored_runs.load(run, 'best').step
  # keep_best=1: the best of all evaluated checkpoints is still there.
  assert rewards[best] == max(r for r in rewards.values() if r is not None)
  least = min(int(path.name) for path in (run / 'checkpoints').iterdir())
  other = stored_runs.load(run, str(least))
  pairs = zip(
    *(jax.tree.leaves(x.model.params) for x in (other, trained)), strict=True
  )
  differ = any((a != b).any() for a, b in pairs)
  assert other.step == least and differ == (least != trained.step)


def test_folder_without_checkpoint(tmp_path):
  shutil.copy(scripts.undisturbed() / 'config.json', tmp_path)
  with pytest.raises(UserError, match='no checkpoint yet'):
    stored_runs.load(tmp_path)
