"""Compiles the programs of one RL iteration for chips that are not there.

They are the functions that training runs, traced for shapes alone; each gets
its arguments in the sharding in which the one before leaves them.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm import critic as critic_lib
from jaxrl_llm import policy, rollouts, sampling, sharding
from jaxrl_llm.estimators import Needs, Rollouts
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.planning import collectives, flops, hlo, memory
from jaxrl_llm.planning.topologies import Topology, coordinates
from jaxrl_llm.training import TrainState, Update


class Iteration(NamedTuple):
  """One iteration of online RL, as shapes and functions.

  Attributes:
    config: of the policy.
    state: shapes of the train state.
    update: of `training.make_update`.
    prepare: of the estimator.
    needs: of the estimator.
    rollouts: shapes of one optimiser minibatch's.
    critic: None without.
    generation: how responses are sampled.
    prompts: P of a step.
    prompt_tokens: S.
    micro_prompts: prompts of a micro-batch.
    chunk: positions whose logits exist at one time.
    minibatches: optimiser minibatches of a step, epochs included.
    rescore: whether the trainer recomputes log-probabilities.
  """

  config: ModelConfig
  state: TrainState
  update: Update
  prepare: Callable[[Rollouts], Any]
  needs: Needs
  rollouts: Rollouts
  critic: critic_lib.Critic | None
  generation: rollouts.Generation
  prompts: int
  prompt_tokens: int
  micro_prompts: int
  chunk: int
  minibatches: int
  rescore: bool


class Program(NamedTuple):
  """One compiled program; bytes, FLOPs and seconds are of one chip.

  Attributes:
    name: what it does.
    times: how often an iteration runs it.
    asked: FLOPs of its matrix products, all chips', as written.
    computed: FLOPs of the matrix products that a chip computes.
    memory: bytes while it runs.
    collectives: of one run.
    compute, traffic, network: seconds of a run that the matrix products, the
      reads of parameters and cache, and the collectives take at peak.
    compile_seconds: on this machine.
  """

  name: str
  times: float
  asked: float
  computed: float
  memory: memory.Memory
  collectives: list[collectives.Collective]
  compute: float
  traffic: float
  network: float
  compile_seconds: float

  @property
  def seconds(self) -> float:
    """Of all its runs: computing overlaps reading, but not sending."""
    return self.times * (max(self.compute, self.traffic) + self.network)


class Plan:
  """Compiles the programs of an iteration one by one.

  Args:
    iteration: what to compile.
    topology: for which chips.
    mesh: of them.
    limit: bytes that a chip may hold; None for those of its memory.
    say: told of each program before it is compiled.

  Attributes:
    topology, mesh, limit: as given.
    resident: bytes that the iteration keeps throughout.
    sampler: bytes of the parameters in the layout of sampling.
    programs: those compiled so far, by name.
  """

  def __init__(
    self,
    iteration: Iteration,
    topology: Topology,
    mesh: Mesh,
    limit: int | None = None,
    say: Callable[[str], None] = lambda text: None,
  ):
    self._it, self.topology, self.mesh = iteration, topology, mesh
    self.limit = limit or topology.chip.memory
    self._say = say
    self.programs: dict[str, Program] = {}
    place = self._place
    self.state = place(
      iteration.state,
      sharding.param_specs(iteration.state, 'training', mesh),
    )
    self._policy = self.state.trainable['policy']
    self._sampler = place(
      iteration.state.trainable['policy'],
      sharding.param_specs(
        iteration.state.trainable['policy'], 'sampling', mesh
      ),
    )
    self.sampler = memory.local(self._sampler)
    self.resident = memory.Resident.of(
      self.state, self._policy if iteration.needs.reference else None
    )

  @property
  def seconds(self) -> float:
    """Of an iteration, at best."""
    return sum(program.seconds for program in self.programs.values())

  @property
  def tokens(self) -> int:
    """That an iteration generates, if responses have their full length."""
    it = self._it
    return it.prompts * it.generation.samples * it.generation.max_tokens

  def check_state(self) -> None:
    """Raises `memory.TooLarge` if the state and its gradient do not fit."""
    least = self.resident.all + memory.gradient(self.state.trainable)
    if least > self.limit:
      raise memory.TooLarge('update', least - self.limit)

  def compile(self) -> None:
    """Compiles what is not yet compiled.

    Raises:
      memory.TooLarge: the state or a program does not fit.
    """
    self.check_state()
    it = self._it
    samples = self._sample()
    prompts = self._prompts()
    count = it.rescore + bool(it.needs.reference)
    if count:
      self._score('score', prompts, samples.tokens, count)
    if it.critic is not None:
      self._values(prompts, samples.tokens)
    if 'update' not in self.programs:
      self.update()

  def update(self) -> None:
    """Compiles the update of one optimiser minibatch.

    Raises:
      memory.TooLarge: it does not fit.
    """
    it, mesh = self._it, self.mesh
    batch = jax.eval_shape(it.prepare, it.rollouts)
    count, rows = batch.tokens.shape[:2]
    whole = sharding.row_spec(mesh, count, rows)

    def spec(x):
      return PartitionSpec(*whole[: x.ndim]) if x.ndim > 1 else PartitionSpec()

    batch = self._place(batch, jax.tree.map(spec, batch))
    prompts = self._prompts(count)
    passes = 3 * count // it.micro_prompts
    self._add(
      'update',
      it.update,
      (self.state, None, prompts, batch),
      times=it.minibatches,
      reads=passes * self._gathered() + 2 * self.resident.state,
      held=self.resident.reference,
    )

  def _sample(self):
    it = self._it
    keep = it.needs.branches is not None
    function = sampling.sample_and_keep if keep else sampling.sample
    generation = it.generation
    static = dict(
      decoding=generation.decoding,
      eos_ids=generation.eos_ids,
      pad_id=generation.pad_id,
      statistics=generation.statistics,
    )
    reads = self.sampler + self._cache(generation.samples)
    key = self._key()
    found = self._add(
      'sample',
      function,
      (it.config, self._sampler, self._prompts(), key),
      static | dict(samples=generation.samples, max_tokens=generation.max_tokens),
      steps=(generation.max_tokens,),
      reads=generation.max_tokens * reads,
      cache=self._cache(generation.samples),
      held=self.resident.all,
    )
    if it.needs.greedy:
      greedy = rollouts.greedy(generation)
      self._add(
        'greedy',
        sampling.sample,
        (it.config, self._sampler, self._prompts(), key),
        static
        | dict(
          decoding=greedy.decoding, samples=1, max_tokens=greedy.max_tokens
        ),
        steps=(generation.max_tokens,),
        reads=generation.max_tokens
        * (self.sampler + self._cache(1)),
        cache=self._cache(1),
        held=self.resident.all,
      )
    if not keep:
      return found
    found, cache = found
    self._fork(found, cache, static, key)
    return found

  def _fork(self, samples, cache, static, key):
    """Branches; each is taken to write half of a response."""
    it = self._it
    wanted, length = it.needs.branches, it.generation.max_tokens
    count = min(wanted.count, max(length - 1, 1))
    shape = (*samples.tokens.shape[:2], count)
    spec = sharding.row_spec(self.mesh, *shape[:2])
    positions = self._array(shape, jnp.int32, PartitionSpec(*spec[:2]))
    steps = count * wanted.samples * length / 2
    held = memory.local(cache)
    self._add(
      'branch',
      sampling.fork,
      (it.config, self._sampler, cache, samples, positions, key),
      static | dict(branches=wanted.samples),
      steps=(steps,),
      reads=steps * (self.sampler + held),
      cache=held,
      held=self.resident.all,
    )

  def _score(self, name, prompts, tokens, times):
    it = self._it
    self._add(
      name,
      rollouts.score_tokens,
      (it.config, self._policy),
      dict(
        prompts=prompts,
        tokens=tokens,
        decoding=it.generation.decoding,
        micro_prompts=it.micro_prompts,
        chunk=it.chunk,
      ),
      times=times,
      reads=it.prompts // it.micro_prompts * self._gathered(),
      held=self.resident.all - memory.local(self._policy),
    )

  def _values(self, prompts, tokens):
    it = self._it
    self._add(
      'critic',
      critic_lib.score_values,
      (
        it.config,
        it.critic,
        self.state.trainable,
        prompts,
        tokens,
        it.micro_prompts,
      ),
      reads=it.prompts // it.micro_prompts * self._gathered(),
      held=self.resident.all - memory.local(self.state.trainable),
    )

  def _add(
    self,
    name: str,
    function,
    arguments: tuple,
    static: dict[str, Any] | None = None,
    *,
    times: float = 1,
    steps: tuple[float, ...] = (),
    reads: float,
    cache: int = 0,
    held: int = 0,
  ):
    """Compiles a program and gives its results as shapes.

    Args:
      held: bytes of what lies in memory besides the arguments.
    """
    self._say(f'compiling {name}')
    start = time.perf_counter()
    chip = self.topology.chip
    with jax.set_mesh(self.mesh):
      traced = function.trace(*arguments, **(static or {}))
      lowered = traced.lower()
      try:
        compiled = lowered.compile(
          compiler_options=self.topology.compiler_options
        )
      except jax.errors.JaxRuntimeError as error:
        raise memory.TooLarge.of(name, held, self.limit, error) from error
    spent = time.perf_counter() - start
    module = hlo.parse(compiled.as_text())
    sent = collectives.find(module, steps)
    computed = flops.of_module(module, steps)
    program = Program(
      name=name,
      times=times,
      asked=flops.of_jaxpr(traced.jaxpr, steps),
      computed=computed,
      memory=memory.account(compiled, self.resident, cache, held),
      collectives=sent,
      compute=computed / chip.flops,
      traffic=reads / chip.bandwidth,
      network=collectives.seconds(
        sent, chip, self.topology.shape, self._locate
      ),
      compile_seconds=spent,
    )
    self.programs[name] = program
    if program.memory.peak > self.limit:
      raise memory.TooLarge(name, program.memory.peak - self.limit)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      traced.out_info,
      compiled.output_shardings,
    )

  def _locate(self, group: tuple[int, ...]):
    devices = list(self.mesh.devices.flat)
    return coordinates(self.topology, [devices[i].id for i in group])

  def _gathered(self) -> float:
    """Bytes of the policy on each chip once fsdp has been gathered."""
    width = jnp.dtype(self._it.config.dtype).itemsize
    count = sum(x.size for x in jax.tree.leaves(self._policy))
    return count * width / self.mesh.shape['tensor']

  def _cache(self, samples: int) -> int:
    """Bytes on each chip of prompts' and responses' keys and values."""
    it, mesh = self._it, self.mesh
    rows = math.prod(mesh.shape[name] for name in sharding.ROWS)
    tensor = mesh.shape['tensor']
    heads = it.config.num_kv_heads
    heads = heads // tensor if heads % tensor == 0 else heads
    tokens = it.prompt_tokens - 1 + samples * it.generation.max_tokens
    width = jnp.dtype(it.config.dtype).itemsize
    each = 2 * it.config.num_layers * heads * it.config.head_dim * width
    return each * tokens * it.prompts // rows

  def _prompts(self, count: int = 0) -> policy.Prompts:
    count = count or self._it.prompts
    spec = sharding.row_spec(self.mesh, count, 1)
    of_prompts = PartitionSpec(*spec[:1])
    shape = (count, self._it.prompt_tokens)
    return policy.Prompts(
      tokens=self._array(shape, jnp.int32, of_prompts),
      lengths=self._array((count,), jnp.int32, of_prompts),
    )

  def _key(self):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return self._array(key.shape, key.dtype, PartitionSpec())

  def _array(self, shape, dtype, spec):
    placed = NamedSharding(self.mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

  def _place(self, tree, specs):
    return jax.tree.map(
      lambda x, spec: self._array(x.shape, x.dtype, spec), tree, specs
    )
