"""Pairs of a model's responses: the choice in plain Python, and who learns."""

import json

import jax
import numpy as np
import pytest
import scripts

from experiments import build, data, make_pairs, preference
from experiments import reward_model as reward_model_script
from experiments.configs import quickstart
from jaxrl_llm import rollouts
from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import prompts as prompts_lib

# Whole numbers, so that scores are often equal; of some prompts none.
REWARD = """
def digits(prompts, completions, finished):
  return [
    None if p[0] == '7' else float(sum(c in '01234' for c in text)) + end
    for p, text, end in zip(prompts, completions, finished)
  ]
"""
SAMPLES, PER_PROMPT, PROMPTS, BATCH = 6, 2, 20, 8


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
  """A random model that often stops, and repeats itself, in two tokens."""
  path = tmp_path_factory.mktemp('reward') / 'digits.py'
  path.write_text(REWARD)
  config = quickstart.get_config()
  config.model.architecture.update(
    hidden_size=16, intermediate_size=16, num_layers=1
  )
  config.task.update(train=24, held_out=8, demonstrations=0)
  config.rewards = {'digits': {'name': f'{path}:digits', 'weight': 0.5}}
  config.rollout.max_tokens = 2
  config.evaluation.batch = BATCH
  return config, build.model(config.model, config.seed)


def make(subject, split='train', **settings):
  settings = dict(samples=SAMPLES, per_prompt=PER_PROMPT) | settings
  return make_pairs.make(*subject, split, **settings)


@pytest.fixture(scope='module')
def made(subject):
  return make(subject, prompts=PROMPTS)


def sampled(subject):
  """(row, its responses as (text, finished, tokens)) of the first prompts."""
  config, model = subject
  rows = build.task(config, model.tokenizer).train[:PROMPTS]
  encoded = build.encode(config, rows, model.tokenizer)
  generation = build.generation(
    config, model, encoded.pad_id, samples=SAMPLES, temperature=1.0
  )
  key = jax.random.fold_in(jax.random.key(config.seed), 8)
  key = jax.random.fold_in(key, 0)
  for start in range(0, PROMPTS, BATCH):
    chosen = range(start, min(start + BATCH, PROMPTS))
    _, found = rollouts.generate(
      model.config,
      model.params,
      prompts_lib.gather(encoded, chosen),
      generation,
      jax.random.fold_in(key, start),
    )
    for i, row in enumerate(chosen):
      responses = []
      for g in range(SAMPLES):
        ids = found.tokens[i, g][found.mask[i, g]].tolist()
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        responses.append((text, bool(found.finished[i, g]), ids))
      yield rows[row], responses


def test_best_and_worst_are_paired_as_in_plain_python(subject, made):
  expected, counts = [], dict(unscored=0, repeated=0, tied=0, unfinished=0)
  for row, responses in sampled(subject):
    if row['prompt'][0] == '7':
      counts['unscored'] += SAMPLES
      continue
    distinct = {}
    for text, finished, _ in responses:
      counts['repeated'] += text in distinct
      score = sum(text.count(c) for c in '01234') + finished
      distinct.setdefault(text, (0.5 * score, finished))
    order = sorted(distinct, key=lambda text: -distinct[text][0])
    for i in range(min(len(order) // 2, PER_PROMPT)):
      best, worst = order[i], order[-1 - i]
      if distinct[best][0] == distinct[worst][0]:
        counts['tied'] += 1
        continue
      pair = {}
      for name, text in (('chosen', best), ('rejected', worst)):
        pair[name] = text
        pair[f'{name}_score'], pair[f'{name}_finished'] = distinct[text]
        counts['unfinished'] += not distinct[text][1]
      expected.append(row | pair)
  assert made.rows == expected
  assert made.prompts == PROMPTS and made.over_budget == made.flipped == 0
  for name, count in counts.items():
    assert getattr(made, name) == count > 0, name
  assert any(row['chosen_finished'] for row in made.rows)
  said = make_pairs.summary(made)
  assert f'{len(expected)} pairs of {PROMPTS} prompts' in said
  assert f'{counts["tied"]} pairs with equal scores' in said


def test_noise_changes_who_is_preferred_and_nothing_else(subject, made):
  noisy = make(subject, prompts=PROMPTS, noise=1e6)
  assert noisy == make(subject, prompts=PROMPTS, noise=1e6)
  swapped = 0
  for row, sure in zip(noisy.rows, made.rows, strict=True):
    if row != sure:
      other = {'chosen': 'rejected', 'rejected': 'chosen'}
      back = {
        name.replace(old, other[old]): row[name]
        for name in row
        for old in [name.split('_')[0]]
        if old in other
      }
      assert row | back == sure
      assert row['chosen_score'] < row['rejected_score']
      swapped += 1
  assert noisy.flipped == swapped
  assert 0 < swapped < len(made.rows)
  assert make(subject, prompts=PROMPTS, noise=1e-6).rows == made.rows
  assert make(subject, prompts=PROMPTS, seed=1).rows != made.rows


def test_who_learns_from_pairs_reads_the_tokens_that_were_sampled(
  subject, made, tmp_path
):
  config, model = subject
  # A text tells nothing of padding and the like, which no trained model writes.
  special = set(model.tokenizer.all_special_ids) - set(model.eos_ids)
  ids = {
    (row['prompt'], text): [i for i in tokens if i not in special]
    for row, responses in sampled(subject)
    for text, _, tokens in responses[::-1]
  }
  held = make(subject, 'held_out')
  for name, rows in (('train', made.rows), ('held_out', held.rows)):
    make_pairs.write(str(tmp_path / 'pairs' / f'{name}.jsonl'), rows)
  found = data.jsonl(
    tmp_path / 'pairs' / 'train.jsonl', tmp_path / 'pairs' / 'held_out.jsonl'
  )
  assert found.train == made.rows and found.held_out == held.rows
  shared = {row['prompt'] for row in made.rows}
  assert shared.isdisjoint(row['prompt'] for row in held.rows)
  encoded, pool = reward_model_script.encode(config, model, found.train)
  given = preference.given(config, model, found)
  for i, row in enumerate(made.rows):
    prompt = model.tokenizer(row['prompt']).input_ids
    for side, name in enumerate(('chosen', 'rejected')):
      expected = [*prompt, *ids[row['prompt'], row[name]]]
      for prompts, groups in ((encoded, pool), (given.encoded, given.pool)):
        count = groups.lengths[i, side]
        read = [*prompts.tokens[i], *groups.tokens[i, side, :count]]
        assert read == expected
  assert {1, 2} <= {len(tokens) for tokens in ids.values()}


def test_what_makes_no_pairs_is_refused(subject, made, tmp_path):
  config, model = subject
  equal = config.copy_and_resolve_references()
  equal.rewards.digits.weight = 0.0
  for other, settings, words in (
    (config, dict(temperature=0.0), 'all 6 samples of a prompt are equal'),
    (config, dict(noise=float('nan')), '--noise is nan'),
    (config, dict(noise=-1.0), '--noise is -1.0'),
    (equal, dict(prompts=4), 'no prompt of the split train'),
  ):
    with pytest.raises(UserError, match=words) as caught:
      make((other, model), **settings)
    assert len(str(caught.value).splitlines()) <= 3
  (tmp_path / 'pairs.jsonl').mkdir()
  with pytest.raises(UserError, match='cannot be written'):
    make_pairs.write(str(tmp_path / 'pairs.jsonl'), made.rows)
  with pytest.raises(UserError, match='row 0 cannot be written as JSON'):
    make_pairs.write(str(tmp_path / 'other.jsonl'), [{'prompt': {1, 2}}])
  assert [path.name for path in tmp_path.iterdir()] == ['pairs.jsonl']


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
  output = tmp_path / 'pairs.jsonl'
  arguments = f'--workdir={scripts.undisturbed()}', f'--output={output}'
  trusting = *arguments, '--trust_code', '--split=held_out'
  ended = scripts.run('make_pairs', *trusting)
  assert ended.code == 0, ended.err
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert f'{len(rows)} pairs of {scripts.HELD_OUT} prompts' in ended.out
  assert np.all([row['chosen_score'] > row['rejected_score'] for row in rows])
  for wrong, words in (
    (arguments, 'exists'),
    (arguments[:1], '--output is None'),
    ((*arguments, '--metric=correct'), 'unknown flag --metric'),
  ):
    ended = scripts.run('make_pairs', *wrong)
    assert ended.code == 2 and words in ended.err
    assert len(ended.err.splitlines()) <= 3
