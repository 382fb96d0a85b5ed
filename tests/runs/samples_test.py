"""Tables and pages of samples, also of files that were edited or cut short."""

import dataclasses
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError
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
    self.tags, self.attributes, self.cells = [], [], []
    self.text = path.read_text(encoding='utf-8')
    self.feed(self.text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag in ('td', 'th'):
      self.cells.append([attrs[0][1], ''])

  def handle_data(self, data):
    if self.cells:
      self.cells[-1][1] += data.strip()


def draw(table, width=100):
  stream = io.StringIO()
  Console(file=stream, width=width).print(table)
  return stream.getvalue()


def page_of(folder, samples, *pairs, **options):
  with runs.SampleLog(folder, **options) as log:
    log.write(samples)
    log.write_html('Run', *pairs)
  return Parser(folder / 'samples.html')


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


@pytest.mark.parametrize(
  'text, shown',
  [
    ('\x1b[31m\x00\x7f\x85\ud800', '␛[31m␀␡\ufffd\ufffd'),
    *(
      (chr(code), f'\\u{code:04x}')
      for code in (0xAD, 0x61C, 0x200B, 0x200E, 0x200F, 0x2028, 0x202E, 0x2066)
      + (0xFEFF, 0xFFF9)
    ),
    *((chr(code), f'\\U{code:08x}') for code in (0xE0000, 0xE0041, 0xE007F)),
    *(
      (x, x)
      for x in ('é 数\u3000\xa0', '👩\u200d💻', 'ن\u200cخ', '\u0600', '\n\t')
    ),
  ],
)
def test_characters_that_hide_or_reorder_are_shown(text, shown):
  assert progress.visible(f'a{text}b') == f'a{shown}b'
  assert progress.visible('a\nb\tc', keep='') == 'a␊b␉c'


def test_page_is_escaped_and_stands_alone(tmp_path):
  rows = [sample(1, HOSTILE, prompt=HOSTILE, rewards={HOSTILE: 1.0})]
  with runs.SampleLog(tmp_path) as log:
    log.write(rows)
    log.write_html(HOSTILE, rows, rows)
  parsed = Parser(tmp_path / 'samples.html')
  allowed = {'html', 'meta', 'title', 'style', 'h1', 'h2', 'p', 'div'}
  assert set(parsed.tags) <= allowed | {'table', 'tr', 'th', 'td'}
  allowed = {'lang', 'charset', 'name', 'content', 'class'}
  assert {name for name, _ in parsed.attributes} <= allowed
  assert not re.search(r'https?:|//|url\(|@import|<script', parsed.text)
  assert [text for _, text in parsed.cells].count(SHOWN) == 6
  edited = {'<script>': [sample('<script>')]}
  assert '<script' not in page.render('Run', edited, (1, 1), [], 0)


def test_page_shows_the_latest_steps_and_reads_the_file_once(tmp_path):
  rows = [[sample(i, f'answer {i}.')] * 2 for i in range(1, SHOWN_STEPS + 4)]
  few, many = rows[:9], rows[9:]
  text = page_of(tmp_path, sum(few, [])).text
  assert '18 samples of 9 steps' in text and 'answer 1.' in text
  assert 'are shown' not in text
  with runs.SampleLog(tmp_path, resume_step=8) as log:
    (tmp_path / 'samples.jsonl').unlink()
    log.write(sum([few[-1], *many], []))
    log.write_html('Run')
  text = Parser(tmp_path / 'samples.html').text
  assert f'{2 * len(rows)} samples of {len(rows)} steps' in text
  assert f'The latest {SHOWN_STEPS} are shown; all are in samples.js' in text
  assert 'answer 4.' in text and 'answer 3.' not in text
  assert text.index('Step 10,') < text.index('Step 9,')
  # A run continues without its samples.
  assert '0 samples of 0 steps' in page_of(tmp_path, [], resume_step=99).text


def test_page_separates_training_from_held_out_samples(tmp_path):
  held = sample(4, 'held', advantage=None)
  text = page_of(tmp_path, [sample(4, 'trained'), held, sample(3)]).text
  _, training, others, _ = re.split('<h2>Step ', text)
  assert training.startswith('4, training<') and 'trained' in training
  assert others.startswith('4, held out<') and 'held</td>' in others
  assert 'advantage' in training and 'advantage' not in others
  rows = [sample(advantage=a) for a in (3.0, -3.0, 0.0, math.nan)]
  found = page_of(tmp_path, rows).cells[7:]
  assert ['number good', '3'] in found and ['number bad', '-3'] in found
  assert ['number', '0'] in found and ['number', 'nan'] in found


def test_table_on_screen():
  rows = [sample(1, HOSTILE), sample(1, 'x' * 500, finished=False)]
  rows[0].rewards['[b]n\u202e\x1b'] = 1.0
  text = draw(runs.sample_table(rows, title='Step 1'), width=240)
  for part in ('Step 1', 'exact', 'advantage', '[red]x[/red]', '1+', '…'):
    assert part in text
  assert '[b]n\\u202e␛' in text and not re.search('[\x1b\x00\u202e]', text)
  assert 250 < text.count('x') < 320
  # A short text is shown whole; a single reward that is the sum is not shown.
  rows = [sample(rewards={'exact': 1.0}, reward=1.0)]
  text = draw(runs.sample_table(rows))
  assert '…' not in text and 'exact' not in text
  rows.append(sample(rewards={'exact': 1.0}, reward=0.5))
  assert 'exact' in draw(runs.sample_table(rows))


@pytest.mark.parametrize(
  'change',
  [
    *({'step': value} for value in (True, 1.0, '1', None, [1])),
    *({'tokens': value} for value in ('<b>7</b>', None, 7.5, True)),
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
  if 'step' not in change:
    with pytest.raises(UserError, match='line 2: not a'):
      runs.SampleLog(tmp_path, resume_step=1)
  assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
  'before, after, pairs',
  [
    ('abc', 'abc', 'abc'),
    ('abc', 'a', 'a'),  # the last lines are gone
    ('abc', 'ac', 'ac'),
    ('bc', 'ab', 'b'),
    ('abcabc', 'abcabd', 'abcab'),
    ('ab', 'cd', ''),
  ],
)
def test_what_has_no_counterpart_is_left_out_and_counted(
  before, after, pairs, tmp_path
):
  # Signs of the changes of reward: better for a, worse for b, else unchanged.
  new_reward = {'a': 2.0, 'b': 1.0, 'c': 1.5, 'd': None}
  old = [sample(0, f'{prompt}0', prompt=prompt) for prompt in before]
  new = [
    sample(2, f'{prompt}2', prompt=prompt, reward=new_reward[prompt])
    for prompt in after
  ]
  table = runs.before_after_table(old, new)
  text = draw(table, width=200)
  total = len(before) + len(after) - len(pairs)
  lost = f'({len(pairs)} of {total}: samples.jsonl lacks the rest)'
  assert (lost in text) == (total > len(pairs)) and len(table.rows) == len(
    pairs
  )
  for prompt in pairs:
    shown = f'{new_reward[prompt]:g}'
    assert re.search(f'{prompt} +{prompt}0 +{prompt}2 +1.5 +{shown} ', text)
  parsed = page_of(tmp_path, old + new, old, new)
  lost = f'{total - len(pairs)} held-out prompts lack a sample of'
  assert (lost in parsed.text) == (total > len(pairs))
  kinds = {'a': 'number good', 'b': 'number bad', 'c': 'number'}
  found = [kind for kind, _ in parsed.cells[5 : 5 + 5 * len(pairs)]]
  assert found[4::5] == [kinds[prompt] for prompt in pairs]
