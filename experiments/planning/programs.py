"""Programs of one RL iteration, compiled for absent chips from shapes alone.

They are the functions that training runs; each gets its arguments in the
sharding in which the previous one leaves them.
"""

import functools
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments import build, critics, online
from experiments.planning import collectives, flops, hlo
from experiments.planning.topologies import GIB, Topology
from jaxrl_llm import estimators, rollouts, sampling, sharding, training
from jaxrl_llm.models import transformer
from jaxrl_llm.sampling import policy

# In the order of an iteration.
NAMES = ('layout', 'sample', 'greedy', 'branch', 'score', 'critic', 'update')


def step(config, model: build.Model) -> tuple[training.Trainer, tuple]:
  """Returns a configuration's trainer, and its update's arguments as shapes.

  The arguments are the state, None, prompts and batch of a minibatch.
  """
  trainer, estimator = online.trainer(config, model), build.estimator(config)
  needs = estimator.needs
  critic = critics.critic(config, model) if needs.critic else None
  optimizer, _ = online.optimizer(config, needs)
  count = config.rollout.prompts // config.training.minibatches
  state = critics.shapes(config, estimator, critic, optimizer, model.params)
  shapes = estimators.rollout_shapes(
    needs, count, config.rollout.samples, config.rollout.max_tokens
  )
  batch = jax.eval_shape(estimator.prepare, shapes)
  return trainer, (state, None, prompts(config, count), batch)


class TooLarge(Exception):
  """A program lacks memory: its name, and the bytes missing on a chip."""

  def __init__(self, program: str, missing: float):
    super().__init__(f'{program} lacks {missing / GIB:.1f} GiB')
    self.program, self.missing = program, missing


class Plan:
  """The programs of an iteration, and what each takes.

  Attributes:
    limit: bytes that a chip may hold.
    resident: bytes of parameters, optimizer and reference on each chip.
    sampler: bytes of the parameters in the layout of sampling; 0 at first.
    programs: {name: numbers}, of one run on one chip but for `times`, runs per
      iteration; `asked`, the FLOPs of matrix products as written, on all chips
      together; and `seconds`, of all runs.  `compute`, `traffic` and `network`
      are seconds of the matrix products, of reading parameters and cache, and
      of the collectives, at peak: the first two overlap.  In `memory`, `other`
      are further arguments, and `temporary` results and scratch.
  """

  def __init__(self, config, model: build.Model, topology: Topology):
    self._config, self._model = config, model.config
    self.topology, self.limit = topology, topology.chip.limit
    self._mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
    with jax.set_mesh(self._mesh):
      self._trainer, (self._state, _, *self._batch) = step(config, model)
      setting, rollout = self._trainer.setting, config.rollout
      self._micro, self._needs = setting.micro_prompts, setting.needs
      samples, generation = rollout.samples, setting.generation
      sharding.check_rows(rollout.prompts, samples, 'rollout.prompts')
      sharding.check_rows(self._micro, samples, 'training.micro_prompts')
    self._generation = rollouts.with_statistics(generation, self._needs)
    self._policy = self._state.trainable['policy']
    self.resident = dict(
      parameters=local(self._state.trainable),
      optimizer=local(self._state.opt_state),
      reference=local(self._policy) if self._needs.reference else 0,
    )
    self._prompts = self._rows(prompts(config, rollout.prompts))
    self.sampler, self.programs = 0, {}

  def numbers(self, model: str) -> dict[str, Any]:
    """The whole plan for JSON, under a model's name."""
    rollout, training = self._config.rollout, self._config.training
    programs = [self.programs[x] for x in NAMES if x in self.programs]
    return {
      'model': model,
      'topology': self.topology.name,
      'chips': len(self.topology.devices),
      'mesh': dict(self._mesh.shape),
      'prompts': rollout.prompts,
      'samples': rollout.samples,
      'minibatches': training.minibatches * training.epochs,
      'micro_prompts': self._micro,
      'limit': self.limit,
      'seconds': sum(program['seconds'] for program in programs),
      'tokens': rollout.prompts * rollout.samples * rollout.max_tokens,
      'programs': programs,
    }

  def compile(self, update_only: bool = False) -> None:
    """Compiles the update and perhaps the rest; TooLarge if any is."""
    state, training = self._state, self._config.training
    gradient = local(state.trainable, least_width=4)  # summed up in float32
    missing = sum(self.resident.values()) + gradient - self.limit
    if missing > 0:
      raise TooLarge('update', missing)
    resident = state.trainable, state.opt_state
    count = self._config.rollout.prompts // training.minibatches
    self._add(
      'update',
      self._trainer.make_update(self._micro),
      (state, None, *self._rows(self._batch)),
      times=training.minibatches * training.epochs,
      reads=self._passes(3 * count) + 2 * local(resident),
      resident=resident,
    )
    if not update_only:
      layout = functools.partial(transformer.sampling_layout, self._model)
      sampler = self._add(
        'layout',
        jax.jit(layout),
        (self._policy,),
        reads=2 * local(self._policy),
        resident=self._policy,
      )
      self.sampler = local(sampler)
      self._score(self._sample(sampler).tokens)

  def _sample(self, sampler):
    """Compiles the programs that generate; returns responses as shapes."""
    generation, branches = self._generation, self._needs.branches
    length, static = generation.max_tokens, _static(generation)
    if self._needs.tree is not None:
      # At most: shared prefixes are decoded once.
      static['samples'] = self._needs.tree.rows
    key = self._rows(jax.eval_shape(jax.random.key, 0))
    decode = functools.partial(
      self._add,
      arguments=(self._model, sampler, self._prompts, key),
      steps=length,
      reads=length * self.sampler,
    )
    if self._needs.greedy:
      greedy = _static(rollouts.greedy(generation))
      decode('greedy', sampling.sample, static=greedy)
    if branches is None:
      return decode('sample', sampling.sample, static=static)
    samples, cache = decode('sample', sampling.sample_and_keep, static=static)
    count = min(branches.count, max(length - 1, 1))
    shape = (*samples.tokens.shape[:2], count)
    positions = self._rows(jax.ShapeDtypeStruct(shape, jnp.int32))
    # Each branch is assumed to write half of a response.
    steps = count * branches.samples * length / 2
    names = 'decoding', 'eos_ids', 'pad_id', 'statistics'
    self._add(
      'branch',
      sampling.fork,
      (self._model, sampler, cache, samples, positions, key),
      {x: static[x] for x in names} | dict(branches=branches.samples),
      steps=steps,
      reads=steps * self.sampler,
      cache=local(cache),
    )
    return samples

  def _score(self, tokens) -> None:
    """Compiles the programs that read responses."""
    setting, rest = self._trainer.setting, (self._prompts, tokens)
    reads = self._passes(self._config.rollout.prompts)
    # The trainer recomputes what a bfloat16 sampler recorded.
    times = (self._model.dtype != 'float32') + self._needs.reference
    if times:
      arguments = (self._model, self._policy, *rest, self._generation.decoding)
      self._add(
        'score',
        rollouts.score_tokens,
        (*arguments, self._micro, setting.chunk),
        times=times,
        reads=reads,
        resident=self._policy,
      )
    if setting.values is not None:
      trainable = self._state.trainable
      self._add(
        'critic',
        setting.values.func,
        (*setting.values.args, trainable, *rest, self._micro),
        reads=reads,
        resident=trainable,
      )

  def _add(
    self,
    name: str,
    function,
    arguments: tuple,
    static: dict[str, Any] | None = None,
    *,
    times: float = 1,
    steps: float = 0,
    reads: float,
    cache: int | None = None,
    resident: Any = None,
  ):
    """Compiles a program and returns its results as shapes.

    Args:
      name, function, arguments, static, times: the program.
      steps: steps of decoding.
      reads: bytes of parameters that a run reads.
      cache: bytes of keys and values, read at every step; None for those in
        the state of the decoding loop.
      resident: those arguments that `self.resident` counts.
    """
    print(f'compiling {name}', flush=True)
    start, chip = time.perf_counter(), self.topology.chip
    options = self.topology.compiler_options
    # Resident bytes that are not among the arguments.
    idle = sum(self.resident.values()) - local(resident)
    with jax.set_mesh(self._mesh):
      traced = function.trace(*arguments, **(static or {}))
      try:
        compiled = traced.lower().compile(compiler_options=options)
      except jax.errors.JaxRuntimeError as error:
        raise TooLarge(name, needed_bytes(error) + idle - self.limit) from error
    duration = time.perf_counter() - start
    module = hlo.parse(compiled.as_text())
    if cache is None:
      cache = _cache(module) if steps else 0
    loops = (steps,) if steps else ()
    executions = hlo.executions(module, loops)
    sums, network = collectives.find(executions, self._rate)
    asked, kernels = flops.of_jaxpr(traced.jaxpr, loops)
    computed = kernels / len(self.topology.devices)
    computed += flops.of_executions(executions)
    compute = computed / chip.flops
    traffic = (reads + steps * cache) / chip.bandwidth
    report = compiled.memory_analysis()
    other = report.argument_size_in_bytes
    temporary = report.output_size_in_bytes + report.temp_size_in_bytes
    temporary -= report.alias_size_in_bytes
    peak, other = idle + other + temporary, other - local(resident)
    # The cache is either among the arguments or in the state of a loop.
    if other >= cache:
      other -= cache
    else:
      temporary -= cache
    memory = dict(cache=cache, other=other, temporary=temporary, peak=peak)
    self.programs[name] = dict(
      name=name,
      times=times,
      asked=asked,
      computed=computed,
      collectives=sums,
      compute=compute,
      traffic=traffic,
      network=network,
      compile_seconds=duration,
      memory=self.resident | memory,
      seconds=times * (max(compute, traffic) + network),
    )
    if peak > self.limit:
      raise TooLarge(name, peak - self.limit)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      traced.out_info,
      compiled.output_shardings,
    )

  def _rate(self, group: tuple[int, ...]) -> float:
    devices = [self._mesh.devices.flat[i] for i in group]
    return collectives.bandwidth(self.topology, devices)

  def _passes(self, prompts: int) -> float:
    """Bytes of the gathered policy that passes over prompts read."""
    width = jnp.dtype(self._model.dtype).itemsize
    count = sum(x.size for x in jax.tree.leaves(self._policy))
    gathered = count * width / self._mesh.shape['tensor']
    return prompts // self._micro * gathered

  def _rows(self, tree):
    """Shapes [P, ...] or [P, G, ...], sharded as by `sharding.place_rows`."""

    def place(x):
      spec = PartitionSpec()
      if x.ndim:
        spec = sharding.row_spec(x.shape[0], x.shape[1] if x.ndim > 2 else 1)
        spec = spec if x.ndim > 2 else PartitionSpec(*spec[:1])
      rows = NamedSharding(self._mesh, spec)
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows)

    with jax.set_mesh(self._mesh):
      return jax.tree.map(place, tree)


def prompts(config, count: int) -> policy.Prompts:
  """Shapes of encoded prompts."""
  return policy.Prompts(
    tokens=jax.ShapeDtypeStruct((count, config.prompts.max_tokens), jnp.int32),
    lengths=jax.ShapeDtypeStruct((count,), jnp.int32),
  )


def local(tree: Any, least_width: int = 0) -> int:
  """Bytes of a tree on each chip, with at least a width per number."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape))
    * max(x.dtype.itemsize, least_width)
    for x in jax.tree.leaves(tree)
  )


def needed_bytes(error: Exception) -> float:
  """Returns the bytes that a program needs, from the compiler's refusal."""
  text = str(error)
  match = re.search(r'(?:\(|Used |Attempting to use )([\d.]+)([KMGT])', text)
  if 'RESOURCE_EXHAUSTED' not in text or not match:
    raise error
  return float(match[1]) * 1024 ** ' KMGT'.index(match[2])


def _cache(module: hlo.Module) -> int:
  """Bytes of the keys and values in the state of a program's decoding loop.

  They are its only arrays of four dimensions.  Later loops decode fewer rows.
  """
  loops = [
    sum(count for shape, count in hlo.arrays(x.type) if len(shape) == 4)
    for x in module.entry.values()
    if x.opcode == 'while'
  ]
  return max(loops, default=0)


def _static(generation: rollouts.Generation) -> dict[str, Any]:
  """Returns the static arguments of a sampler that decodes every response."""
  return {k: x for k, x in vars(generation).items() if k != 'allocation'}
