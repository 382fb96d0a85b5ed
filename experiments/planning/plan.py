r"""Whether a step of RL fits on a pod, and how long it takes at best.

    python -m experiments.planning.plan \
      --config=experiments/configs/qwen2_5_7b_tpu.py \
      --topology=v5p:4x4x4 --model=llama3-8b

No accelerator is needed: every program of the step (sampling, branches, log-
probabilities, critic, update) is compiled for chips that are not there, from
shapes alone.  TPUs need libtpu and GPUs the CUDA plug-in:
pip install 'jaxrl_llm[plan]'.

  --topology  v4, v5e, v5p or v6e and the slice in chips, such as v5e:16x16;
              h100 or h200 and their number, such as h100:64.
  --model     a published shape in place of config.model's: see
              experiments/planning/shapes.py.
  --search    tries meshes and micro-batches, prints the cheapest that fits.
  --output    a file for all numbers, as JSON.
  --update    compiles the update alone.
  --effort    of the TPU's compiler: -1 is quick, 0 is what a run has and takes
              eight times as long.

The status is 2 where a program does not fit, with the GiB that a chip lacks.

What the tables say: `asked` FLOPs are those of the matrix products that the
programs ask for, loops counted as often as they run, and `repeated` how many
times more the chips compute together.  `memory s` is the time to read
parameters and cache, `network s` that of the collectives in the compiled
program at the bandwidth of the links they use.  A step on the chips takes
longer: see the assumptions below the tables.
"""

import json
import pathlib

import jax
from absl import flags

from experiments import build, checks, cli, critics, online
from experiments.planning import (
  hardware,
  memory_analysis,
  plan_report,
  plan_search,
  programs,
  shapes,
  topologies,
)
from jaxrl_llm import rollouts, sharding
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.tasks import vocabulary


def model(config, name: str) -> build.Model:
  """Shapes of the configuration's model, or of a published one by name."""
  if not name:
    return build.outline(config.model)
  shape = shapes.named(name, **build.model_settings(config.model))
  params = jax.eval_shape(
    lambda: transformer.init(shape, jax.random.key(0), config.model.param_dtype)
  )
  # No text is read; a run masks the rows that only pad the embedding, too.
  tokenizer = vocabulary.character_tokenizer('0')
  return build.Model(shape, params, tokenizer, (0,), None)


def iteration(config, built: build.Model) -> programs.Iteration:
  """One step of `experiments.train` as shapes and functions."""
  trainer, settings = online.trainer(config, built), config.training
  estimator, needs = build.estimator(config), trainer.setting.needs
  critic = critics.critic(config, built) if needs.critic else None
  optimizer, _ = critics.optimizer(config, needs)
  micro_prompts = build.micro_prompts(config)
  count = config.rollout.prompts // settings.minibatches
  return programs.Iteration(
    config=built.config,
    state=critics.shapes(config, estimator, critic, optimizer, built.params),
    update=trainer.make_update(micro_prompts),
    prepare=estimator.prepare,
    needs=needs,
    rollouts=build.abstract_rollouts(config, needs, count),
    critic=critic,
    generation=rollouts.with_statistics(trainer.setting.generation, needs),
    prompts=config.rollout.prompts,
    prompt_tokens=config.prompts.max_tokens,
    micro_prompts=micro_prompts,
    chunk=settings.chunk,
    minibatches=settings.minibatches * settings.epochs,
    # Of bfloat16 the trainer recomputes what the sampler recorded.
    rescore=built.config.dtype != 'float32',
  )


def make(
  config, built: build.Model, topology: topologies.Topology
) -> programs.Plan:
  """A plan with nothing compiled yet.

  Args:
    config: the whole configuration.
    built: shapes of the model, of `model`.
    topology: for which chips.

  Raises:
    UserError: the mesh does not fit the chips, or the configuration is wrong.
  """
  return programs.Plan(
    iteration(config, built),
    topology,
    sharding.make_mesh(**config.mesh, devices=topology.devices),
    hardware.limit(topology.chip),
    _say,
  )


def _say(text: str) -> None:
  print(text, flush=True)


def main() -> None:
  """Plans what the flags name."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  given, config = flags.FLAGS, cli.config()
  if not given.topology:
    raise UserError('--topology is missing\nfor example --topology=v5e:16x16')
  checks.check(config)
  topologies.parse(given.topology)
  built = model(config, given.model)
  topology = topologies.make(given.topology, given.effort)
  if given.search:
    plan = plan_search.search(
      config,
      len(topology.devices),
      lambda changed: make(changed, built, topology),
      _say,
    )
  else:
    plan = make(config, built, topology)
    try:
      plan.check_state()
      plan.update() if given.update else plan.compile()
    except memory_analysis.TooLarge as error:
      raise UserError(plan_report.refusal(plan, error)) from error
  told = plan_report.as_dict(plan, given.model or config.model.path or 'model')
  print(plan_report.text(told))
  if given.output:
    text = json.dumps(told, indent=2) + '\n'
    pathlib.Path(given.output).write_text(text)


if __name__ == '__main__':
  flags.DEFINE_string('topology', '', 'Chip and shape, such as v5e:16x16.')
  flags.DEFINE_string('model', '', 'A published shape, such as llama3-8b.')
  flags.DEFINE_bool('search', False, 'Try meshes and micro-batches.')
  flags.DEFINE_bool('update', False, 'Compile the update alone.')
  flags.DEFINE_float('effort', -1.0, 'Of the TPU compiler.', -1.0, 1.0)
  flags.DEFINE_string('output', '', 'JSON file for all numbers.')
  cli.define_config_flag()
  cli.run(main)
