"""Whether this installation works; what it prints is enough for a bug report.

    python -m experiments.doctor [--workdir=RUN]

Versions, memory, settings and devices; a sum over many rows, which jax 0.10.2
compiled wrongly on CPU; then a model of some 10,000 parameters samples, scores
what it sampled and takes one update, in float32, and a checkpoint is written
and read back.  Status 0 if all of that is right, else 1.  With a run's folder:
also how that run is (`health.log`).
"""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from experiments import cli
from jaxrl_llm import compilation, estimators, runs, sampling, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.runs import folder as run_folder
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.sampling import policy

# Of two float32 computations of one log-probability, in nats.
_TOLERANCE = 1e-4
_PROMPTS, _SAMPLES, _TOKENS = 4, 8, 16
_MIB = 2**20
# Environment variables that change what JAX does.
_SETTING = re.compile(
  r'(JAX|XLA|LIBTPU|TPU|NCCL|CUDA_VISIBLE|MALLOC)_[A-Z0-9_]+'
)

_score = jax.jit(policy.score, static_argnames='config')


def system() -> Iterator[str]:
  """Lines about versions, memory and settings; it touches no device."""
  found = run_folder.software()
  versions = found.pop('versions').items()
  yield ', '.join(f'{name} {version}' for name, version in versions)
  yield f'{found["platform"]}, {found["machine"]}'
  yield from _host()
  yield f'compilation cache: {_cache()}'
  settings = [
    f'{name}={value}'
    for name, value in os.environ.items()
    if _SETTING.fullmatch(name) and not run_folder.SECRET.search(name)
  ]
  yield f'settings: {", ".join(sorted(settings)) or "none"}'


def _devices() -> str:
  """What JAX has to compute with."""
  try:
    found = run_folder.devices()
  except Exception as error:
    if cli.starting_backend(error):
      raise UserError(cli.no_backend(error)) from error
    raise
  told = [
    f'{found["device_count"]} {found["backend"]} device(s), '
    f'{found["device_kind"]}; {found["process_count"]} process(es)'
  ]
  for device in jax.local_devices():
    memory = device.memory_stats()
    if memory:
      used, limit = memory.get('bytes_in_use', 0), memory.get('bytes_limit', 0)
      told.append(
        f'device {device.id}: {used / _MIB:,.0f} of {limit / _MIB:,.0f} MiB'
      )
  return '; '.join(told)


def _host() -> Iterator[str]:
  with contextlib.suppress(ValueError):  # Not every system tells.
    page = os.sysconf('SC_PAGE_SIZE') / _MIB
    free, whole = map(os.sysconf, ('SC_AVPHYS_PAGES', 'SC_PHYS_PAGES'))
    yield f'host memory: {free * page:,.0f} of {whole * page:,.0f} MiB free'
  for name, folder in (
    ('this folder', '.'),
    ('temporary files', tempfile.gettempdir()),
  ):
    yield (
      f'disk for {name}: {shutil.disk_usage(folder).free / _MIB:,.0f} MiB free'
    )


def _cache() -> str:
  folder = jax.config.jax_compilation_cache_dir
  if not folder:
    return 'none'
  entries = list(pathlib.Path(folder).glob(compilation.ENTRIES))
  size = sum(path.stat().st_size for path in entries)
  return f'{folder}, {len(entries)} programs, {size / _MIB:,.0f} MiB'


def check() -> dict[str, Callable[[], str]]:
  """What is tried, by name; each tells a figure, or raises `UserError`."""
  config = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    tied=True,
    max_length=64,
  )

  @functools.cache
  def made():
    tokens = jax.random.randint(jax.random.key(1), (_PROMPTS, 8), 2, 64)
    prompts = policy.Prompts(
      tokens=tokens, lengths=jnp.arange(5, 5 + _PROMPTS, dtype=jnp.int32)
    )
    return transformer.init(config, jax.random.key(0)), prompts

  @functools.cache
  def sampled():
    params, prompts = made()
    return sampling.sample(
      config,
      transformer.sampling_layout(config, params),
      prompts,
      jax.random.key(2),
      samples=_SAMPLES,
      max_tokens=_TOKENS,
      eos_ids=(1,),
    )

  return {
    'devices': _devices,
    'compiler': compiler,
    'sampler = scorer': lambda: _same(config, *made(), sampled()),
    'update': lambda: _update(config, *made(), sampled()),
    'checkpoint': lambda: _round_trip(made()[0]),
  }


def compiler() -> str:
  """Checks a jitted `vmap` over 32,769 float32 rows, row i = (i, 0, 0).

  jax 0.10.2 returns 1065369600 for the last row's square norm on CPU, not
  32,768² (jax issue 39103).

  Raises:
    UserError: a row is wrong.
  """
  rows = jnp.zeros((32_769, 3)).at[:, 0].set(jnp.arange(32_769))
  norm = lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)
  found = np.asarray(jax.jit(lambda rows: jax.vmap(norm)(rows))(rows))
  expected = np.arange(32_769, dtype=np.float32) ** 2
  wrong = int((np.abs(found - expected) > 1e-4 * expected).sum())
  if wrong:
    raise UserError(
      f'{wrong:,} of 32,769 rows are wrong, as with jax 0.10.2 on CPU\n'
      "install a sound jax: pip install -e '.'"
    )
  return 'rows of a jitted vmap are right'


def _same(config, params, prompts, samples) -> str:
  """Sampling and training are to agree on what was drawn."""
  again = _score(config, params, prompts, samples.tokens)
  difference = jnp.abs(again.log_probs - samples.log_probs)
  highest = float(jnp.where(samples.mask, difference, 0.0).max())
  if not highest <= _TOLERANCE:
    raise UserError(
      f'log-probabilities differ by {highest:.2g} nats, more than {_TOLERANCE}'
    )
  return f'log-probabilities differ by at most {highest:.1g} nats'


def _update(config, params, prompts, samples) -> str:
  """A small step along the gradient is to make better responses likelier."""
  estimator = estimators.grpo(kl=0.0)
  # Any reward: the share of even tokens.
  even = jnp.where(samples.mask, 1.0 - samples.tokens % 2, 0.0).sum(axis=2)
  rewards = (even / samples.mask.sum(axis=2))[..., None]
  batch = jax.jit(estimator.prepare)(
    estimators.Rollouts(
      tokens=samples.tokens,
      mask=samples.mask,
      log_probs=samples.log_probs,
      valid=jnp.ones_like(samples.finished),
      rewards=rewards,
    )
  )
  optimizer = optax.sgd(1e-2)
  update = training.make_update(
    training.policy_forward(config, policy.Decoding()),
    estimator,
    optimizer,
    _PROMPTS // 2,
  )

  def surrogate(params) -> float:
    found = _score(config, params, prompts, samples.tokens)
    gain = jnp.where(batch.mask, batch.advantages * found.log_probs, 0.0)
    return float(gain.sum())

  before = surrogate(params)
  # The state is donated.
  state = training.init_state(
    {'policy': jax.tree.map(jnp.copy, params)}, optimizer
  )
  state, metrics = update(state, None, prompts, batch)
  gain = surrogate(state.trainable['policy']) - before
  if metrics['skipped'] or not gain > 0:
    raise UserError(
      f'gradient norm {float(metrics["grad_norm"]):.3g}, '
      f'{int(metrics["skipped"])} skipped; the surrogate changed by {gain:.3g}'
    )
  return (
    f'gradient norm {float(metrics["grad_norm"]):.3g}; the surrogate rose by '
    f'{gain:.2g}'
  )


def _round_trip(params) -> str:
  """What was saved is to come back bit for bit."""
  with (
    tempfile.TemporaryDirectory() as folder,
    Checkpoints(folder, keep_latest=1, keep_best=0) as checkpoints,
  ):
    checkpoints.save(1, {'params': params}, {})
    checkpoints.wait()
    _, tree, _ = checkpoints.restore({'params': params})
  pairs = zip(
    jax.tree.leaves(params), jax.tree.leaves(tree['params']), strict=True
  )
  for saved, found in pairs:
    if np.asarray(saved).tobytes() != np.asarray(found).tobytes():
      raise UserError('what was read is not what was written')
  return 'written, verified and read back'


def report(workdir=None) -> int:
  """Prints all of it.

  Args:
    workdir: of a run to look at; None for none.

  Returns:
    The exit status: 0 if all that was tried is right, else 1.

  Raises:
    UserError: the folder holds no run.
  """
  of_this_run = [] if workdir is None else of_run(workdir)
  for line in system():
    print(line)
  failed = 0
  with jax.default_matmul_precision('float32'):
    for name, attempt in check().items():
      start = time.perf_counter()
      try:
        told, word = attempt(), 'ok'
      except Exception as error:  # Whatever it is belongs into the report.
        lines = f'{type(error).__name__}: {error}'.splitlines()
        told = '; '.join(' '.join(line.split()) for line in lines)
        word, failed = 'FAILED', failed + 1
      seconds = time.perf_counter() - start
      print(f'{word}: {name}: {told} ({seconds:.1f} s)', flush=True)
      if failed and name == 'devices':
        break  # All else would fail by it.
  for line in of_this_run:
    print(line)
  return 1 if failed else 0


def of_run(workdir) -> list[str]:
  """How a run is at its last step, and what to do.

  Raises:
    UserError: there is no run, or its records are broken.
  """
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  try:
    records = runs.read_metrics(path)
  except OSError as error:
    raise UserError(
      f'{path.absolute()}: {error.strerror}\nname the folder of a run'
    ) from error
  # Main phases alone have a loss or a reward without a prefix.
  records = [each for each in records if 'loss' in each or 'reward' in each]
  if not records:
    return [f'{workdir}: no step of the main phase yet']
  health = runs.assess(records[: runs.WINDOW], records[-runs.WINDOW :])
  return [f'{workdir}: step {health.line}', *health.warnings.values()]


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run to look at.')
  cli.run(lambda: report(flags.FLAGS.workdir))
