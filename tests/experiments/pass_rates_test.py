"""Pass rates of training prompts: measured, taken up again, and used."""

import json

import jax
import numpy as np
import pytest
import scripts

from experiments import build, pass_rates, stored_runs
from jaxrl_llm import rollouts
from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import prompts as prompts_lib

REWARD = """
def digits(prompts, completions, **kwargs):
  return [
    None if p[0] == '7' else float(sum(c in '0123456789' for c in text))
    for p, text in zip(prompts, completions)
  ]
"""
SETTINGS = dict(samples=4, batch=8, threshold=2.0, title='it')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Model and configuration of the tiny run, with another reward."""
  found = stored_runs.load(scripts.undisturbed())
  config = found.config.copy_and_resolve_references().unlock()
  path = tmp_path_factory.mktemp('reward') / 'digits.py'
  path.write_text(REWARD)
  config.rewards = {'digits': {'name': f'{path}:digits'}}
  return config, found.model


@pytest.fixture(scope='module')
def whole(trained, tmp_path_factory):
  path = tmp_path_factory.mktemp('rates') / 'rates.jsonl'
  records = pass_rates.measure(*trained, str(path), **SETTINGS)
  return path, records


def test_rates_are_counts_of_right_responses(trained, whole):
  config, model = trained
  path, records = whole
  rows = build.task(config, model.tokenizer).train
  assert [r['prompt'] for r in records] == [row['prompt'] for row in rows]
  header, *lines = map(json.loads, path.read_text().splitlines())
  assert lines == records
  assert header['settings']['samples'] == 4 and len(rows) == 24
  # The same responses, drawn and counted in plain Python.
  encoded = build.encode(config, rows, model.tokenizer)
  generation = build.generation(
    config, model, encoded.pad_id, samples=4, temperature=1.0
  )
  key = jax.random.fold_in(jax.random.key(config.seed), 7)
  seen = set()
  for start in range(0, 24, 8):
    chosen = range(start, start + 8)
    _, samples = rollouts.generate(
      model.config,
      model.params,
      prompts_lib.gather(encoded, chosen),
      generation,
      jax.random.fold_in(jax.random.fold_in(key, start), 0),
    )
    for i, row in enumerate(chosen):
      right = 0
      for ids, mask in zip(samples.tokens[i], samples.mask[i], strict=True):
        text = model.tokenizer.decode(ids[mask], skip_special_tokens=True)
        right += sum(c.isdigit() for c in text) >= 2
      unscored = rows[row]['prompt'][0] == '7'
      rate = None if unscored else right / 4
      assert records[row]['pass_rate'] == rate
      assert records[row]['samples'] == (0 if unscored else 4)
      seen.add(rate)
  assert None in seen and len(seen) > 2
  assert '24 prompts' in pass_rates.summary(records)


@pytest.mark.parametrize('keep', [0, 1, 8, 14, 22])
def test_what_was_cut_short_is_taken_up_again(trained, whole, keep, tmp_path):
  path, records = whole
  lines = path.read_bytes().splitlines(True)
  output = tmp_path / 'rates.jsonl'
  torn = b''.join(lines[:keep]) + lines[keep][:9]
  (tmp_path / 'rates.jsonl.partial').write_bytes(torn)
  found = pass_rates.measure(*trained, str(output), **SETTINGS)
  assert found == records and output.read_bytes() == path.read_bytes()
  assert not (tmp_path / 'rates.jsonl.partial').exists()


def test_refusals(trained, whole, tmp_path):
  path, _ = whole
  with pytest.raises(UserError, match='exists\nremove it'):
    pass_rates.measure(*trained, str(path), **SETTINGS)
  output = tmp_path / 'rates.jsonl'
  with pytest.raises(UserError, match='all 4 samples of a prompt are equal'):
    pass_rates.measure(*trained, str(output), samples=4, temperature=0.0)
  with pytest.raises(UserError, match="--metric is 'other'"):
    pass_rates.measure(*trained, str(output), metric='other')
  partial = tmp_path / 'rates.jsonl.partial'
  lines = path.read_bytes().splitlines(True)
  partial.write_bytes(b''.join(lines[:12]))
  config, model = trained
  other = jax.tree.map(lambda x: x + 1e-3, model.params)
  for changed, changes in (
    (model, {'threshold': 1.0}),
    (model._replace(params=other), {}),
  ):
    with pytest.raises(UserError, match='begun with another model or other'):
      pass_rates.measure(config, changed, str(output), **SETTINGS | changes)
  partial.write_bytes(b''.join([lines[0], *lines[2:13]]))
  with pytest.raises(UserError, match='of other prompts'):
    pass_rates.measure(*trained, str(output), **SETTINGS)
  partial.write_bytes(lines[0] + b'{"prom\n' + b''.join(lines[1:12]))
  with pytest.raises(UserError, match='damaged'):
    pass_rates.measure(*trained, str(output), **SETTINGS)


def test_prompts_over_budget_have_no_rate(trained, tmp_path):
  config, model = trained
  config = config.copy_and_resolve_references()
  config.prompts.update(max_tokens=4, overlong='drop')
  config.task.update(operands=(0, 12), modulus=None)
  output = tmp_path / 'rates.jsonl'
  settings = SETTINGS | {'batch': 24}
  records = pass_rates.measure(config, model, str(output), **settings)
  for record in records:
    assert len(record['prompt']) <= 4 or record['pass_rate'] is None
  assert any(len(record['prompt']) > 4 for record in records)
  # Each prompt has a record: a training can read it.
  config.prompts.update(pass_rates=str(output))
  assert build.dataset(config, model.tokenizer).train


def test_a_training_keeps_the_prompts_within_the_bounds(trained, whole):
  config, model = trained
  path, records = whole
  config = config.copy_and_resolve_references()
  config.prompts.update(
    pass_rates=str(path), min_pass_rate=0.25, max_pass_rate=0.75
  )
  full = build.task(config, model.tokenizer)
  data = build.dataset(config, model.tokenizer)
  rates = {record['prompt']: record['pass_rate'] for record in records}
  inside = [p for p, r in rates.items() if r is not None and 0.25 <= r <= 0.75]
  assert 0 < len(inside) < 24
  assert [row['prompt'] for row in data.train] == inside
  assert all(row['pass_rate'] == rates[row['prompt']] for row in data.train)
  assert data.held_out == full.held_out
  assert data.demonstrations == full.demonstrations
  known = np.array([r for r in rates.values() if r is not None])
  (note,) = data.notes
  for text in (
    f'{len(inside)} of 24 training prompts',
    f'{(known < 0.25).sum()} below, {(known > 0.75).sum()} above',
    f'{24 - len(known)} without a rate',
  ):
    assert text in note
  config.task.train = 30
  with pytest.raises(UserError, match='of 30 training prompts have no record'):
    build.dataset(config, model.tokenizer)
