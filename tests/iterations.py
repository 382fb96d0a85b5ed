"""Whole RL iterations on meshes of 8 devices against one device."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import steps

from experiments import build, online
from experiments.configs import quickstart
from jaxrl_llm import rollouts, sharding, training
from jaxrl_llm.models import transformer
from jaxrl_llm.rewards import RewardPart

ALGORITHMS = {
  'grpo': dict(name='grpo', kl=0.04),
  'trepo': dict(name='trepo', count=2, samples=2),
}
PROMPTS, SAMPLES, MICRO_PROMPTS = 16, 4, 8


def configuration(algorithm):
  config = quickstart.get_config()
  config.rollout.update(prompts=PROMPTS, samples=SAMPLES, max_tokens=12)
  config.training.update(micro_prompts=MICRO_PROMPTS, chunk=8)
  config.model.architecture.update(
    hidden_size=32, intermediate_size=64, num_layers=2, num_heads=8
  )
  config.algorithm = ALGORITHMS[algorithm]
  return config


def keep_gradients() -> optax.GradientTransformation:
  """An optimiser whose state is the gradient, and which changes nothing."""
  zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
  return optax.GradientTransformation(
    zeros, lambda gradients, state, params: (zeros(gradients), gradients)
  )


def iteration(algorithm: str) -> dict:
  """What one iteration samples and its gradients, on the present mesh."""
  config = configuration(algorithm)
  model = build.model(config.model, config.seed)
  data = build.dataset(config, model.tokenizer)
  rl = online.Steps(config, model, data.train, jax.random.key(0))
  rl.rewards = [RewardPart('ones', steps.count_ones)]
  # Another policy than the reference: its KL has a gradient.
  rl.reference = jax.tree.map(lambda x: 1.1 * x, model.params)
  state = rl.begin(model.params)
  found = rl.collect(state, 0)
  batch = jax.jit(rl.estimator.prepare)(found.rollouts)
  batch = jax.jit(rl.estimator.reweight)(batch)
  update = training.make_update(
    training.policy_forward(model.config, rl.generation.decoding, chunk=8),
    rl.estimator,
    keep_gradients(),
    micro_prompts=MICRO_PROMPTS,
  )
  traced = training.init_state(state.trainable, keep_gradients())
  prompts = found.responses.prompts
  compiled = update.lower(traced, None, prompts, batch).compile()
  memory = memory_of(compiled, traced)
  traced, _ = compiled(traced, None, prompts, batch)
  greedy = rollouts.greedy(rl.generation)
  params = transformer.sampling_layout(model.config, traced.trainable['policy'])
  _, argmax = rollouts.generate(
    model.config, params, rl.source.batch(0), greedy, jax.random.key(0)
  )
  exact = {
    'tokens': found.responses.samples.tokens,
    'mask': found.responses.samples.mask,
    'greedy': argmax.tokens,
    'rewards': found.rollouts.rewards,
    'generated': found.tokens,
  }
  if algorithm == 'trepo':
    exact['branch_values'] = found.rollouts.branch_values
  return jax.device_get(
    {'exact': exact, 'gradients': traced.opt_state, 'memory': memory}
  )


def memory_of(compiled, state) -> dict:
  """Bytes per device of an update, as compiled, and of its state."""
  found = compiled.memory_analysis()
  own = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)]
  return {
    'state': sum(own),
    'aliased': found.alias_size_in_bytes,
    'output': found.output_size_in_bytes,
  }


def compare(found: dict, expected: dict) -> dict:
  """Which arrays are equal, and how far gradients are from each other."""
  equal = {
    name: bool(np.array_equal(value, expected['exact'][name]))
    for name, value in found['exact'].items()
  }
  errors = jax.tree.map(
    lambda x, y: float(np.linalg.norm(x - y) / np.linalg.norm(y)),
    found['gradients'],
    expected['gradients'],
  )
  return {
    'equal': equal,
    'gradient': max(jax.tree.leaves(errors)),
    'norm': float(optax.tree.norm(expected['gradients'])),
    **found['memory'],
  }


def compare_meshes(algorithm: str, meshes: list[str]):
  """Yields what `compare` says of each mesh."""
  expected = iteration(algorithm)
  for mesh in meshes:
    sizes = [int(size) for size in mesh.split(',')]
    with jax.set_mesh(sharding.make_mesh(*sizes)):
      found = iteration(algorithm)
    record = {'mesh': mesh, 'algorithm': algorithm}
    yield record | compare(found, expected)


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 8)
  jax.config.update('jax_disable_most_optimizations', True)
  for name in sys.argv[1].split(','):
    for line in compare_meshes(name, sys.argv[2:]):
      print(json.dumps(line), flush=True)
