"""A run's configuration, read back from JSON, is checked as a file's is."""

import json

import pytest
import scripts

from experiments import runs
from experiments.configs import base
from jaxrl_llm.errors import UserError

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
    runs.read_config(tmp_path)
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
    runs.read_config(tmp_path)


def test_what_a_run_stores_is_read_back(tmp_path):
  (tmp_path / 'config.json').write_text(edited({'rollout.samples': 3}))
  config = runs.read_config(tmp_path)
  assert config.rollout.samples == 3 and config.is_locked
  # A whole number stands for a float, as on the command line.
  (tmp_path / 'config.json').write_text(edited({'rollout.temperature': 1}))
  assert runs.read_config(tmp_path).rollout.temperature == 1


@pytest.mark.parametrize('script', ['evaluate', 'export'])
def test_scripts_say_it_in_three_lines(script, tmp_path):
  (tmp_path / 'config.json').write_text(edited({'rollout.samples': 'many'}))
  flags = [f'--output={tmp_path / "out"}'] if script == 'export' else []
  ended = scripts.run(script, f'--workdir={tmp_path}', *flags)
  assert ended.code == 2, ended
  assert ended.err.startswith('error: ') and len(ended.err.splitlines()) <= 3
  assert "config.rollout.samples is 'many'" in ended.err
