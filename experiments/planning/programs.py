"""Compiles the programs of one RL iteration for chips that are not there.

They are the functions that training runs, traced for shapes alone; each gets
its arguments in the sharding in which the one before leaves them.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.planning import collectives, flops, hlo
from experiments.planning import memory_analysis as memory
from experiments.planning.topologies import Topology, coordinates
from jaxrl_llm import rollouts, sampling, sharding
from jaxrl_llm.estimators import Needs, Rollouts
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.sampling import policy
from jaxrl_llm.training import TrainState, Update
from jaxrl_llm.training import critic as critic_lib


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
    iteration, topology, mesh, limit: as given.
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
    self.iteration = iteration
    self.topology, self.mesh = topology, mesh
    self.limit = limit or topology.chip.memory
    self._say = say
    self.programs: dict[str, Program] = {}
    with jax.set_mesh(mesh):
      sharding.check_rows(
        iteration.prompts, iteration.generation.samples, 'rollout.prompts'
      )
      sharding.check_rows(
        iteration.micro_prompts,
        iteration.generation.samples,
        'training.micro_prompts',
      )
      self.state = sharding.with_shardings(iteration.state)
    self._policy = self.state.trainable['policy']
    reference = self._policy if iteration.needs.reference else None
    self.resident = memory.Resident.of(self.state, reference)
    self.sampler = 0

  @property
  def seconds(self) -> float:
    """Of an iteration, at best."""
    return sum(program.seconds for program in self.programs.values())

  @property
  def tokens(self) -> int:
    """That an iteration generates, if responses have their full length."""
    it = self.iteration
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
    it = self.iteration
    sampler = self._add(
      'layout',
      jax.jit(functools.partial(transformer.sampling_layout, it.config)),
      (self._policy,),
      reads=2 * memory.local(self._policy),
      held=self.resident.all - memory.local(self._policy),
    )
    self.sampler = memory.local(sampler)
    samples = self._sample(sampler)
    count = it.rescore + bool(it.needs.reference)
    if count:
      self._score(samples.tokens, count)
    if it.critic is not None:
      self._values(samples.tokens)
    if 'update' not in self.programs:
      self.update()

  def update(self) -> None:
    """Compiles the update of one optimiser minibatch.

    Raises:
      memory.TooLarge: it does not fit.
    """
    it = self.iteration
    batch = jax.eval_shape(it.prepare, it.rollouts)
    count = batch.tokens.shape[0]
    passes = 3 * count // it.micro_prompts
    self._add(
      'update',
      it.update,
      (self.state, None, self._prompts(count), self._rows(batch)),
      times=it.minibatches,
      reads=passes * self._gathered() + 2 * self.resident.state,
      held=self.resident.reference,
    )

  def _sample(self, sampler):
    """Responses, greedy ones and branches, as far as they are needed."""
    it = self.iteration
    generation, needs = it.generation, it.needs
    static = dict(
      decoding=generation.decoding,
      eos_ids=generation.eos_ids,
      pad_id=generation.pad_id,
      statistics=generation.statistics,
    )
    keep = needs.branches is not None
    found = self._decode(
      'sample',
      sampling.sample_and_keep if keep else sampling.sample,
      sampler,
      static | dict(samples=generation.samples),
    )
    if needs.greedy:
      decoding = rollouts.greedy(generation).decoding
      how = static | dict(samples=1, decoding=decoding)
      self._decode('greedy', sampling.sample, sampler, how)
    if not keep:
      return found
    found, cache = found
    self._fork(sampler, found, cache, static)
    return found

  def _decode(self, name, function, sampler, static):
    it = self.iteration
    tokens = it.generation.max_tokens
    return self._add(
      name,
      function,
      (it.config, sampler, self._prompts(), self._key()),
      static | dict(max_tokens=tokens),
      steps=(tokens,),
      reads=tokens * self.sampler,
      held=self.resident.all,
    )

  def _fork(self, sampler, samples, cache, static):
    """Branches; each is taken to write half of a response."""
    it = self.iteration
    wanted, length = it.needs.branches, it.generation.max_tokens
    count = min(wanted.count, max(length - 1, 1))
    shape = (*samples.tokens.shape[:2], count)
    positions = self._rows(jax.ShapeDtypeStruct(shape, jnp.int32))
    steps = count * wanted.samples * length / 2
    self._add(
      'branch',
      sampling.fork,
      (it.config, sampler, cache, samples, positions, self._key()),
      static | dict(branches=wanted.samples),
      steps=(steps,),
      reads=steps * self.sampler,
      cache=memory.local(cache),
      held=self.resident.all,
    )

  def _score(self, tokens, times):
    it = self.iteration
    self._add(
      'score',
      rollouts.score_tokens,
      (it.config, self._policy),
      dict(
        prompts=self._prompts(),
        tokens=tokens,
        decoding=it.generation.decoding,
        micro_prompts=it.micro_prompts,
        chunk=it.chunk,
      ),
      times=times,
      reads=it.prompts // it.micro_prompts * self._gathered(),
      held=self.resident.all - memory.local(self._policy),
    )

  def _values(self, tokens):
    it = self.iteration
    self._add(
      'critic',
      critic_lib.score_values,
      (
        it.config,
        it.critic,
        self.state.trainable,
        self._prompts(),
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
    cache: int | None = None,
    held: int = 0,
  ):
    """Compiles a program and gives its results as shapes.

    Args:
      times: how often an iteration runs it.
      steps: as for `hlo.executed`, the first of them of decoding.
      reads: bytes of parameters that it reads.
      cache: bytes of its keys and values, read at every step; None for those
        that its loops hold.
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
    if cache is None:
      cache = memory.held_cache(module) if steps else 0
    sent = collectives.find(module, steps)
    asked = flops.of_jaxpr(traced.jaxpr, steps)
    # What kernels compute only the trace tells.
    computed = flops.of_module(module, steps)
    computed += asked.kernels / len(self.topology.devices)
    program = Program(
      name=name,
      times=times,
      asked=asked.total,
      computed=computed,
      memory=memory.account(compiled, self.resident, cache, held),
      collectives=sent,
      compute=computed / chip.flops,
      traffic=(reads + sum(steps) * cache) / chip.bandwidth,
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
    width = jnp.dtype(self.iteration.config.dtype).itemsize
    count = sum(x.size for x in jax.tree.leaves(self._policy))
    return count * width / self.mesh.shape['tensor']

  def _prompts(self, count: int = 0) -> policy.Prompts:
    count = count or self.iteration.prompts
    array = jax.ShapeDtypeStruct
    return self._rows(
      policy.Prompts(
        tokens=array((count, self.iteration.prompt_tokens), jnp.int32),
        lengths=array((count,), jnp.int32),
      )
    )

  def _key(self):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return self._placed(key, PartitionSpec())

  def _rows(self, tree):
    """Shapes [P, ...] or [P, G, ...] where `sharding.place_rows` puts them."""

    def place(x):
      if not x.ndim:
        return self._placed(x, PartitionSpec())
      spec = sharding.row_spec(x.shape[0], x.shape[1] if x.ndim > 2 else 1)
      return self._placed(x, spec if x.ndim > 2 else PartitionSpec(*spec[:1]))

    with jax.set_mesh(self.mesh):
      return jax.tree.map(place, tree)

  def _placed(self, x, spec):
    placed = NamedSharding(self.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
