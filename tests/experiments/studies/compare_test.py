"""Runs of a comparison: what they are, which are done, and where they run."""

import importlib
import os
import pathlib
import runpy
import shutil
import signal
import sys
import time

import mistakes
import pytest
import scripts
from ml_collections import ConfigDict

from experiments import checks
from experiments.studies import compare, parallel
from jaxrl_llm.signals import StopSignal

TOKENS = 400
CONFIGS = pathlib.Path(compare.__file__).parents[1] / 'configs'


@pytest.fixture(scope='module')
def base(config_file):
  """The configuration of the tests' tiny run."""
  config = runpy.run_path(config_file)['get_config']()
  config.steps = 50
  config.optimizer.decay = 'constant'
  config.training.minibatches = 1
  config.evaluation.every = 50
  return config


@pytest.fixture
def config(base):
  return ConfigDict(
    dict(
      base=base.copy_and_resolve_references(),
      init='Init SFT',
      tokens=TOKENS,
      evaluations=4,
      seeds=(0, 1),
      metrics=(
        dict(name='eval/rewards/symbols', title='share', scale=100, digits=1),
        dict(name='eval/distinct_bigrams', title='bigrams', scale=1, digits=3),
      ),
      methods=(
        dict(
          label='rloo',
          title='RLOO',
          algorithm=dict(name='rloo'),
          rollout=dict(prompts=6),
        ),
        dict(
          label='grpo',
          title='GRPO',
          algorithm=dict(name='grpo', kl=0.04),
          optimizer=dict(learning_rate=1e-3),
        ),
      ),
    )
  ).lock()


@pytest.mark.parametrize(
  'name', [path.stem for path in CONFIGS.glob('compare_*.py')]
)
def test_configurations_of_comparisons_are_sound(name, tmp_path):
  module = importlib.import_module(f'experiments.configs.{name}')
  assert 'python -m experiments.studies.compare' in module.__doc__
  assert f'--config=experiments/configs/{name}.py' in module.__doc__
  found = compare.jobs(module.get_config().lock(), tmp_path)
  compare.check_runs(found)


def test_jobs_are_runs_of_one_budget_from_one_model(config, tmp_path):
  init, *runs = compare.jobs(config, tmp_path)
  assert [job.name for job in runs] == ['rloo-0', 'grpo-0', 'rloo-1', 'grpo-1']
  assert init.config.steps == 0 and init.config.warm_start.steps == scripts.WARM
  for job in runs:
    assert job.config.tokens == TOKENS and job.config.seed == job.seed
    assert job.config.evaluation.every_tokens == TOKENS // 4
    assert job.config.warm_start.steps == 0
    assert pathlib.Path(job.config.model.path) == init.folder / 'hf'
    checks.check(job.config)
  rloo, grpo = runs[0].config, runs[1].config
  assert rloo.algorithm.to_dict() == dict(name='rloo')
  assert rloo.rollout.prompts == 6 and grpo.rollout.prompts == scripts.PROMPTS
  assert grpo.optimizer.learning_rate == 1e-3 != rloo.optimizer.learning_rate
  # The configuration itself stays as it was.
  assert config.base.algorithm.name == 'grpo' and config.base.tokens == 0


def test_a_digest_is_of_what_the_result_depends_on(config, tmp_path):
  def digests(folder=tmp_path, **changes):
    changed = ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(changes)
    return {job.digest for job in compare.jobs(changed, folder)}

  before = digests()
  assert len(before) == 5
  assert digests(tmp_path / 'elsewhere') == before
  warm = digests(**{'base.warm_start.batch': 9})
  assert not warm & before  # What begins with another model differs as well.
  # The user's code counts too.
  file = tmp_path / 'mine.py'
  file.write_text('def symbols(completions):\n  return completions')
  reward = {'base.rewards.symbols.name': f'{file}:symbols'}
  before = digests(**reward)
  file.write_text(file.read_text().replace('return', 'return  '))
  assert not before & digests(**reward)


METHOD = "methods=(dict(label='rloo', title='R', algorithm=dict(name='rloo'), "
WRONG = """
token=3 | nothing reads config.token
seeds=(1, 1) | config.seeds is empty or repeats
METHOD),) * 2 | config.methods, label is empty or
METHODtokens=10**9),) | rloo sets tokens
METHODrollout=dict(promts=3)),) | method rloo do not fit config.base
metrics=(dict(name='x'),) | has no 'digits'
methods=(dict(label='a/b', title='A', algorithm={}),) | is a name such as 'grpo'
base.warm_start.steps=0 | nothing to begin with
"""


@pytest.mark.parametrize('change, texts', mistakes.table(WRONG, METHOD=METHOD))
def test_wrong_comparisons_are_refused(change, texts, config, tmp_path):
  config = ConfigDict(config.to_dict())
  mistakes.change(config, mistakes.changes(change))
  with mistakes.refused(*texts):
    compare.jobs(config, tmp_path)


# In place of a training: says where it runs, and takes orders by its name.
STAND_IN = """
import os, signal, sys, time
name = sys.argv[1].removeprefix('--run=')
signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))
print(sorted(os.sched_getaffinity(0)), os.environ['JAX_COMPILATION_CACHE_DIR'])
if name.startswith('grpo'):
  sys.exit('error: too bad\\nsorry')
time.sleep(30 if name == 'rloo-1' else 0.1)
"""


@pytest.mark.skipif(
  not hasattr(os, 'sched_setaffinity'), reason='cores cannot be pinned here'
)
def test_runs_have_cores_of_their_own_and_stop_when_asked(config, tmp_path):
  waiting = compare.jobs(config, tmp_path)
  own = os.sched_getaffinity(0)
  slots = [{core} for core in sorted(own)[:2]]
  command = [sys.executable, '-c', STAND_IN]
  codes, start = {}, time.monotonic()
  with StopSignal() as stop:
    for job, code, seconds in parallel.launch(
      waiting, tmp_path, slots, command, stop
    ):
      codes[job.name] = code
      assert 0 < seconds < 20
      if len(codes) == 4:  # all but rloo-1, which would go on
        os.kill(os.getpid(), signal.SIGTERM)
  assert time.monotonic() - start < 20
  assert os.sched_getaffinity(0) == own
  expected = {'init': 0, 'rloo-0': 0, 'grpo-0': 1, 'grpo-1': 1, 'rloo-1': 143}
  assert codes == expected
  said = [path.read_text().split('\n')[0] for path in tmp_path.glob('logs/*')]
  for i, cores in enumerate(slots):
    assert f'{sorted(cores)} {tmp_path}/cache/{i}' in said
  job = next(job for job in waiting if job.name == 'grpo-0')
  assert parallel.failure(tmp_path, job, 1) == 'too bad (status 1)'
  assert parallel.failure(tmp_path, job, -9) == 'killed by SIGKILL'


@pytest.mark.slow
def test_the_whole_script(tmp_path, capsys):
  """Two methods from one warm start, stopped on the way and taken up again."""
  path = scripts.write_config(tmp_path)
  (tmp_path / 'comparison.py').write_text(COMPARISON.format(base=path))
  workdir = tmp_path / 'run'
  arguments = (
    f'--config={tmp_path / "comparison.py"}',
    f'--workdir={workdir}',
    '--only=rloo',
  )
  script = scripts.Script('studies.compare', *arguments)
  started = workdir / 'runs' / 'rloo-0' / 'metrics.jsonl'
  scripts.wait_until(started.exists, script, 300)
  script.signal(signal.SIGTERM)
  ended = script.wait(300)
  assert ended.code == 128 + signal.SIGTERM, ended
  assert 'rloo-0: stopped' in ended.out
  ended = scripts.Script('studies.compare', *arguments).wait(300)
  assert ended.code == 0, ended
  assert 'rloo-0: done' in ended.out and '| RLOO | 1 of 1 |' in ended.out
  assert ended.out.startswith('1 runs to do')

  # It has ended at the budget, and what there is is reported.
  records = scripts.records(started.parent)
  assert records[-2]['num_tokens'] < 600 <= records[-1]['num_tokens']
  table = (workdir / 'table.md').read_text()
  (row,) = [line for line in table.splitlines() if 'RLOO' in line]
  assert f' {records[-1]["eval/reward"]:.2f} ' in row
  assert (workdir / 'figure.png').read_bytes().startswith(b'\x89PNG')

  # results.jsonl outlives the runs.  Nothing is left to do.
  config = runpy.run_path(tmp_path / 'comparison.py')['get_config']()
  shutil.rmtree(workdir / 'runs' / 'rloo-0')
  file = workdir / 'results.jsonl'
  nothing = [sys.executable, '-c', 'raise SystemExit("it ran")']
  assert compare.compare(config, workdir, [], [{0}], nothing, file) == 0
  assert (workdir / 'table.md').read_text() == table

  # Another budget is another comparison: to be trained, and not in the table.
  config.tokens = 1200
  chosen = [j for j in compare.jobs(config, workdir) if j.name == 'rloo-0']
  capsys.readouterr()
  assert compare.compare(config, workdir, chosen, [{0}], nothing, file) == 1
  out = capsys.readouterr().out
  assert 'failed: rloo-0: it ran (status 1)' in out and '| RLOO' not in out


COMPARISON = """
import runpy
from ml_collections import ConfigDict

def get_config():
  base = runpy.run_path('{base}')['get_config']()
  base.optimizer.decay = 'constant'
  return ConfigDict(dict(
    base=base, init='Init', tokens=600, evaluations=2, seeds=(0,),
    metrics=(dict(name='eval/reward', title='reward', scale=1, digits=2),),
    methods=(
      dict(label='rloo', title='RLOO', algorithm=dict(name='rloo'),
           training=dict(minibatches=1)),
      dict(label='grpo', title='GRPO', algorithm=dict(name='grpo')),
    ),
  ))
"""
