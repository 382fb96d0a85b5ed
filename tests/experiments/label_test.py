"""Pairs and pass rates against plain Python; interruptions; who reads them."""

import json

import jax
import mistakes
import numpy as np
import pytest
import scripts

from experiments import build, data, label, preference
from experiments import reward_model as reward_model_script
from jaxrl_llm import rollouts
from jaxrl_llm.tasks import prompts as prompts_lib

# Whole numbers, so that scores are often equal; none for some prompts.
REWARD = """
def digits(prompts, completions, finished):
  return [
    None if p[0] == '7' else float(sum(c in '01234' for c in text)) + end
    for p, text, end in zip(prompts, completions, finished)
  ]
"""
SAMPLES, PER_PROMPT, PROMPTS, BATCH, TRAIN = 6, 2, 20, 8, 24
RATES = dict(samples=4, threshold=2.0, title='it')


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
  """A random model that often stops, and repeats itself, in two tokens."""
  path = tmp_path_factory.mktemp('reward') / 'digits.py'
  path.write_text(REWARD)
  config = scripts.tiny_config()
  config.task.update(train=TRAIN, held_out=8, demonstrations=0)
  config.rewards = {'digits': {'name': f'{path}:digits', 'weight': 0.5}}
  config.rollout.max_tokens = 2
  config.evaluation.batch = BATCH
  return config, build.model(config.model, config.seed)


def make(subject, split='train', **settings):
  settings = dict(samples=SAMPLES, per_prompt=PER_PROMPT) | settings
  return label.make_pairs(*subject, split, **settings)


@pytest.fixture(scope='module')
def made(subject):
  return make(subject, prompts=PROMPTS)


def sampled(subject, count, samples, salts, later=()):
  """Yields (row, its responses as (text, finished, tokens)) of prompts."""
  config, model = subject
  rows = build.task(config, model.tokenizer).train[:count]
  encoded = build.encode(config, rows, model.tokenizer)
  generation = build.generation(
    config, model, encoded.pad_id, samples=samples, temperature=1.0
  )
  for start in range(0, count, BATCH):
    chosen = range(start, min(start + BATCH, count))
    key = jax.random.key(config.seed)
    for salt in (*salts, start, *later):
      key = jax.random.fold_in(key, salt)
    batch = prompts_lib.gather(encoded, chosen)
    _, found = rollouts.generate(
      model.config, model.params, batch, generation, key
    )
    for i, row in enumerate(chosen):
      responses = []
      for g in range(samples):
        ids = found.tokens[i, g][found.mask[i, g]].tolist()
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        responses.append((text, bool(found.finished[i, g]), ids))
      yield rows[row], responses


def score(text, finished):
  return sum(text.count(c) for c in '01234') + finished


def test_best_and_worst_are_paired_as_in_plain_python(subject, made):
  rows, counts = made
  names = 'unscored', 'repeated', 'tied', 'unfinished'
  expected, found = [], dict.fromkeys(names, 0)
  for row, responses in sampled(subject, PROMPTS, SAMPLES, (8, 0)):
    if row['prompt'][0] == '7':
      found['unscored'] += SAMPLES
      continue
    distinct = {}
    for text, finished, _ in responses:
      found['repeated'] += text in distinct
      distinct.setdefault(text, (0.5 * score(text, finished), finished))
    order = sorted(distinct, key=lambda text: -distinct[text][0])
    for i in range(min(len(order) // 2, PER_PROMPT)):
      best, worst = order[i], order[-1 - i]
      if distinct[best][0] == distinct[worst][0]:
        found['tied'] += 1
        continue
      pair = {}
      for name, text in (('chosen', best), ('rejected', worst)):
        pair[name] = text
        pair[f'{name}_score'], pair[f'{name}_finished'] = distinct[text]
        found['unfinished'] += not distinct[text][1]
      expected.append(row | pair)
  assert rows == expected and all(found.values())
  given = dict(pairs=len(rows), prompts=PROMPTS, over_budget=0, flipped=0)
  assert counts == given | found
  # Noise changes who is preferred.
  noisy, counts = make(subject, prompts=PROMPTS, noise=1e6)
  swapped = sum(row['chosen_score'] < row['rejected_score'] for row in noisy)
  assert counts['flipped'] == swapped
  assert 0 < swapped < len(noisy) == len(rows)


def test_who_learns_from_pairs_reads_the_tokens_that_were_sampled(
  subject, made, tmp_path
):
  config, model = subject
  # Text does not show padding and the like, which no trained model writes.
  special = set(model.tokenizer.all_special_ids) - set(model.eos_ids)
  ids = {
    (row['prompt'], text): [i for i in tokens if i not in special]
    for row, responses in sampled(subject, PROMPTS, SAMPLES, (8, 0))
    for text, _, tokens in responses[::-1]
  }
  pairs = {'train': made[0], 'held_out': make(subject, 'held_out')[0]}
  for name, rows in pairs.items():
    scripts.write_rows(tmp_path / f'{name}.jsonl', rows)
  found = data.jsonl(*(tmp_path / f'{name}.jsonl' for name in pairs))
  assert found.train == made[0] and found.held_out == pairs['held_out']
  encoded, pool = reward_model_script.encode(config, model, found.train)
  given = preference.given(config, model, found)
  for i, row in enumerate(made[0]):
    prompt = model.tokenizer(row['prompt']).input_ids
    for side, name in enumerate(('chosen', 'rejected')):
      expected = [*prompt, *ids[row['prompt'], row[name]]]
      for prompts, groups in ((encoded, pool), (given.encoded, given.pool)):
        count = groups.lengths[i, side]
        read = [*prompts.tokens[i], *groups.tokens[i, side, :count]]
        assert read == expected
  assert {1, 2} <= {len(tokens) for tokens in ids.values()}


def measure(subject, output, **settings):
  return label.measure_pass_rates(*subject, str(output), **RATES | settings)


@pytest.fixture(scope='module')
def rates(subject, tmp_path_factory):
  path = tmp_path_factory.mktemp('rates') / 'rates.jsonl'
  return path, measure(subject, path)


def test_rates_are_counts_of_right_responses(subject, rates):
  path, records = rates
  header, *lines = map(json.loads, path.read_text().splitlines())
  assert lines == records and header['settings']['samples'] == 4
  expected = []
  for row, responses in sampled(subject, TRAIN, 4, (7,), (0,)):
    right = sum(score(text, end) >= 2 for text, end, _ in responses)
    known = row['prompt'][0] != '7'
    rate = right / 4 if known else None
    expected.append(
      {'prompt': row['prompt'], 'pass_rate': rate, 'samples': 4 * known}
    )
  assert records == expected
  found = {record['pass_rate'] for record in records}
  assert None in found and len(found) > 2


@pytest.mark.parametrize('keep', [0, 14])
def test_an_interrupted_measurement_is_continued(
  subject, rates, keep, tmp_path
):
  path, records = rates
  lines = path.read_bytes().splitlines(True)
  output, partial = tmp_path / 'rates.jsonl', tmp_path / 'rates.jsonl.partial'
  partial.write_bytes(b''.join(lines[:keep]) + lines[keep][:9])
  assert measure(subject, output) == records
  assert output.read_bytes() == path.read_bytes() and not partial.exists()


def test_what_cannot_be_made_or_measured_is_refused(subject, rates, tmp_path):
  config, model = subject
  for settings, text in (
    (dict(temperature=0.0), 'all 6 samples of a prompt are equal'),
    (dict(samples=1), 'a pair needs at least 2'),
    (dict(noise=float('nan')), '--noise is nan'),
  ):
    with mistakes.refused(text):
      make(subject, **settings)
  output, partial = tmp_path / 'rates.jsonl', tmp_path / 'rates.jsonl.partial'
  moved = model._replace(params=jax.tree.map(lambda x: x + 1e-3, model.params))
  lines = rates[0].read_bytes().splitlines(True)
  other = 'begun with another model or other'
  for kept, used, settings, text in (
    ([], model, dict(metric='other'), "--metric is 'other'"),
    (lines[:12], model, dict(threshold=1.0), other),
    (lines[:12], moved, {}, other),
    ([lines[0], *lines[2:13]], model, {}, 'damaged'),
    ([lines[0], b'{"prom\n', *lines[1:12]], model, {}, 'damaged'),
  ):
    partial.write_bytes(b''.join(kept))
    with mistakes.refused(text):
      measure((config, used), output, **settings)
    partial.unlink(missing_ok=True)


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
  output = tmp_path / 'a' / 'pairs.jsonl'
  run = f'--workdir={scripts.undisturbed()}', '--trust_code'
  both = '--what=pairs', *run, f'--output={output}'
  ended = scripts.run('label', *both, '--split=held_out')
  assert ended.code == 0, ended.err
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert f'{len(rows)} pairs of {scripts.HELD_OUT} prompts' in ended.out
  assert np.all([row['chosen_score'] > row['rejected_score'] for row in rows])
  rates = *run, f'--output={tmp_path / "rates.jsonl"}'
  ended = scripts.run('label', '--what=pass_rates', *rates, '--samples=2')
  assert ended.code == 0 and ended.out.startswith('24 prompts: '), ended
  mistakes.assert_refused(scripts.call('label', *both), 'exists')
