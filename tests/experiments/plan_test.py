"""A plan's programs, bytes and FLOPs on 8 devices that exist, and its flags."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import scripts

from experiments.planning import (
  hardware,
  memory_analysis,
  plan_report,
  topologies,
)
from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import arithmetic

ROOT = pathlib.Path(__file__).parents[2]

# A plan for 8 devices of the CPU, which stand in for a machine of 8 GPUs.
PROGRAM = """
import json
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_disable_most_optimizations', True)
from experiments import plan, plan_report
from experiments.configs import base
from experiments.planning import hardware, memory, topologies
from jaxrl_llm.tasks import arithmetic

config = base.get_config()
config.model.alphabet = arithmetic.ALPHABET
config.model.architecture = dict(
  hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4,
  num_kv_heads=2, tied=True, max_length=64,
)
config.mesh.update(data=2, fsdp=2, tensor=2)
config.prompts.max_tokens = 8
config.rewards = dict(correct=dict(name='arithmetic_answer'))
config.algorithm = ALGORITHM
config.rollout.update(prompts=8, samples=4, max_tokens=16)
config.training.update(minibatches=1, micro_prompts=4)
chip = hardware.CHIPS['h100']
topology = topologies.Topology('cpu:8', chip, (1, 8), jax.devices(), {})
made = plan.make(config, plan.model(config, ''), topology)
made.compile()
told = plan_report.as_dict(made, 'tiny')
text = plan_report.text(told)
refusals = []
for limit in (2**10, made.programs['layout'].memory.peak - 2**10):
  made.limit = limit
  try:
    made.compile()
  except memory.TooLarge as error:
    refusals.append(plan_report.refusal(made, error))
print(json.dumps(dict(told, text=text, refusals=refusals)))
"""


def run(algorithm):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM.replace('ALGORITHM', algorithm)],
    cwd=ROOT,
    env=os.environ | {'XLA_FLAGS': scripts.xla_flags(devices=8)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def planned():
  return run("dict(name='grpo', kl=0.1)")


def program(planned, name):
  return next(x for x in planned['programs'] if x['name'] == name)


D, F, L, H, T, S = 32, 64, 3, 4, 16, 8


def matrices():
  """Parameters of a layer's matrices: query and out, key and value, MLP."""
  return 2 * D * D + 2 * D * (D // 2) + 3 * D * F


def test_parameters_and_optimizer_are_as_counted_by_hand(planned):
  vocabulary = 3 + len(arithmetic.ALPHABET)
  norms = (2 * L + 1) * D
  # fsdp and tensor split matrices in 4, data copies them; the embedding's odd
  # number of rows is not split by tensor.
  assert vocabulary % 2
  by_hand = 4 * (vocabulary * D // 2 + L * matrices() // 4 + norms)
  for found in planned['programs']:
    kept = found['memory']
    assert kept['parameters'] == kept['reference'] == by_hand
    # Adam's two moments, and its counter of steps.
    assert 2 * by_hand <= kept['optimizer'] <= 2 * by_hand + 32
    parts = [kept[name] for name in kept if name != 'peak']
    assert kept['peak'] == sum(parts)
    assert all(part >= 0 for part in parts)
  # Keys and values of 7 tokens of 8 prompts and 16 of 32 rows; 4 × 2 shards.
  cache = 2 * L * D // 2 * 4 * (8 * (S - 1) + 32 * T) // 8
  assert program(planned, 'sample')['memory']['cache'] == cache
  assert program(planned, 'update')['memory']['cache'] == 0


def test_flops_are_as_counted_by_hand(planned):
  vocabulary, rows, prompts = 3 + len(arithmetic.ALPHABET), 32, 8
  attend = lambda count, keys: 2 * 2 * count * keys * D
  layers = lambda count: 2 * count * matrices()
  prefill = L * (layers(prompts * 7) + prompts * attend(7, 7))
  step = L * (layers(1) + attend(1, 7 + T)) + 2 * vocabulary * D
  sample = program(planned, 'sample')
  assert sample['asked'] == prefill + rows * T * step
  # The trainer's pass: all of a response at one time.
  score = L * (layers(rows * T) + rows * attend(T, 7 + T))
  score += prefill + rows * T * 2 * vocabulary * D
  assert program(planned, 'score')['asked'] == score
  update = program(planned, 'update')
  # Twice as much backward; the head is computed again there.
  head = rows * T * 2 * vocabulary * D
  assert update['asked'] == pytest.approx(3 * score + head, rel=0.02)
  for name in ('sample', 'score', 'update'):
    found = program(planned, name)
    share = found['computed'] * 8 / found['asked']
    # Of the prompts' last layer sampling needs the keys and values alone: XLA
    # leaves the rest out, up to a layer's share of the prefill.
    least = 1.0 - (prefill / L / sample['asked'] if name == 'sample' else 0.0)
    assert least <= share < 1.6, name


def test_programs_of_an_iteration(planned):
  assert [x['name'] for x in planned['programs']] == [
    'layout',
    'sample',
    'score',
    'update',
  ]
  assert planned['tokens'] == 32 * T
  # Nobody but the tensor axis speaks while sampling.
  chips = {c['chips'] for c in program(planned, 'sample')['collectives']}
  assert chips == {2}
  assert planned['seconds'] == sum(x['seconds'] for x in planned['programs'])
  assert 'per chip' in planned['text'] and '| update ' in planned['text']


def test_what_does_not_fit_is_refused_with_the_shortfall(planned):
  whole, layout = planned['refusals']
  assert whole.startswith(
    'does not fit: update lacks at least 0.1 GiB of 0.00 GiB'
  )
  assert 'take more chips' in whole
  assert layout.startswith('does not fit: layout lacks at least 0.1 GiB')
  assert all(len(text.splitlines()) == 3 for text in planned['refusals'])


@pytest.mark.parametrize(
  'algorithm, more',
  [
    ("dict(name='trepo')", {'branch'}),
    ("dict(name='ppo')", {'critic'}),
    ("dict(name='remax')", {'greedy'}),
  ],
)
@pytest.mark.slow
def test_programs_that_other_algorithms_need(algorithm, more):
  found = {x['name'] for x in run(algorithm)['programs']}
  assert found >= more | {'layout', 'sample', 'update'}


def test_a_gpu_leaves_a_fraction_of_its_memory(monkeypatch):
  chip = hardware.CHIPS['h100']
  monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
  assert hardware.limit(chip) == int(0.75 * chip.memory)
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '.9')
  assert hardware.limit(chip) == int(0.9 * chip.memory)
  assert hardware.limit(hardware.CHIPS['v5e']) == int(15.75 * 2**30)


def test_the_compilers_refusal_is_read():
  text = (
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (20.00G) exceeds available HBM (15.75G).'
  )
  error = memory_analysis.TooLarge.of(
    'sample', 2**30, 15 * 2**30, RuntimeError(text)
  )
  assert error.missing == 6 * 2**30
  with pytest.raises(ValueError, match='something else'):
    memory_analysis.TooLarge.of('sample', 0, 0, ValueError('something else'))


@pytest.mark.parametrize(
  'name, message',
  [
    ('v5p', 'no such topology'),
    ('v9:4x4', 'no such topology'),
    ('v5p:4x4', 'has 3 axes'),
    ('v5e:4x4x4', 'has 2 axes'),
    ('h100:12', 'whole machines of 8'),
  ],
)
def test_names_that_are_no_topology(name, message):
  with pytest.raises(UserError, match=message) as caught:
    topologies.parse(name)
  assert len(str(caught.value).splitlines()) <= 3


def test_topologies_count_chips():
  assert topologies.parse('v5p:4x4x8')[1] == (4, 4, 8)
  assert topologies.parse('h100:64')[1] == (8, 8)
  assert topologies.parse('h200:4')[1] == (1, 4)


@pytest.mark.parametrize('name', ['v5e:4x4', 'h100:8'])
def test_a_missing_plugin_is_told(name, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'not installed\n.*\[plan\]') as caught:
    topologies.make(name)
  assert len(str(caught.value).splitlines()) <= 3


CONFIG = 'experiments/configs/qwen2_5_7b_tpu.py'


@pytest.mark.parametrize(
  'arguments, message',
  [
    ([], '--topology is missing'),
    (['--topology=v5q:4x4'], 'no such topology'),
    (['--topolgy=v5e:4x4'], 'did you mean --topology'),
    (['--topology=v5e:4x4', '--model=llama-8b'], 'did you mean llama3-8b'),
  ],
)
def test_wrong_flags(arguments, message):
  ended = scripts.run('plan', f'--config={ROOT / CONFIG}', *arguments)
  assert ended.code == 2
  assert message in ended.err
  assert len(ended.err.strip().splitlines()) <= 3


def test_a_table_lines_up():
  rows = [['a', 'bb'], ['longer', '1']]
  lines = plan_report.markdown(rows).splitlines()
  assert lines == ['| a      | bb |', '| ------ | -: |', '| longer |  1 |']


def needs(module):
  pytest.importorskip(
    module, reason=f"needs {module}: pip install 'jaxrl_llm[plan]'"
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, module',
  [
    ('v5e:16x16', 'libtpu'),
    ('v5p:8x8x8', 'libtpu'),
    ('v6e:16x16', 'libtpu'),
    ('h100:64', 'jax_cuda13_plugin'),
  ],
)
def test_pods_are_compiled_for(topology, module, tmp_path):
  needs(module)
  output = tmp_path / 'plan.json'
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    [
      *(
        sys.executable,
        '-m',
        'experiments.planning.plan',
        f'--config={CONFIG}',
      ),
      *(f'--topology={topology}', '--model=llama3-8b', f'--output={output}'),
    ],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  told = json.loads(output.read_text())
  assert all(0 < x['memory']['peak'] <= told['limit'] for x in told['programs'])


@pytest.mark.slow
def test_a_70b_model_is_refused_on_16_chips():
  needs('libtpu')
  ended = scripts.run(
    'plan',
    f'--config={ROOT / CONFIG}',
    '--topology=v5e:4x4',
    '--model=llama3-70b',
  )
  assert ended.code == 2
  assert 'does not fit: update lacks' in ended.err
  assert len(ended.err.strip().splitlines()[-3:]) == 3


def test_efficiency_of_more_chips():
  def numbers(chips, network):
    update = dict(name='update', computed=2e12, compute=1.0, traffic=0.5)
    update |= dict(network=network, collectives=[dict(sent=3e9)])
    counts = dict(chips=chips, prompts=4 * chips, minibatches=2)
    return counts | dict(programs=[update])

  rows = plan_report.scaling_table([numbers(64, 0.5), numbers(512, 2.0)])
  assert rows[1][:4] == ['64', '128', '2.0', '3.0']
  assert [row[-2:] for row in rows[1:]] == [['100%', '100%'], ['50%', '50%']]
