"""Programs, bytes and FLOPs of a plan for 8 CPU devices; flags; real pods."""

import json
import pathlib
import types

import jax
import mistakes
import peers
import pytest
import scripts

from experiments.configs import base
from experiments.planning import plan, report, topologies
from experiments.planning.programs import Plan, TooLarge
from jaxrl_llm.tasks import arithmetic

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = 'experiments/configs/qwen2_5_7b_tpu.py'
GIB = 2**30


def compute(algorithm):
  """8 CPU devices take the place of a machine of 8 GPUs."""
  config = base.get_config()
  config.model.alphabet = arithmetic.ALPHABET
  config.model.architecture = dict(
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    tied=True,
    max_length=64,
  )
  config.mesh.update(data=2, fsdp=2, tensor=2)
  config.prompts.max_tokens = 8
  config.rewards = dict(correct=dict(name='arithmetic_answer'))
  config.algorithm = algorithm
  config.rollout.update(prompts=8, samples=4, max_tokens=16)
  config.training.update(minibatches=1, micro_prompts=4)
  chip = topologies.CHIPS['h100']
  topology = topologies.Topology('cpu:8', chip, (1, 8), jax.devices(), {})
  made = Plan(config, plan.outline(config, ''), topology)
  made.compile()
  numbers = made.numbers('tiny')
  report.text(numbers)
  refusals = []
  for limit in (2**10, made.programs['update']['memory']['peak'] - 2**10):
    made.limit = limit
    with pytest.raises(TooLarge) as caught:
      made.compile()
    refusals.append(plan.refusal(made, caught.value))
  return numbers | {'refusals': refusals}


def run(algorithm):
  numbers = peers.compute(compute, algorithm)
  return numbers | {'programs': {x['name']: x for x in numbers['programs']}}


@pytest.fixture(scope='module')
def planned():
  return run(dict(name='grpo', kl=0.1))


# Width, MLP, layers, response and prompt tokens, vocabulary.
D, F, L, T, S, V = 32, 64, 3, 16, 8, 3 + len(arithmetic.ALPHABET)
# Query and output, key and value, MLP.
MATRICES = 2 * D * D + 2 * D * (D // 2) + 3 * D * F


def test_memory_is_as_counted_by_hand(planned):
  norms = (2 * L + 1) * D
  # fsdp and tensor split matrices in 4, data copies them; tensor does not split
  # the embedding's odd number of rows.
  assert V % 2
  by_hand = 4 * (V * D // 2 + L * MATRICES // 4 + norms)
  for program in planned['programs'].values():
    memory = program['memory']
    assert memory['parameters'] == memory['reference'] == by_hand
    # Adam's two moments, and its counter of steps.
    assert 2 * by_hand <= memory['optimizer'] <= 2 * by_hand + 32
    assert all(part >= 0 for part in memory.values())
    assert 2 * memory['peak'] == sum(memory.values())
  # Keys and values of 7 tokens of 8 prompts and 16 of 32 rows; 4 × 2 shards.
  cache = 2 * L * D // 2 * 4 * (8 * (S - 1) + 32 * T) // 8
  assert planned['programs']['sample']['memory']['cache'] == cache
  assert planned['programs']['update']['memory']['cache'] == 0
  # The policy that is copied into another layout is no further argument.
  assert planned['programs']['layout']['memory']['other'] == 0


def test_flops_are_as_counted_by_hand(planned):
  rows, prompts = 32, 8
  attend = lambda count, keys: 2 * 2 * count * keys * D
  layers = lambda count: 2 * count * MATRICES
  prefill = L * (layers(prompts * 7) + prompts * attend(7, 7))
  step = L * (layers(1) + attend(1, 7 + T)) + 2 * V * D
  sample, score, update = (
    planned['programs'][name] for name in ('sample', 'score', 'update')
  )
  assert sample['asked'] == prefill + rows * T * step
  # The trainer reads a response at once.
  head = rows * T * 2 * V * D
  reading = L * (layers(rows * T) + rows * attend(T, 7 + T)) + prefill + head
  assert score['asked'] == reading
  # Twice as much backward; the head is computed again there.
  assert update['asked'] == pytest.approx(3 * reading + head, rel=0.02)
  for program in (sample, score, update):
    share = program['computed'] * 8 / program['asked']
    # XLA skips what sampling does not use of the prompts' last layer.
    least = 1.0 - (prefill / L / sample['asked'] if program is sample else 0.0)
    assert least <= share < 1.6, program['name']


def test_a_plan_that_does_not_fit_is_refused_with_the_shortfall(planned):
  state, update = planned['refusals']
  start = 'does not fit: update lacks at least 0.1 GiB of 0.00 GiB'
  assert state.startswith(start) and 'take more chips' in state
  assert update.startswith(start)
  assert all(len(text.splitlines()) == 3 for text in planned['refusals'])


@pytest.mark.slow
def test_programs_that_other_algorithms_need(planned):
  assert [*planned['programs']] == ['layout', 'sample', 'score', 'update']
  assert 'branch' in run(dict(name='trepo'))['programs']
  assert 'critic' in run(dict(name='ppo'))['programs']


def test_search_takes_the_largest_micro_batch_of_the_fastest_mesh(capsys):
  config = base.get_config()
  config.rollout.prompts, config.training.minibatches = 16, 2

  def search(fits):
    def make(changed):
      tensor, micro = changed.mesh.tensor, changed.training.micro_prompts

      def compile():
        if not fits(tensor, micro):
          raise TooLarge('update', micro * GIB)

      seconds = {1: 3.0, 2: 1.0, 4: 2.0}[tensor]
      return types.SimpleNamespace(
        chosen=(tensor, micro),
        compile=compile,
        numbers=lambda name: dict(seconds=seconds),
      )

    return plan.search(config, 4, make).chosen

  assert search(lambda tensor, micro: micro <= 2 * tensor) == (2, 4)
  lines = capsys.readouterr().out.splitlines()
  assert 'tensor=1, micro_prompts=8: update lacks 8.0 GiB' in lines
  assert lines[-1] == 'tensor=4, micro_prompts=8: 2.0 s'
  with mistakes.refused('update lacks 1.0 GiB'):
    search(lambda tensor, micro: False)


FLAGS = """
--model=llama3-8b | --topology is missing
--topology=v5q:4x4 | no such topology
--topology=v5p:4x4 | write v5p:4x4x4
--topology=h100:12 | whole machines of 8
--topolgy=v5e:4x4 | did you mean --topology
--topology=v5e:4x4 --model=llama-8b | did you mean llama3-8b
"""


@pytest.mark.parametrize('flags, texts', mistakes.table(FLAGS))
def test_wrong_flags(flags, texts):
  config = f'--config={ROOT / CONFIG}'
  ended = scripts.call('planning.plan', config, *flags.split())
  mistakes.assert_refused(ended, *texts)


def plan_of(*arguments, module):
  pytest.importorskip(
    module, reason=f"needs {module}: pip install 'jaxrl_llm[plan]'"
  )
  config = f'--config={ROOT / CONFIG}'
  return scripts.run('planning.plan', config, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology, module',
  [('v5e:16x16', 'libtpu'), ('h100:64', 'jax_cuda13_plugin')],
)
def test_pods_are_compiled_for(topology, module, tmp_path):
  output = tmp_path / 'plan.json'
  flags = f'--topology={topology}', '--model=llama3-8b', f'--output={output}'
  ended = plan_of(*flags, module=module)
  assert ended.code == 0, ended.err
  numbers = json.loads(output.read_text())
  for program in numbers['programs']:
    assert 0 < program['memory']['peak'] <= numbers['limit']


@pytest.mark.slow
def test_a_70b_model_is_refused_on_16_chips():
  flags = '--topology=v5e:4x4', '--model=llama3-70b'
  ended = plan_of(*flags, module='libtpu')
  mistakes.assert_refused(ended, 'does not fit: update lacks')
