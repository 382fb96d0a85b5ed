"""Files of samples that were edited, cut short or lost."""

import dataclasses
import json
import re

import pytest

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import page
from tests.runs.records_and_samples_test import draw, sample


@pytest.mark.parametrize(
  'change',
  [
    *({'step': value} for value in (True, 1.0, '1', None, [1])),
    *({'tokens': value} for value in ('<b>7</b>', None, 7.5)),
    *({'prompt': value} for value in (None, 3, ['<b>'])),
    *({'finished': 1}, {'response': {}}, {'rewards': [1.0]}, {'more': 1}),
    *({'reward': value} for value in ('1', '<b>', True, [1.0], 10**400)),
    *({'advantage': 'Infinity'}, {'rewards': {'exact': '<b>x</b>'}}),
  ],
)
def test_what_is_no_sample_is_named(change, tmp_path):
  with runs.SampleLog(tmp_path) as log:
    log.write([sample(), sample()])
  path = tmp_path / 'samples.jsonl'
  first, second = path.read_text().splitlines(keepends=True)
  path.write_text(first + json.dumps(json.loads(second) | change) + '\n')
  with pytest.raises(UserError, match='samples.jsonl, line 2: not a') as error:
    runs.read_samples(path)
  assert len(str(error.value).splitlines()) <= 3


def test_an_edited_step_injects_nothing(tmp_path):
  edited = dataclasses.replace(sample(), step='<script>alert(1)</script>')
  assert '<script' not in page.render('Run', [edited], [], 5)
  log = runs.SampleLog(tmp_path)
  log.write([sample()])
  path = tmp_path / 'samples.jsonl'
  path.write_text(path.read_text().replace('"step": 1', '"step": "<b>"'))
  with pytest.raises(UserError, match='line 1'):
    log.write_html('Run')
  log.close()


@pytest.mark.parametrize('kept', [0, 1, None])
def test_a_run_goes_on_without_its_samples_and_says_so(kept, tmp_path):
  before = [sample(0, 'a', prompt=str(i)) for i in range(3)]
  after = [sample(2, 'b', prompt=str(i)) for i in range(3)]
  with runs.SampleLog(tmp_path) as log:
    log.write(before)
  path = tmp_path / 'samples.jsonl'
  if kept is None:
    path.unlink()
  else:
    path.write_text(''.join(path.read_text().splitlines(True)[:kept]))
  with runs.SampleLog(tmp_path, resume_step=1) as log:
    log.write(after)
    found = runs.read_samples(path)
    old = [each for each in found if each.step == 0]
    log.write_html('Run', old, found[len(old) :])
  left = kept or 0
  text = (tmp_path / 'samples.html').read_text()
  assert f'{3 - left} held-out prompts lack a sample of before or' in text
  table = draw(runs.before_after_table(old, after), width=200)
  assert f'({left} of 3: samples.jsonl lacks the rest)' in table


@pytest.mark.parametrize(
  'before, after, pairs',
  [
    ('abc', 'a', 'a'),  # the last lines are gone
    ('abc', 'ac', 'ac'),
    ('bc', 'ab', 'b'),
    ('abcabc', 'abc', 'abc'),  # doubled
    ('ab', 'cd', ''),
  ],
)
def test_what_has_no_counterpart_is_left_out_and_counted(
  before, after, pairs, tmp_path
):
  old = [sample(0, f'{prompt}0', prompt=prompt) for prompt in before]
  new = [sample(2, f'{prompt}2', prompt=prompt) for prompt in after]
  table = runs.before_after_table(old, new, title='T')
  text = draw(table, width=200)
  total = len(before) + len(after) - len(pairs)
  assert f'T ({len(pairs)} of {total}: samples.jsonl lacks the rest)' in text
  for prompt in pairs:
    assert re.search(f'{prompt} +{prompt}0 +{prompt}2 ', text)
  assert len(table.rows) == len(pairs)
  with runs.SampleLog(tmp_path) as log:
    log.write(old + new)
    log.write_html('Run', old, new)
  text = (tmp_path / 'samples.html').read_text()
  assert f'{total - len(pairs)} held-out prompts lack a sample of' in text
