r"""Memory and least time of an RL step on a pod, without having the pod.

    python -m experiments.planning.plan \
      --config=experiments/configs/qwen2_5_7b_tpu.py \
      --topology=v5p:4x4x4 --model=llama3-8b

Every program of the step (sampling, branches, log-probabilities, critic,
update) is compiled for the chips, from shapes alone, on a CPU.  TPUs need
libtpu and GPUs the CUDA plug-in: pip install 'jaxrl_llm[plan]'.

  --topology  v4, v5e, v5p or v6e and the slice in chips, such as v5e:16x16;
              h100 or h200 and their number, such as h100:64.
  --model     a published shape (see shapes.py) in place of config.model's.
  --search    tries meshes and micro-batches and prints the fastest that fits.
  --output    a JSON file for all numbers.
  --update    compiles the update alone.

The status is 2 where a program does not fit, with the GiB that a chip lacks.

In the tables, TFLOP/chip are those of matrix products; `repeated` is how many
times more the chips compute together than the programs ask for.  `memory s` is
the time to read parameters and cache, `network s` that of the collectives at
the bandwidth of their links.  A real step takes longer: see the assumptions.
"""

import json
import math
import pathlib

import jax
from absl import flags

from experiments import build, checks, cli
from experiments.planning import report, shapes, topologies
from experiments.planning.programs import Plan, TooLarge
from experiments.planning.topologies import GIB
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.tasks import vocabulary


def outline(config, name: str) -> build.Model:
  """Shapes of the configuration's model, or of a published one by name."""
  if not name:
    return build.outline(config.model)
  shape = shapes.named(name, **build.model_settings(config.model))
  params = jax.eval_shape(
    lambda: transformer.init(shape, jax.random.key(0), config.model.param_dtype)
  )
  # No text is read; the sampler masks ids above the tokenizer's, as in a run.
  tokenizer = vocabulary.character_tokenizer('0')
  return build.Model(shape, params, tokenizer, (0,), None)


def search(config, chips: int, make) -> Plan:
  """Returns the plan with the shortest iteration among those that fit.

  For each `tensor`, takes the largest micro-batch that fits, because larger
  ones gather parameters less often.  `make` returns a configuration's plan.
  Raises UserError if none fits.
  """
  plans, refusals = [], [(math.inf, 'no mesh divides the batch')]
  minibatch = config.rollout.prompts // config.training.minibatches
  halvings = (minibatch & -minibatch).bit_length()
  # With more parts than 16, the matrices of a chip become too narrow.
  for tensor in [x for x in (1, 2, 4, 8, 16) if x <= chips]:
    for micro in [minibatch >> i for i in range(halvings)]:
      changed = config.copy_and_resolve_references()
      changed.mesh.update(data=1, fsdp=-1, tensor=tensor)
      changed.training.micro_prompts = micro
      name = f'tensor={tensor}, micro_prompts={micro}'
      try:
        plan = make(changed)
        plan.compile()
      except UserError as error:
        print(f'{name}: {str(error).splitlines()[0]}', flush=True)
      except TooLarge as error:
        print(f'{name}: {error}', flush=True)
        refusals.append((error.missing, f'{name}: {error}'))
        if error.program != 'update':
          break  # does not depend on the micro-batch
      else:
        plans.append((plan.numbers('')['seconds'], len(plans), plan))
        print(f'{name}: {plans[-1][0]:.1f} s', flush=True)
        break
  if plans:
    return min(plans)[2]
  raise UserError(
    f'nothing that was tried fits; nearest is {min(refusals)[1]}\n'
    'take more chips, or fewer prompts, samples or tokens'
  )


def refusal(plan: Plan, error: TooLarge) -> str:
  """Three lines: the shortfall, the largest parts, and the remedy."""
  sampling = error.program in ('sample', 'greedy', 'branch')
  if sum(plan.resident.values()) > plan.limit / 2:
    advice = (
      'the state alone is too large: take more chips, raise config.mesh.fsdp '
      'or .tensor, or hold parameters in bfloat16 (config.model.param_dtype)'
    )
  elif sampling and plan.sampler > plan.limit / 3:
    advice = 'raise config.mesh.tensor, over which the sampler is split'
  elif sampling:
    advice = 'lower config.rollout.prompts, samples or max_tokens: the cache'
  else:
    advice = 'lower config.training.micro_prompts, or raise config.mesh.tensor'
  parts = dict(plan.resident)
  if sampling:
    parts['parameters to sample with'] = plan.sampler
  if error.program in plan.programs:
    parts['cache'] = plan.programs[error.program]['memory']['cache']
  held = ', '.join(f'{x} {y / GIB:.1f}' for x, y in parts.items() if y)
  missing = math.ceil(error.missing / GIB * 10) / 10  # never less than it is
  return (
    f'does not fit: {error.program} lacks at least {missing:.1f} GiB of '
    f'{plan.limit / GIB:.2f} GiB per chip of {plan.topology.name}\n'
    f'GiB per chip: {held}\n{advice}'
  )


def main() -> None:
  """Prints the plan that the flags describe."""
  jax.config.update('jax_platforms', 'cpu')
  # Without the device, no program can be read back from the cache.
  jax.config.update('jax_enable_compilation_cache', False)
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  args, config = flags.FLAGS, cli.config()
  if not args.topology:
    raise UserError('--topology is missing\nfor example --topology=v5e:16x16')
  checks.check(config)
  topologies.parse(args.topology)
  model = outline(config, args.model)
  topology = topologies.make(args.topology)
  make = lambda changed: Plan(changed, model, topology)
  if args.search:
    plan = search(config, len(topology.devices), make)
  else:
    plan = make(config)
    try:
      plan.compile(args.update)
    except TooLarge as error:
      raise UserError(refusal(plan, error)) from error
  numbers = plan.numbers(args.model or config.model.path or 'model')
  print(report.text(numbers))
  if args.output:
    output = json.dumps(numbers, indent=2) + '\n'
    pathlib.Path(args.output).write_text(output)


if __name__ == '__main__':
  flags.DEFINE_string('topology', '', 'Chip and shape, such as v5e:16x16.')
  flags.DEFINE_string('model', '', 'A published shape, such as llama3-8b.')
  flags.DEFINE_bool('search', False, 'Try meshes and micro-batches.')
  flags.DEFINE_bool('update', False, 'Compile the update alone.')
  flags.DEFINE_string('output', '', 'JSON file for all numbers.')
  cli.define_config_flag()
  cli.run(main)
