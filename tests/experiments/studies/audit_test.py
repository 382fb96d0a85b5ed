"""The audit of a tiny model: estimators compared, values of states, report."""

import functools
import json

import jax
import mistakes
import numpy as np
import pytest
import scripts

from experiments import build
from experiments.studies import audit, audit_draws, audit_values
from jaxrl_llm.runs.checkpoints import Checkpoints

# Half of the prompts earn the same whatever the response: groups are equal.
REWARD = """
def ones(prompts, completions):
  return [
    0.5 if len(prompt) % 2 else text.count('1') / 4
    for prompt, text in zip(prompts, completions)
  ]
"""
PROMPTS, SAMPLES = 6, 4
RLOO = dict(algorithm=dict(name='rloo'))
DR_GRPO = dict(algorithm=dict(name='dr_grpo', max_length=6))
RL_ZVP = dict(algorithm=dict(name='rl_zvp'))


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  file = tmp_path_factory.mktemp('reward') / 'reward.py'
  file.write_text(REWARD)
  config = scripts.tiny_config()
  config.task.update(train=40, held_out=4, demonstrations=4)
  config.task.operands = (1, 99)
  config.prompts.max_tokens = 16
  config.rewards = dict(ones=dict(name=f'{file}:ones'))
  config.rollout.update(samples=SAMPLES, max_tokens=6)
  config.training.update(micro_prompts=2, chunk=64)
  return config


@pytest.fixture(scope='module')
def subject(config):
  model = build.model(config.model, config.seed)
  rows = audit_draws.choose_prompts(config, model, PROMPTS)
  return audit_draws.Subject(
    config, model, rows[:PROMPTS], rows, None, None, 'tiny'
  )


def test_equal_groups_by_hand(subject):
  config = audit_draws.variant(subject, 'RL-ZVP', RL_ZVP)
  rl, state = audit_draws.begin(subject, config, 'RL-ZVP')
  found = rl.collect(state, 0)
  equal = np.asarray(audit_draws.equal_rewards(found.own))
  rewards = np.asarray(found.own.rewards)[..., 0]
  assert equal.shape == (PROMPTS, 1, 1) and 0 < equal.sum() < PROMPTS
  expected = [len(set(row.tolist())) == 1 for row in rewards]
  assert equal.ravel().tolist() == expected


WRONG = """
algorithm=dict(name='rlo') | rloo
algorithm=dict(name='ppo') | critic
algorithm=dict(name='rloo'), rollout=dict(prompts=3) | the same for all
algorithm=dict(name='rloo'), rollout=dict(samples=1) | at least 2
algorithm=dict(name='rloo'), rollouts=dict(samples=3) | is not like dict
"""


@pytest.mark.parametrize('spec, texts', mistakes.table(WRONG))
def test_estimators_that_do_not_fit_are_refused(spec, texts, subject):
  with mistakes.refused('mine: ', *texts):
    audit_draws.variant(subject, 'mine', eval(f'dict({spec})'))


@pytest.mark.slow
def test_a_whole_audit_and_again(subject, tmp_path, capsys):
  run = functools.partial(
    audit.audit,
    subject,
    {'RLOO': RLOO, 'Dr. GRPO': DR_GRPO},
    tmp_path,
    tokens=2500,
    reference_tokens=4000,
    branches=16,
  )
  run()
  assert 'stored' not in capsys.readouterr().out
  result = json.loads((tmp_path / 'audit.json').read_text())
  assert result['reference']['tokens'] >= 4000
  # Dr. GRPO's gradient is RLOO's, (G − 1)/G and 1/6 of it.
  for label, true in (('RLOO', 1.0), ('Dr. GRPO', 3 / 4 / 6)):
    row = result['estimators'][label]
    assert row['tokens'] * row['draws'] >= 2500
    found = row['scale']
    assert abs(found['value'] - true) < 4 * found['error'] < true, label
  rloo = result['estimators']['RLOO']['equal_groups']
  assert 0.3 < rloo['share'] < 1 and rloo['squared_norm']['value'] == 0
  assert rloo['cosine']['value'] is None  # no NaN in JSON
  for name in ('audit.png', 'values.png'):
    assert (tmp_path / name).stat().st_size > 100
  table = (tmp_path / 'audit.md').read_text()
  assert '| Dr. GRPO |' in table and 'nan' not in table
  # Stored draws give the same numbers.
  run(branches=0)
  assert capsys.readouterr().out.count('stored') == 3
  again = json.loads((tmp_path / 'audit.json').read_text())
  for label, row in again['estimators'].items():
    assert row.items() <= result['estimators'][label].items()
  trees = result['trees']
  assert 0 < trees['distinct'] <= 1 <= trees['best']['RLOO'] <= 16
  assert sum(trees['profile']['uncertainty']) == pytest.approx(1)
  assert trees['profile']['scores'][-1] == 1
  assert (
    'distinct' in table and '| signal to noise, prompts drawn too |' in table
  )


def test_a_checkpoint_of_a_run(config, subject, tmp_path):
  params = jax.tree.map(lambda x: 2 * x, subject.model.params)
  state = {'trainable': {'policy': params}}
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(3, {'state': state}, {})
    checkpoints.wait()
  (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
  found = audit_draws.of_run(str(tmp_path), 'newest', PROMPTS, trust_code=True)
  assert found.title.endswith('step 3') and found.rows == subject.rows
  for x, y in zip(
    *map(jax.tree.leaves, (found.model.params, params)), strict=True
  ):
    np.testing.assert_array_equal(x, y)
  assert found.critic is None and found.reference is None


def test_a_report_of_values(subject):
  config = audit_draws.variant(subject, 'reference', RLOO)
  measured = audit_values.measure(subject, config, count=40, positions=2)
  known = measured.positions > 0
  assert measured.returns.shape == (PROMPTS, 2, 2, 48)  # a multiple of 16
  # Some prompts earn 0.5 whatever is written.
  same = known & (measured.others.std(axis=1) == 0)[:, None, None]
  assert same.any() and (measured.returns[same] == 0.5).all()
  for name, values in measured.predictions.items():
    siblings = int(name.split()[2])
    expected = measured.others[:, :siblings].mean(axis=1)[:, None, None]
    np.testing.assert_allclose(values, np.broadcast_to(expected, known.shape))
  found = audit_values.report(measured)
  sources = found['sources']
  assert found['states'] == known.sum() and found['branches'] == 48
  assert list(found['by_place']) == ['2', '4']
  one, four = (
    sources[f'mean of {k} branches']['error']['value'] for k in (1, 4)
  )
  assert one == pytest.approx(2 * four) and one > 0
  spread = measured.returns[known].var(axis=1, ddof=1).mean()
  assert one == pytest.approx(np.sqrt(spread), rel=0.02)
  difference = found['doob']['difference']
  assert abs(difference['value']) < 4 * difference['error']
  assert json.dumps(found)
