"""Tables and pages of samples, also of files that were edited or cut short."""

import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from mistakes import refused
from rich.console import Console

from jaxrl_llm import runs
from jaxrl_llm.runs import Sample, page, progress
from jaxrl_llm.runs.samples import SHOWN_STEPS


def sample(step=1, response='4', **changes):
  rewards = {'exact': 1.0, 'format': 0.5}
  made = Sample(step, '2 + 2 =', response, rewards, 1.5, 0.25, 1, True)
  return dataclasses.replace(made, **changes)


HOSTILE = (
  '<script>alert(1)</script> & "q" [red]x[/red]\x1b[31m\x00\ud800 é 数\u202e'
)
SHOWN = '<script>alert(1)</script> & "q" [red]x[/red]␛[31m␀\ufffd é 数\\u202e'


class Parser(html.parser.HTMLParser):
  """Collects tags, attributes, and the texts of cells and heads by class."""

  def __init__(self, path):
    super().__init__()
    self.tags, self.attributes, self.cells = set(), set(), []
    self.text = path.read_text(encoding='utf-8')
    self.feed(self.text)

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes |= {name for name, _ in attrs}
    if tag in ('td', 'th'):
      self.cells.append([attrs[0][1], ''])

  def handle_data(self, data):
    if self.cells:
      self.cells[-1][1] += data.strip()


def draw(table, width=100):
  stream = io.StringIO()
  Console(file=stream, width=width).print(table)
  return stream.getvalue()


def page_of(folder, samples, *pairs, title='Run', **options):
  with runs.SampleLog(folder, **options) as log:
    log.write(samples)
    log.write_html(title, *pairs)
  return Parser(folder / 'samples.html')


def test_samples_round_trip(tmp_path):
  rows = [
    sample(),
    sample(2, HOSTILE, rewards={'exact': None, 'format': np.float32(0.5)}),
    sample(3, 'nan', reward=math.inf, advantage=None, finished=np.bool_(False)),
  ]
  with runs.SampleLog(tmp_path) as log:
    log.write(rows)
  assert runs.read_samples(tmp_path / 'samples.jsonl') == rows


@pytest.mark.parametrize(
  'text, shown',
  [
    ('\x1b[31m\x00\x7f\x85\ud800', '␛[31m␀␡\ufffd\ufffd'),
    *((x, f'\\u{ord(x):04x}') for x in '\xad\u200b\u200e\u2028\u202e\u2066'),
    *((x, f'\\U{ord(x):08x}') for x in '\U000e0000\U000e0041'),
    *((x, x) for x in ('é 数\u3000\xa0', '👩\u200d💻', 'ن\u200cخ', '\n\t')),
  ],
)
def test_characters_that_hide_or_reorder_are_shown(text, shown):
  assert progress.visible(f'a{text}b') == f'a{shown}b'
  assert progress.visible('a\nb\tc', keep='') == 'a␊b␉c'


def test_page_is_escaped_and_stands_alone(tmp_path):
  rows = [sample(1, HOSTILE, prompt=HOSTILE, rewards={HOSTILE: 1.0})]
  parsed = page_of(tmp_path, rows, rows, rows, title=HOSTILE)
  allowed = {'html', 'meta', 'title', 'style', 'h1', 'h2', 'p', 'div'}
  assert parsed.tags <= allowed | {'table', 'tr', 'th', 'td'}
  assert parsed.attributes <= {'lang', 'charset', 'name', 'content', 'class'}
  assert not re.search(r'https?:|//|url\(|@import|<script', parsed.text)
  assert [text for _, text in parsed.cells].count(SHOWN) == 6
  edited = {'<script>': [sample('<script>')]}
  assert '<script' not in page.render('Run', edited, (1, 1), [], 0)


def test_page_shows_the_latest_steps_and_reads_the_file_once(tmp_path):
  rows = [[sample(i, f'answer {i}.')] * 2 for i in range(1, SHOWN_STEPS + 4)]
  text = page_of(tmp_path, sum(rows[:9], [])).text
  assert '18 samples of 9 steps' in text and 'answer 1.' in text
  with runs.SampleLog(tmp_path, resume_step=8) as log:
    (tmp_path / 'samples.jsonl').unlink()
    log.write(sum(rows[8:], []))
    log.write_html('Run')
  text = Parser(tmp_path / 'samples.html').text
  assert f'{2 * len(rows)} samples of {len(rows)} steps' in text
  assert f'The latest {SHOWN_STEPS} are shown; all are in samples.js' in text
  assert 'answer 4.' in text and 'answer 3.' not in text
  # A run continues without its samples.
  assert '0 samples of 0 steps' in page_of(tmp_path, [], resume_step=99).text


def test_table_on_screen():
  rows = [sample(1, HOSTILE), sample(1, 'x' * 500, finished=False)]
  rows[0].rewards['[b]n\u202e\x1b'] = 1.0
  text = draw(runs.sample_table(rows, title='Step 1'), width=240)
  for part in ('Step 1', 'exact', 'advantage', '[red]x[/red]', '1+', '…'):
    assert part in text
  assert '[b]n\\u202e␛' in text and not re.search('[\x1b\x00\u202e]', text)
  assert 250 < text.count('x') < 320


@pytest.mark.parametrize(
  'change',
  [
    *({'step': True}, {'tokens': True}, {'prompt': ['<b>']}),
    *({'finished': 1}, {'response': {}}, {'more': 1}, {'rewards': [1.0]}),
    *({'reward': '1'}, {'reward': 10**400}, {'rewards': {'exact': '<b>'}}),
  ],
)
def test_what_is_no_sample_is_named(change, tmp_path):
  with runs.SampleLog(tmp_path) as log:
    log.write([sample(), sample()])
  path = tmp_path / 'samples.jsonl'
  first, second = path.read_text().splitlines(keepends=True)
  path.write_text(first + json.dumps(json.loads(second) | change) + '\n')
  with refused('samples.jsonl, line 2: not a'):
    runs.read_samples(path)


@pytest.mark.parametrize(
  'before, after, pairs',
  [
    ('abc', 'abc', 'abc'),
    ('abc', 'a', 'a'),  # the last lines are gone
    ('bc', 'ab', 'b'),
    ('abcabc', 'abcabd', 'abcab'),
    ('ab', 'cd', ''),
  ],
)
def test_what_has_no_counterpart_is_left_out_and_counted(
  before, after, pairs, tmp_path
):
  reward = {'a': 2.0, 'b': 1.0, 'c': 1.5, 'd': None}
  old = [sample(0, f'{x}0', prompt=x) for x in before]
  new = [sample(2, f'{x}2', prompt=x, reward=reward[x]) for x in after]
  table = runs.before_after_table(old, new)
  text = draw(table, width=200)
  total = len(before) + len(after) - len(pairs)
  lost = f'({len(pairs)} of {total}: samples.jsonl lacks the rest)'
  assert (lost in text) == (total > len(pairs))
  assert len(table.rows) == len(pairs)
  for x in pairs:
    assert re.search(f'{x} +{x}0 +{x}2 +1.5 +{reward[x]:g} ', text)
  parsed = page_of(tmp_path, old + new, old, new)
  lost = f'{total - len(pairs)} held-out prompts lack a sample of'
  assert (lost in parsed.text) == (total > len(pairs))
