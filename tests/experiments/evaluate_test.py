"""Evaluation of runs and folders, against numbers computed another way."""

import json

import mistakes
import numpy as np
import pytest
import scripts

from experiments import build, evaluate, stored_runs
from jaxrl_llm import evaluation


@pytest.fixture(scope='module')
def trained():
  return stored_runs.load(scripts.undisturbed())


def test_repeats_the_numbers_of_the_run(trained):
  result = evaluate.measure(trained.config, trained.model, metric='correct')
  record = scripts.records(scripts.undisturbed())[-1]
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
  file.write_text(GRADED)
  config = trained.config.copy_and_resolve_references().unlock()
  rank = dict(name=f'{file}:rank', weight=0.0)
  config.rewards = dict(gold=dict(name=f'{file}:gold'), rank=rank)
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


REFUSED = """
metric='exact' | --metric is 'exact'
best_of=(1,) | --best_of is given but no --judge
best_of=(1,), judge='correct', metric='correct' | is --judge and --
temperature=1.0, samples=2, best_of=(2, 4), judge='correct' | needs 4 samples
temperature=1.0, samples=2, majs=(4,), metric='correct' | maj@4 needs 4 samples
greedy=True | leave out --greedy
samples=3 | at temperature 0 all 3 samples
majs=(1,), metric='symbols' | reads no answer
majs=(1,), answer='/no/file.py:f' | no such Python file
"""


@pytest.mark.parametrize('arguments, texts', mistakes.table(REFUSED))
def test_refusals(arguments, texts, trained):
  with mistakes.refused(*texts):
    given = eval(f'dict({arguments})')
    evaluate.measure(trained.config, trained.model, **given)


def test_script_on_a_run_and_on_its_export(tmp_path):
  run = scripts.undisturbed()
  listed = sorted(run.rglob('*'))
  outputs = tmp_path / 'a' / 'run.json', tmp_path / 'folder.json'
  flags = ['--samples=8', '--temperature=1.0', '--k=1,8', '--maj=4']
  flags += ['--answer=exact_match', '--greedy', '--best_of=1,4']
  flags += ['--judge=symbols', '--metric=correct', '--prompts=5']
  config = scripts.shared_folder() / 'config' / 'config.py'
  for output, *source in (
    (outputs[0], f'--workdir={run}', '--trust_code'),
    (outputs[1], f'--model={run / "hf"}', f'--config={config}'),
  ):
    ended = scripts.call('evaluate', *source, *flags, f'--output={output}')
    assert ended.code == 0, ended.err
    for text in ('pass@8', 'maj@4', 'greedy/accuracy', 'judge_best_of@4'):
      assert text in ended.out
    assert '95 % interval' in ended.out
  results = [json.loads(output.read_text()) for output in outputs]
  # The exported folder is the same model: the same samples come out.
  assert results[0].pop('model') != results[1].pop('model')
  assert results[0] == results[1]
  assert sorted(run.rglob('*')) == listed
  graded = '--metric=symbols', '--samples=4', '--temperature=3'
  ended = scripts.call('evaluate', f'--workdir={run}', '--trust_code', *graded)
  assert 'symbols gives scores besides 0 and 1' in ended.out
  assert 'pass --threshold' in ended.out and 'accuracy  ' not in ended.out


FLAGS = """
--prompts=5 | either a run with --workdir or a Hugging Face folder
--workdir=/no/run | /no/run holds no run
--workdir=RUN --step=3 | no checkpoint step 3
--workdir=RUN --config=CONFIG | leave out --config
--workdir=RUN --k=0 | --k is '0'
--workdir=RUN --answer=exact_match | no --maj
--workdir=RUN --samples=0 | --samples=0
--model=/no/model --config=CONFIG | no model folder /no/model
--model=RUN | --config is missing
"""


@pytest.mark.parametrize('flags, texts', mistakes.table(FLAGS))
def test_script_refuses(flags, texts):
  config = scripts.shared_folder() / 'config' / 'config.py'
  flags = flags.replace('CONFIG', str(config))
  flags = flags.replace('RUN', str(scripts.undisturbed())).split()
  ended = scripts.call('evaluate', *flags, '--trust_code')
  mistakes.assert_refused(ended, *texts)


def test_step_names(trained):
  run = scripts.undisturbed()
  records = scripts.records(run)
  rewards = {r['step']: r['eval/reward'] for r in records if 'eval/reward' in r}
  # keep_best=1: the best of all evaluated checkpoints is still there.
  best = stored_runs.load(run, 'best').step
  assert rewards[best] == max(rewards.values())
  least = min(int(path.name) for path in (run / 'checkpoints').iterdir())
  assert stored_runs.load(run, str(least)).step == least != trained.step
