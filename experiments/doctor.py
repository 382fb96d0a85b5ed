"""Tests this installation; the output is enough for a bug report.

    python -m experiments.doctor [--workdir=RUN]

Prints versions, memory, settings and devices, and checks a sum over many rows,
which jax 0.10.2 computes wrongly on CPU.  Then a model of some 10,000
parameters takes a training step, in float32, and a checkpoint is written and
read back.  Status 0 if all of that is right, else
1.  With a run's folder it also prints the run's health (`health.log`).
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
from jaxrl_llm import compilation, estimators, rollouts, runs, training
from jaxrl_llm.errors import UserError
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.runs import folder as run_folder
from jaxrl_llm.runs.checkpoints import Checkpoints
from jaxrl_llm.tasks import prompts, vocabulary

# Between two float32 computations of a log-probability, in nats.
_TOLERANCE = 1e-4
_ESTIMATOR = estimators.grpo(kl=0.0)
_MIB = 2**20
# Environment variables that change what JAX does.
_SETTING = re.compile(
  r'(JAX|XLA|LIBTPU|TPU|NCCL|CUDA_VISIBLE|MALLOC)_[A-Z0-9_]+'
)


def system() -> Iterator[str]:
  """Yields lines about versions, memory and settings; touches no device."""
  software = run_folder.software()
  versions = software.pop('versions').items()
  yield ', '.join(f'{name} {version}' for name, version in versions)
  yield f'{software["platform"]}, {software["machine"]}'
  with contextlib.suppress(ValueError):  # Some systems do not have these.
    page = os.sysconf('SC_PAGE_SIZE') / _MIB
    free, whole = map(os.sysconf, ('SC_AVPHYS_PAGES', 'SC_PHYS_PAGES'))
    yield f'host memory: {free * page:,.0f} of {whole * page:,.0f} MiB free'
  folders = {'this folder': '.', 'temporary files': tempfile.gettempdir()}
  for name, folder in folders.items():
    free = shutil.disk_usage(folder).free / _MIB
    yield f'disk for {name}: {free:,.0f} MiB free'
  cache = jax.config.jax_compilation_cache_dir
  if cache:
    entries = list(pathlib.Path(cache).glob(compilation.ENTRIES))
    size = sum(path.stat().st_size for path in entries) / _MIB
    cache = f'{cache}, {len(entries)} programs, {size:,.0f} MiB'
  yield f'compilation cache: {cache or "none"}'
  settings = [
    f'{name}={value}'
    for name, value in os.environ.items()
    if _SETTING.fullmatch(name) and not run_folder.SECRET.search(name)
  ]
  yield f'settings: {", ".join(sorted(settings)) or "none"}'


def _devices() -> str:
  """Returns JAX's devices and their memory."""
  try:
    devices = run_folder.devices()
  except Exception as error:
    if cli.starting_backend(error):
      raise UserError(cli.no_backend(error)) from error
    raise
  parts = [
    f'{devices["device_count"]} {devices["backend"]} device(s), '
    f'{devices["device_kind"]}; {devices["process_count"]} process(es)'
  ]
  for device in jax.local_devices():
    if memory := device.memory_stats():
      used, limit = memory.get('bytes_in_use', 0), memory.get('bytes_limit', 0)
      parts.append(
        f'device {device.id}: {used / _MIB:,.0f} of {limit / _MIB:,.0f} MiB'
      )
  return '; '.join(parts)


def checks() -> dict[str, Callable[[], str]]:
  """Returns checks by name; each returns a figure, or raises `UserError`."""
  tokenizer = vocabulary.character_tokenizer('0123456789')
  model = ModelConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    tied=True,
    max_length=64,
  )
  trainer = training.online(
    model,
    tokenizer,
    _ESTIMATOR,
    optax.sgd(1e-2),
    [share_even],
    rollouts.Generation(8, max_tokens=16, eos_ids=(1,), pad_id=0),
    micro_prompts=2,
  )
  rows = [{'prompt': '0123456789'[:n]} for n in (5, 6, 7, 8)]
  encoded = prompts.encode_prompts(rows, tokenizer, max_tokens=8)
  batch = prompts.gather(encoded, range(len(rows)))
  params = functools.cache(lambda: transformer.init(model, jax.random.key(0)))
  return {
    'devices': _devices,
    'compiler': compiler,
    'sampler = scorer': lambda: _same(trainer, params(), batch),
    'update': lambda: _update(trainer, params(), batch),
    'checkpoint': lambda: _round_trip(params()),
  }


def share_even(completions: list[str]) -> list[float]:
  """Rewards even digits, which stands for any reward."""
  return [
    sum(digit in '02468' for digit in text) / max(len(text), 1)
    for text in completions
  ]


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


def _same(trainer: training.Trainer, params, batch) -> str:
  """Checks that sampling and training agree on log-probabilities."""
  highest = training.log_prob_difference(
    trainer.setting, params, batch, jax.random.key(1)
  )
  if not highest <= _TOLERANCE:
    raise UserError(
      f'log-probabilities differ by {highest:.2g} nats, more than {_TOLERANCE}'
    )
  return f'log-probabilities differ by at most {highest:.1g} nats'


def _update(trainer: training.Trainer, params, batch) -> str:
  """Checks that a small step makes better responses likelier."""
  state, key = trainer.init(params), jax.random.key(1)
  collected = trainer.collect(state, batch, key)
  prepared = _ESTIMATOR.prepare(collected.rollouts)

  def surrogate(params) -> float:
    log_probs = rollouts.score_tokens(
      trainer.setting.model,
      params,
      collected.responses.prompts,
      prepared.tokens,
      trainer.setting.generation.decoding,
      len(batch.rows),
    ).log_probs
    gain = jnp.where(prepared.mask, prepared.advantages * log_probs, 0.0)
    return float(gain.sum())

  # The key samples the same responses again.
  state, metrics, _ = trainer.step(state, batch, key)
  gain = surrogate(state.trainable['policy']) - surrogate(params)
  norm = f'gradient norm {metrics["grad_norm"]:.3g}'
  if metrics['skipped'] or not gain > 0:
    raise UserError(
      f'{norm}, {metrics["skipped"]:g} skipped; the surrogate changed by '
      f'{gain:.3g}'
    )
  return f'{norm}; the surrogate rose by {gain:.2g}'


def _round_trip(params) -> str:
  """Checks that a checkpoint is read back bit for bit."""
  with (
    tempfile.TemporaryDirectory() as folder,
    Checkpoints(folder, keep_latest=1, keep_best=0) as checkpoints,
  ):
    checkpoints.save(1, {'params': params}, {})
    checkpoints.wait()
    _, tree, _ = checkpoints.restore({'params': params})
  bits = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
  if bits(params) != bits(tree['params']):
    raise UserError('what was read is not what was written')
  return 'written, verified and read back'


def report(workdir=None) -> int:
  """Prints all of it.

  Args:
    workdir: of a run to report on; None for none.

  Returns:
    The exit status: 0 if every check passed, else 1.

  Raises:
    UserError: the folder holds no run.
  """
  health = [] if workdir is None else of_run(workdir)
  for line in system():
    print(line)
  failed = 0
  with jax.default_matmul_precision('float32'):
    for name, attempt in checks().items():
      start = time.perf_counter()
      try:
        figure, word = attempt(), 'ok'
      except Exception as error:  # Every error belongs in the report.
        lines = f'{type(error).__name__}: {error}'.splitlines()
        figure = '; '.join(' '.join(line.split()) for line in lines)
        word, failed = 'FAILED', failed + 1
      seconds = time.perf_counter() - start
      print(f'{word}: {name}: {figure} ({seconds:.1f} s)', flush=True)
      if failed and name == 'devices':
        break  # All other checks need them.
  for line in health:
    print(line)
  return 1 if failed else 0


def of_run(workdir) -> list[str]:
  """Returns a run's health at its last step, and what to do about it.

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
  # Only main phases have a loss or a reward without a prefix.
  records = [each for each in records if 'loss' in each or 'reward' in each]
  if not records:
    return [f'{workdir}: no step of the main phase yet']
  health = runs.assess(records[: runs.WINDOW], records[-runs.WINDOW :])
  return [f'{workdir}: step {health.line}', *health.warnings.values()]


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run.')
  cli.run(lambda: report(flags.FLAGS.workdir))
