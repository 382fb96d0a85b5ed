"""A run's configuration, read back from JSON, is checked as a file's is."""

import json
import os

import numpy as np
import pytest
import scripts

from experiments import stored_runs
from experiments.configs import base
from jaxrl_llm import rollouts, sampling
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import Scores
from jaxrl_llm.sampling import policy

# Changes to the stored values by dotted name, and what the message must hold.
EDITS = {
  'misspelt': (
    {'rollout.sample': 4},
    ['nothing reads config.rollout.sample', 'did you mean'],
  ),
  'missing': (
    {'rollout': {'top_p'}},
    ['config.rollout.top_p is missing', 'a number, such as 1.0'],
  ),
  'text for a number': (
    {'rollout.samples': 'many'},
    ["config.rollout.samples is 'many'", 'an integer, such as 8'],
  ),
  'fraction': ({'seed': 0.5}, ['config.seed is 0.5', 'an integer']),
  'truth for a number': ({'steps': True}, ['config.steps is True']),
  'number for a truth': ({'model.remat': 1}, ['remat is 1', 'true or false']),
  'null': ({'evaluation.batch': None}, ['config.evaluation.batch is None']),
  'not a section': (
    {'algorithm': 'grpo'},
    ["config.algorithm is 'grpo'", 'a section'],
  ),
  'too small': ({'training.chunk': 0}, ['chunk is 0', 'at least 1']),
  'not above 0': (
    {'optimizer.learning_rate': -1},
    ['config.optimizer.learning_rate is -1', 'above 0'],
  ),
}


def edited(changes) -> str:
  """The default configuration as JSON; a set names fields to take out."""
  values = base.get_config().to_dict()
  for name, value in changes.items():
    *path, last = name.split('.')
    section = values
    for key in path:
      section = section[key]
    if isinstance(value, set):
      for key in value:
        del section[last][key]
    else:
      section[last] = value
  return json.dumps(values)


@pytest.mark.parametrize('name', EDITS)
def test_an_edited_configuration_is_refused_by_field(name, tmp_path):
  changes, texts = EDITS[name]
  path = tmp_path / 'config.json'
  path.write_text(edited(changes))
  with pytest.raises(UserError) as caught:
    stored_runs.read_config(tmp_path)
  message = str(caught.value)
  assert message.startswith(f'{path}: ')
  assert len(message.splitlines()) <= 3
  for text in texts:
    assert text in message, message


@pytest.mark.parametrize(
  'text, expected',
  [
    ('[1]', 'it is not a JSON object'),
    ('{"seed":', 'cannot be read'),
    ('{"rollout.samples": 4}', 'cannot be read'),
  ],
)
def test_a_file_that_is_no_configuration(text, expected, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=expected):
    stored_runs.read_config(tmp_path)


def test_what_a_run_stores_is_read_back(tmp_path):
  (tmp_path / 'config.json').write_text(edited({'rollout.samples': 3}))
  config = stored_runs.read_config(tmp_path)
  assert config.rollout.samples == 3 and config.is_locked
  # A whole number stands for a float, as on the command line.
  (tmp_path / 'config.json').write_text(edited({'rollout.temperature': 1}))
  assert stored_runs.read_config(tmp_path).rollout.temperature == 1


@pytest.mark.parametrize('script', ['evaluate', 'export'])
def test_scripts_say_it_in_three_lines(script, tmp_path):
  (tmp_path / 'config.json').write_text(edited({'rollout.samples': 'many'}))
  flags = [f'--output={tmp_path / "out"}'] if script == 'export' else []
  ended = scripts.run(script, f'--workdir={tmp_path}', *flags)
  assert ended.code == 2, ended
  assert ended.err.startswith('error: ') and len(ended.err.splitlines()) <= 3
  assert "config.rollout.samples is 'many'" in ended.err


def test_each_part_of_a_sum_of_rewards_has_a_panel(tmp_path, monkeypatch):
  """A single reward has no panel: the main one shows it."""
  from matplotlib.figure import Figure

  drawn = []
  monkeypatch.setattr(
    Figure, 'savefig', lambda self, *a, **k: drawn.append(self)
  )
  monkeypatch.setattr('os.replace', lambda *a: None)
  records = [
    {
      'step': step,
      'reward': step / 2,
      'eval/rewards/gold': 5.0 - step,
      'eval/rewards/gold/failed': 1,
      'eval/rewards/proxy': 1.0 + step,
      'eval/reward': 1.0 + step,
    }
    for step in range(4)
  ]
  del records[1]['eval/rewards/gold'], records[1]['eval/rewards/proxy']
  curves = {'eval/reward': 'held-out reward'}
  stored_runs.plot(tmp_path / 'curve.png', records, curves, first=1)
  main, *panels = drawn[0].axes
  assert len(main.lines) == 3  # training, held-out, the warm start's end
  assert [axes.get_ylabel() for axes in panels] == [
    'held-out gold',
    'held-out proxy',
  ]
  for axes, sign, at in zip(panels, (-1, 1), (5, 1), strict=True):
    x, y = axes.lines[0].get_data()
    assert list(x) == [0, 2, 3]
    assert list(y) == [at + sign * step for step in x]
  for record in records:
    record.pop('eval/rewards/proxy', None)
  stored_runs.plot(tmp_path / 'curve.png', records, curves, first=0)
  assert len(drawn[1].axes) == 1


def test_a_batch_that_cannot_be_kept_is_said(tmp_path, monkeypatch):
  numbers = np.arange(6.0).reshape(1, 2, 3)
  responses = rollouts.Responses(
    policy.Prompts(tokens=np.ones((1, 4), np.int32), lengths=np.array([4])),
    [{'prompt': 'a'}],
    sampling.Samples(
      tokens=np.ones((1, 2, 3), np.int32),
      mask=numbers > 1,
      log_probs=-numbers,
      finished=np.ones((1, 2, 1), bool),
    ),
    ['b', 'c'],
    lambda: Scores(np.ones(2), np.ones(2, bool), {}),
  )
  path = tmp_path / 'batch.npz'
  stored_runs.write_batch(path, responses, np.ones((1, 2)))
  with np.load(path, allow_pickle=False) as stored:
    np.testing.assert_array_equal(stored['log_probs'], -numbers)
    np.testing.assert_array_equal(stored['rewards'], np.ones((1, 2)))

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(
    UserError, match='to look at, cannot be .*: No space'
  ) as e:
    stored_runs.write_batch(path, responses, np.ones((1, 2)))
  assert len(str(e.value).splitlines()) <= 3
  assert list(tmp_path.iterdir()) == [path]
