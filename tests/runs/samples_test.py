"""Tables and pages of samples, also of files that were edited or cut short."""

import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import Sample, page


def sample(step=1, response='4', **changes):
  values = {
    'step': step,
    'prompt': '2 + 2 =',
    'response': response,
    'rewards': {'exact': 1.0, 'format': 0.5},
    'reward': 1.5,
    'advantage': 0.25,
    'tokens': 1,
    'finished': True,
  }
  return Sample(**{**values, **changes})


HOSTILE = (
  '<script>alert(1)</script> & "q" [red]x[/red]\x1b[31m\x00\ud800 é 数\u202e'
)


class Parser(html.parser.HTMLParser):
  """Collects tags, attributes and the text of the cells."""

  def __init__(self):
    super().__init__()
    self.tags, self.attributes, self.cells = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag == 'td':
      self.cells.append('')

  def handle_data(self, data):
    if self.cells:
      self.cells[-1] += data


def parse(path):
  parser = Parser()
  parser.feed(path.read_text(encoding='utf-8'))
  return parser


def draw(*tables, width=100):
  stream = io.StringIO()
  stream.isatty = lambda: False
  from rich.console import Console

  console = Console(file=stream, width=width, highlight=False)
  for table in tables:
    console.print(table, markup=False)
  return stream.getvalue()


def test_samples_round_trip(tmp_path):
  rows = [
    sample(),
    sample(2, HOSTILE, rewards={'exact': None, 'format': np.float32(0.1)}),
    sample(3, 'nan', reward=math.inf, advantage=None, finished=np.bool_(False)),
  ]
  with runs.SampleLog(tmp_path) as log:
    log.write(rows)
  read = runs.read_samples(tmp_path / 'samples.jsonl')
  assert read[0] == rows[0]
  assert read[1].response == HOSTILE
  assert read[1].rewards == {'exact': None, 'format': float(np.float32(0.1))}
  assert read[2].response == 'nan' and read[2].reward == math.inf
  assert read[2].advantage is None and read[2].finished is False


def test_page_is_escaped_and_stands_alone(tmp_path):
  rows = [sample(1, HOSTILE, prompt=HOSTILE, rewards={HOSTILE: 1.0})]
  with runs.SampleLog(tmp_path) as log:
    log.write(rows)
    log.write_html(HOSTILE, rows, rows)
  parser = parse(tmp_path / 'samples.html')
  allowed = {'html', 'meta', 'title', 'style', 'h1', 'h2', 'p', 'div'}
  assert set(parser.tags) <= allowed | {'table', 'tr', 'th', 'td'}
  assert {name for name, _ in parser.attributes} <= {
    *('lang', 'charset', 'name', 'content', 'class')
  }
  text = (tmp_path / 'samples.html').read_text(encoding='utf-8')
  assert not re.search(r'https?:|//|url\(|@import|<script', text)
  shown = '<script>alert(1)</script> & "q" [red]x[/red]␛[31m␀\ufffd é 数\\u202e'
  assert [cell.strip() for cell in parser.cells].count(shown) == 5


def test_page_shows_what_it_leaves_out(tmp_path):
  with runs.SampleLog(tmp_path) as log:
    for step in range(1, 8):
      log.write([sample(step, f'answer {step}')])
    log.write_html('Run', steps=3)
    text = (tmp_path / 'samples.html').read_text()
    assert '7 samples of 7 steps' in text
    assert 'The latest 3 steps are shown; all are in samples.jsonl.' in text
    assert 'answer 5' in text and 'answer 4' not in text
    assert text.index('Step 7') < text.index('Step 5')
    log.write_html('Run')
    text = (tmp_path / 'samples.html').read_text()
    assert 'answer 1' in text and 'steps are shown' not in text


def test_page_colours_advantages(tmp_path):
  with runs.SampleLog(tmp_path) as log:
    log.write(
      [sample(1, advantage=a) for a in (1.0, -1.0, 0.0, math.nan, None)]
    )
    log.write_html('Run')
  text = (tmp_path / 'samples.html').read_text()
  cells = re.findall(r'<td class="(number[^"]*)">([^<]*)</td>', text)
  signs = [cell for cell in cells if cell[1] in ('1', '-1', '0', 'nan', '–')]
  good = [('number good', '1'), ('number bad', '-1'), ('number', '0')]
  assert [s for s in signs if s != ('number', '1')] == [
    *good,
    ('number', 'nan'),
    ('number', '–'),
  ]


def test_table_on_screen(tmp_path):
  rows = [sample(1, HOSTILE), sample(1, 'x' * 500, finished=False)]
  text = draw(runs.sample_table(rows, title='Step 1', width=90))
  assert 'Step 1' in text and 'exact' in text and 'advantage' in text
  assert '[red]x[/red]' in text and '\x1b' not in text and '\x00' not in text
  assert text.count('x') - draw(runs.sample_table(rows[:1])).count('x') < 95
  assert '…' in text and '1+' in text
  # A short text is shown whole, without the sign of something left out.
  assert '…' not in draw(runs.sample_table([sample()]))


def test_a_single_reward_is_shown_once():
  rows = [sample(rewards={'exact': 1.0}, reward=1.0)]
  assert 'exact' not in draw(runs.sample_table(rows))
  rows.append(sample(rewards={'exact': 1.0}, reward=0.5))
  assert 'exact' in draw(runs.sample_table(rows))


def test_before_and_after():
  before = [sample(0, 'five', reward=0.0), sample(0, '9', prompt='3 * 3 =')]
  after = [sample(9, 'four', reward=1.0), sample(9, '9', prompt='3 * 3 =')]
  text = draw(runs.before_after_table(before, after))
  row = next(line for line in text.splitlines() if 'five' in line)
  assert row.split() == ['2', '+', '2', '=', 'five', 'four', '0', '1']
  assert 'lacks' not in text
  assert page.change(before[0], after[0]) == 'good'
  assert page.change(after[0], before[0]) == 'bad'
  assert page.change(before[1], after[1]) == ''


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
