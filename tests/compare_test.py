"""Runs of a comparison: what they are, which are done, and where they run."""

import importlib
import importlib.util
import json
import os
import pathlib
import signal
import sys
import time

import jax
import pytest
import scripts
from ml_collections import ConfigDict

from experiments import checks, compare
from jaxrl_llm.errors import UserError
from jaxrl_llm.logging import read_metrics
from jaxrl_llm.run_folder import StopSignal

TOKENS = 400
CONFIGS = pathlib.Path(compare.__file__).parent / 'configs'


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  """Compiling takes most of the time of models as small as these."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """The configuration of the tests' tiny run."""
  path = scripts.write_config(tmp_path_factory.mktemp('config'))
  spec = importlib.util.spec_from_file_location('tiny_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
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
  assert 'python -m experiments.compare' in module.__doc__
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
    return {job.name: job.digest for job in compare.jobs(changed, folder)}

  before = digests()
  assert len(set(before.values())) == len(before) == 5
  assert digests(tmp_path / 'elsewhere') == before
  for change in (
    {'tokens': TOKENS + 1},
    {'base.warm_start.batch': 9},
    {'base.rollout.temperature': 0.9},
  ):
    now = digests(**change)
    assert not {now[name] for name in now if name != 'init'} & {
      *before.values()
    }


def test_without_a_warm_start_the_given_model_is_the_first(config, tmp_path):
  config.base.warm_start.steps = 0
  with pytest.raises(UserError, match='nothing to begin with'):
    compare.jobs(config, tmp_path)
  config.base.model.path = 'given'
  found = compare.jobs(config, tmp_path)
  assert len(found) == 4 and found[0].config.model.path == 'given'


@pytest.mark.parametrize(
  'changes, text',
  [
    (dict(token=3), 'nothing reads config.token'),
    (dict(tokens=0), 'config.tokens is 0'),
    (dict(seeds=()), 'config.seeds is empty or repeats'),
    (dict(seeds=(1, 1)), 'config.seeds is empty or repeats'),
    (dict(metrics=(dict(name='x'),)), "has no 'digits'"),
    (dict(methods=(dict(label='a', title='A'),)), "has no 'algorithm'"),
    (
      dict(methods=(dict(label='a/b', title='A', algorithm={}),)),
      "names such as 'grpo'",
    ),
    (
      dict(
        methods=(
          dict(
            label='rloo',
            title='RLOO',
            algorithm=dict(name='rloo'),
            rollout=dict(promts=3),
          ),
        )
      ),
      'method rloo do not fit config.base',
    ),
  ],
)
def test_wrong_comparisons_are_refused(changes, text, config, tmp_path):
  config = ConfigDict({**config.to_dict(), **changes})
  with pytest.raises(UserError, match=text) as caught:
    compare.jobs(config, tmp_path)
  assert len(str(caught.value).splitlines()) <= 3


def test_a_method_that_would_not_begin_is_named(config, tmp_path):
  config.methods = (
    dict(label='one', title='1', algorithm=dict(name='rloo', clip=0.2)),
  )
  with pytest.raises(UserError, match="one: config.algorithm: .*'clip'"):
    compare.check_runs(compare.jobs(config, tmp_path))


def test_choice(config, tmp_path):
  everything = compare.jobs(config, tmp_path)
  names = lambda *args: [job.name for job in compare.choose(everything, *args)]
  assert names([], []) == [job.name for job in everything]
  assert names(['grpo'], []) == ['init', 'grpo-0', 'grpo-1']
  assert names(['grpo'], ['1']) == ['init', 'grpo-1']
  for only, seeds in ((['ppo'], []), ([], ['7'])):
    with pytest.raises(UserError, match='the configuration has'):
      compare.choose(everything, only, seeds)


def test_cores_are_shared_out(monkeypatch):
  monkeypatch.setattr(compare, '_cores', lambda: {0, 2, 3, 5, 8})
  assert compare.slots(1) == [{0, 2, 3, 5, 8}]
  assert compare.slots(2) == [{0, 2}, {3, 5, 8}]
  assert len(compare.slots(5)) == 5
  for count in (0, 6):
    with pytest.raises(UserError, match='5 cores'):
      compare.slots(count)


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
  places = [{core} for core in sorted(own)[:2]]
  command = [sys.executable, '-c', STAND_IN]
  codes, start = {}, time.monotonic()
  with StopSignal() as stop:
    for job, code, seconds in compare.launch(
      waiting, tmp_path, places, command, stop
    ):
      codes[job.name] = code
      assert 0 < seconds < 20
      if len(codes) == 4:  # all but rloo-1, which would go on
        os.kill(os.getpid(), signal.SIGTERM)
  assert time.monotonic() - start < 20
  assert os.sched_getaffinity(0) == own
  assert codes == {
    'init': 0, 'rloo-0': 0, 'grpo-0': 1, 'grpo-1': 1, 'rloo-1': 143
  }  # fmt: skip
  said = [path.read_text().split('\n')[0] for path in tmp_path.glob('logs/*')]
  for i, place in enumerate(places):
    assert f'{sorted(place)} {tmp_path}/cache/{i}' in said
  assert {line.split()[0] for line in said} <= {str([c]) for c in own}
  job = next(job for job in waiting if job.name == 'grpo-0')
  assert compare._why(tmp_path, job, 1) == 'too bad (status 1)'
  assert compare._why(tmp_path, job, -9) == 'killed by SIGKILL'


@pytest.fixture(scope='module')
def trained(base, tmp_path_factory):
  """A workdir with the initial model and both methods' run of one seed."""
  return tmp_path_factory.mktemp('compare')


def test_runs_end_at_the_budget_and_are_done_once(config, trained, capsys):
  everything = compare.jobs(config, trained)
  chosen = compare.choose(everything, [], ['0'])
  assert not any(job.complete for job in everything)
  for job in chosen:
    assert compare.train_run(job) == 0 and job.complete
  for job in chosen[1:]:
    counts = [
      r['num_tokens'] for r in read_metrics(job.folder / 'metrics.jsonl')
    ]
    assert counts[-2] < TOKENS <= counts[-1]
  # Both began with the same model.
  first = [read_metrics(j.folder / 'metrics.jsonl')[0] for j in chosen[1:]]
  names = [n for n in first[0] if n.startswith('eval/')]
  assert len(names) > 3
  assert [first[0][n] for n in names] == [first[1][n] for n in names]

  # Nothing is left to do, and what there is is reported.
  capsys.readouterr()
  nothing = [sys.executable, '-c', 'raise SystemExit("it ran")']
  assert compare.compare(config, trained, chosen, [{0}], nothing) == 0
  out = capsys.readouterr().out
  assert out.startswith('0 runs to do') and '| RLOO | 1 of 2 |' in out
  assert (trained / 'table.md').read_text() in out + '\n'
  assert (trained / 'figure.png').read_bytes().startswith(b'\x89PNG')

  # Another budget is another comparison: to be trained, and not in the table.
  config.tokens = 2 * TOKENS
  longer = compare.jobs(config, trained)
  assert [job.complete for job in longer] == [True] + 4 * [False]
  chosen = [job for job in longer if job.name == 'rloo-0']
  assert compare.compare(config, trained, chosen, [{0}], nothing) == 1
  out = capsys.readouterr().out
  assert 'failed: rloo-0: it ran (status 1)' in out and '| RLOO' not in out


def test_results_outlive_the_runs(config, trained, tmp_path):
  results = json.loads((trained / 'results.json').read_text())
  assert results['runs'] == {} and 'rloo-0' in results['failures']
  assert compare.compare(config, trained, [], [{0}], []) == 0
  table = (trained / 'table.md').read_text()
  for name in ('results.json',):
    (tmp_path / name).write_bytes((trained / name).read_bytes())
  assert compare.compare(config, tmp_path, [], [{0}], []) == 0
  assert (tmp_path / 'table.md').read_text() == table
  assert '| GRPO | 1 of 2 |' in table
