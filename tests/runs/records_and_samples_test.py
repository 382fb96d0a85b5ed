"""Records, sample tables, progress and plots."""

import errno
import functools
import html.parser
import io
import json
import math
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import runs
from jaxrl_llm.errors import UserError
from jaxrl_llm.runs import Sample, page, records


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


def write_steps(folder, steps, resume_step=None):
  with (
    runs.MetricsWriter(folder, resume_step) as writer,
    runs.SampleLog(folder, resume_step) as samples,
  ):
    for step in steps:
      writer.write(step, {'reward': step / 7, 'n': step}, {'step_time': 0.1})
      samples.write([sample(step, f'{step}a'), sample(step, f'{step}b')])
    writer.sync()
    samples.sync()


FILES = ('metrics.jsonl', 'timings.jsonl', 'samples.jsonl')


def contents(folder):
  return [(folder / name).read_bytes() for name in FILES]


def test_one_line_per_step_in_full_precision(tmp_path):
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'b': 0.1, 'a': np.float32(0.1), 'n': jnp.int32(3)})
    writer.write(2, {'b': 1e-300, 'a': True, 'n': np.int64(2**60)})
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert lines == [
    '{"step": 1, "b": 0.1, "a": 0.10000000149011612, "n": 3}',
    '{"step": 2, "b": 1e-300, "a": 1, "n": 1152921504606846976}',
  ]
  assert (tmp_path / 'timings.jsonl').read_bytes() == b''


def test_nan_is_kept_and_valid_json(tmp_path):
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(
      1, {'a': jnp.float32(jnp.nan), 'b': math.inf, 'c': -np.inf, 'd': 1.0}
    )
  text = (tmp_path / 'metrics.jsonl').read_text()

  def refuse(name):
    raise AssertionError(name)

  record = json.loads(text, parse_constant=refuse)
  assert record == {'step': 1, 'a': 'nan', 'b': 'inf', 'c': '-inf', 'd': 1.0}
  (record,) = runs.read_metrics(tmp_path / 'metrics.jsonl')
  assert math.isnan(record['a'])
  assert (record['b'], record['c'], record['d']) == (math.inf, -math.inf, 1)


@pytest.mark.parametrize('value', [np.zeros(2), np.zeros(1), None, '0.5', 1j])
def test_what_is_no_number_is_named(tmp_path, value):
  with runs.MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match='metric reward'):
      writer.write(1, {'reward': value})
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b''


def test_steps_ascend(tmp_path):
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(3, {})
    for step in (3, 2):
      with pytest.raises(ValueError, match='does not follow step 3'):
        writer.write(step, {})


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
  with runs.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'a': 1})
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 1, "a": 1}\n'


@pytest.mark.parametrize('broken', [b'', b'{"step": 9, "rew', b'\x00' * 40])
def test_resumed_files_equal_uninterrupted_ones(tmp_path, broken):
  for name in ('whole', 'killed'):
    (tmp_path / name).mkdir()
  write_steps(tmp_path / 'whole', range(1, 13))
  write_steps(tmp_path / 'killed', range(1, 9))
  for name in FILES:
    with open(tmp_path / 'killed' / name, 'ab') as file:
      file.write(broken)
  write_steps(tmp_path / 'killed', range(6, 13), resume_step=5)
  assert contents(tmp_path / 'killed') == contents(tmp_path / 'whole')
  assert not list(tmp_path.rglob('*.tmp'))


def test_a_last_line_without_its_end_is_cut(tmp_path):
  # All of the record is there but the line's end: a record may be too short.
  write_steps(tmp_path, [1, 2])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='ends at step 1, but .* step 2'):
    runs.MetricsWriter(tmp_path, resume_step=2)


@pytest.mark.parametrize('kept', [None, b'', b'{"step": 1}\n{"step": 2}\n'])
def test_missing_records_are_named(tmp_path, kept):
  if kept is not None:
    (tmp_path / 'metrics.jsonl').write_bytes(kept)
  with pytest.raises(UserError, match='metrics.jsonl .* step 3') as error:
    runs.MetricsWriter(tmp_path, resume_step=3)
  assert len(str(error.value).splitlines()) <= 3
  # Resuming at the very start needs no record.
  runs.MetricsWriter(tmp_path, resume_step=0).close()


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match='metrics.jsonl, line 2'):
    runs.MetricsWriter(tmp_path, resume_step=3)
  with pytest.raises(UserError, match='metrics.jsonl, line 2'):
    runs.read_metrics(path)
  assert path.read_bytes().count(b'\n') == 3


def test_without_a_checkpoint_all_records_go(tmp_path):
  write_steps(tmp_path, [1, 2])
  write_steps(tmp_path, [1])
  assert [r['step'] for r in runs.read_metrics(tmp_path / FILES[0])] == [1]


def test_tensorboard_holds_the_scalars(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  write_steps(tmp_path, [1, 2])
  (path,) = (tmp_path / 'tb').iterdir()
  content, found = path.read_bytes(), {}
  while content:
    # A TFRecord: length, its checksum, the event, its checksum.
    size = int.from_bytes(content[:8], 'little')
    event = Event.FromString(content[12 : 12 + size])
    content = content[16 + size :]
    for value in event.summary.value:
      found[value.tag, event.step] = value.simple_value
  assert found['reward', 2] == pytest.approx(2 / 7)
  assert found['timings/step_time', 1] == pytest.approx(0.1)
  assert {tag for tag, _ in found} == {'reward', 'n', 'timings/step_time'}


def test_a_full_disk_is_said(tmp_path):
  script = """
import resource, sys
from jaxrl_llm.runs.records import RecordFile
file = RecordFile(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (50, -1))
for step in range(9):
  try:
    file.write({'step': step})
  except Exception as error:
    print(type(error).__name__, error)
    break
"""
  path = tmp_path / 'm.jsonl'
  result = subprocess.run(
    [sys.executable, '-c', script, path], capture_output=True, text=True
  )
  assert 'UserError' in result.stdout and 'm.jsonl cannot be' in result.stdout
  assert result.stdout.count('\n') <= 3
  # What is whole can be resumed.
  records.cut(path, 2)
  assert [r['step'] for r in records.read_records(path)] == [0, 1, 2]


HOSTILE = (
  '<script>alert(1)</script> & "q" [red]x[/red]\x1b[31m\x00\ud800 é 数\u202e'
)


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


def draw(*tables, width=100):
  stream = io.StringIO()
  stream.isatty = lambda: False
  from rich.console import Console

  console = Console(file=stream, width=width, highlight=False)
  for table in tables:
    console.print(table, markup=False)
  return stream.getvalue()


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


def test_progress_without_a_terminal_prints_plain_lines():
  stream = io.StringIO()
  with runs.Progress(23, 3, every=10, label='rl', stream=stream) as progress:
    for step in range(4, 24):
      progress.update(step, reward=step / 23)
    progress.print('a [bold] word')
  assert stream.getvalue().splitlines() == [
    'rl 10/23  reward 0.4348',
    'rl 20/23  reward 0.8696',
    'rl 23/23  reward 1',
    'a [bold] word',
  ]


def test_progress_on_a_terminal_is_a_bar():
  stream = io.StringIO()
  stream.isatty = lambda: True
  with runs.Progress(4, label='rl', stream=stream) as progress:
    for step in range(1, 5):
      progress.update(step, reward=0.5)
    progress.print('table')
  text = stream.getvalue()
  assert 'rl: 100%' in text and '4/4' in text and 'reward=0.5' in text
  # Behind a bar that another test left open, the cursor goes up a line first.
  assert '\ntable' in text.replace('\r', '\n').replace('\x1b[A', '')


def test_plot(tmp_path):
  path = tmp_path / 'curve.png'
  series = {'reward': ([0, 1, 2], [0.1, math.nan, 0.3]), 'b': ([0, 2], [1, 2])}

  def draw_it():
    runs.plot_curve(
      path,
      series,
      xlabel='step',
      ylabel='reward',
      title='A run',
      marks={'warm start ends': 1},
    )
    return path.read_bytes()

  first = draw_it()
  assert first.startswith(b'\x89PNG') and draw_it() == first
  assert list(tmp_path.iterdir()) == [path]
  series['b'] = ([0], [1, 2])
  with pytest.raises(ValueError, match='b: 1 x values, 2 y values'):
    draw_it()
  assert path.read_bytes() == first


def test_import_is_light():
  script = """
import sys
import jaxrl_llm.runs, jaxrl_llm.runs.folder
heavy = {'matplotlib', 'rich', 'tensorboardX', 'tqdm', 'transformers'}
print(sorted(heavy & set(sys.modules)))
"""
  result = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True
  )
  assert result.stdout == '[]\n', result.stderr


@pytest.mark.parametrize('name', ['samples.html', 'curve.png'])
def test_a_page_or_picture_that_cannot_be_written_is_said(tmp_path, name):
  (tmp_path / name).mkdir()  # no file can take its place
  with pytest.raises(UserError, match=f'{name} cannot be written: ') as caught:
    if name == 'curve.png':
      labels = dict(xlabel='x', ylabel='y', title='t')
      runs.plot_curve(tmp_path / name, {'a': ([1], [2])}, **labels)
    else:
      page.write(tmp_path / name, 'text')
  assert len(str(caught.value).splitlines()) == 2
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_plot_on_a_full_disk_is_said(tmp_path, monkeypatch):
  from matplotlib.figure import Figure

  def full(self, path, **kwargs):
    path.write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(Figure, 'savefig', full)
  labels = dict(xlabel='x', ylabel='y', title='t')
  with pytest.raises(UserError, match='No space left on device'):
    runs.plot_curve(tmp_path / 'c.png', {'a': ([1], [2])}, **labels)
  assert not list(tmp_path.iterdir())


def test_a_full_disk_under_tensorboard_is_said(tmp_path, monkeypatch):
  full = functools.partial(open, '/dev/full', 'wb')
  opener = 'tensorboardX.record_writer.open_file'
  monkeypatch.setattr(opener, lambda path: full())
  with (
    pytest.raises(UserError, match='tb cannot be written: No space left'),
    runs.MetricsWriter(tmp_path) as writer,
  ):
    for step in range(1000):
      writer.write(step, {'reward': 0.5})
