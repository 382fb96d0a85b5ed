"""The README's commands and code, as a new user pastes them."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import scripts

from benchmarks import job
from jaxrl_llm.models.huggingface import folders

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = [README, *(p.read_text() for p in sorted((ROOT / 'docs').glob('*.md')))]
INSTALL, TEST = re.findall(r'```bash\n(pip install -e .*)\n```', README)
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.S)

# Few steps of the first command: what is tried is that it begins and ends.
SHORT = (
  '--config.steps=2 --config.optimizer.warmup_updates=0 '
  '--config.warm_start.steps=2 --config.warm_start.optimizer.warmup_updates=0 '
  '--workdir=runs/short'
)


def test_the_two_commands():
  assert INSTALL == (
    'pip install -e . && python -m experiments.train '
    '--config=experiments/configs/quickstart.py'
  )
  ci = (ROOT / '.ci' / 'run').read_text()
  assert f'\n{TEST}\n' in ci


def test_what_commands_name_is_there():
  found = set()
  for page in PAGES:
    found |= set(re.findall(r'\b(?:tests|benchmarks)/[\w/]+\.py', page))
    found |= set(re.findall(r'\bexperiments/configs/[a-z]\w*\.py', page))
    modules = re.findall(r'-m ((?:experiments|benchmarks)[.\w]*\w)', page)
    found |= {f'{name.replace(".", "/")}.py' for name in modules}
  assert len(found) > 50
  missing = [path for path in sorted(found) if not (ROOT / path).is_file()]
  assert missing == []


def test_links_of_pages_lead_somewhere():
  pages = [ROOT / 'README.md', ROOT / 'CHANGELOG.md', *ROOT.glob('docs/*.md')]
  broken = [
    f'{page.name}: {link}'
    for page in pages
    for link in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', page.read_text())
    if not (page.parent / link).exists()
  ]
  assert broken == []


def test_the_estimator_runs(capsys):
  (source,) = [block for block in BLOCKS if 'enumeration.examine' in block]
  exec(compile(source, 'README.md', 'exec'), {})
  printed = capsys.readouterr().out
  assert re.fullmatch(r'bias 0\.\d\d, cosine 0\.\d\d\n', printed)


def test_the_configuration_of_ones_own_trains(tmp_path):
  (source,) = [block for block in BLOCKS if 'def get_config' in block]
  (tmp_path / 'mine.py').write_text(source)
  for name, first in (('train', 0), ('test', 100)):
    numbers = range(first, first + 40)
    rows = [
      json.dumps({'prompt': f'What is {n} + 1?', 'answer': str(n + 1)})
      for n in numbers
    ]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(rows))
  shape = job.Shape(hidden=16, intermediate=24, layers=1, heads=2, kv_heads=1)
  ended = scripts.Script(
    'train',
    '--config=mine.py',
    '--workdir=runs/mine',
    f'--config.model.path={job.folder(shape, tmp_path)}',
    '--config.steps=2',
    '--config.rollout.prompts=2',
    '--config.evaluation.prompts=4',
    '--config.rollout.max_tokens=8',
    '--config.optimizer.warmup_updates=0',
    cache=scripts.cache(),
    before=functools.partial(os.chdir, tmp_path),
  ).wait()
  assert ended.code == 0, ended.err
  *_, last = scripts.records(tmp_path / 'runs/mine')
  assert last['step'] == 2
  assert {'rewards/right/mean', 'rewards/repeats/mean'} <= set(last)
  assert folders.load(tmp_path / 'runs/mine/hf')[0].vocab_size == 512


@pytest.mark.slow
def test_the_first_command_in_an_environment_of_its_own(tmp_path):
  """Installs from the package index, without any of this environment."""
  files = ['git', 'ls-files', '-z']
  listed = subprocess.run(files, cwd=ROOT, capture_output=True, check=True)
  for name in listed.stdout.decode().split('\0')[:-1]:
    target = tmp_path / 'clone' / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, target)
  made = tmp_path / 'venv'
  subprocess.run([sys.executable, '-m', 'venv', str(made)], check=True)
  kept = ('HOME', 'LANG', 'TMPDIR')
  environment = {name: os.environ[name] for name in kept if name in os.environ}
  environment['PATH'] = f'{made / "bin"}:{os.environ["PATH"]}'
  ended = subprocess.run(
    ['bash', '-c', f'{INSTALL} {SHORT}'],
    cwd=tmp_path / 'clone',
    env=environment,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert ended.returncode == 0, ended.stderr
  assert 'Traceback' not in ended.stderr
  left = {path.name for path in (tmp_path / 'clone/runs/short').iterdir()}
  assert left >= {'metrics.jsonl', 'samples.html', 'curve.png', 'hf'}
