"""The commands of the README: as pasted by a new user, and what they name."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = [README, *(p.read_text() for p in sorted((ROOT / 'docs').glob('*.md')))]
INSTALL, TEST = re.findall(r'```bash\n(pip install -e .*)\n```', README)

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
