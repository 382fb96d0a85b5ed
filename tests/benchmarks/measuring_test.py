"""Times, counts and limits of benchmarks, on known inputs."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import measuring, reward


@pytest.fixture
def compilations():
  enabled = jax.config.jax_enable_compilation_cache
  yield measuring.Compilations()
  jax.config.update('jax_enable_compilation_cache', enabled)


def test_the_roofline_adds_phases_and_overlaps_within_them():
  roofline = measuring.Roofline(flops=100.0, bandwidth=10.0)
  assert roofline.seconds((200.0, 10.0), (100.0, 30.0)) == 2.0 + 3.0
  assert measuring.beside(2.0, 8.0) == {'seconds': 2.0, 'fraction': 0.25}


def test_the_first_round_does_not_count():
  seen = []
  rounds = measuring.repeat(seen.append, 3)
  assert seen == [0, 1, 2, 3]
  assert len(rounds.seconds) == 3
  assert sum(rounds.seconds) <= rounds.end - rounds.start


def test_a_compilation_is_counted_once(compilations):
  double = jax.jit(lambda x: 2.0 * x + 1.0)
  rounds = measuring.repeat(lambda _: double(jnp.ones(3)), 2)
  found = compilations.found()
  assert found['compiled'] >= 1 and found['compile_seconds'] > 0
  assert compilations.between(rounds.start, rounds.end) == 0
  # Another shape is another program, in the round that it comes up in.
  rounds = measuring.repeat(lambda i: double(np.ones(4 + i, np.float32)), 2)
  assert compilations.between(rounds.start, rounds.end) == 2


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_peak_of_memory_is_the_kernels():
  size, of = measuring.peak_bytes()
  if of == 'device':
    pytest.skip('the accelerator counts its own memory')
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  (highest,) = [line for line in lines if line.startswith('VmHWM')]
  # Kilobytes; the kernel sums it up now and then.
  assert size == pytest.approx(int(highest.split()[1]) * 1024, rel=0.05)


def test_a_report_is_a_line_of_json(monkeypatch, capsys):
  roofline = measuring.Roofline(2e9, 3e9)
  monkeypatch.setattr(measuring, 'measure_roofline', lambda dtype: roofline)
  found, measured = measuring.report(
    'some', [1.0, 2.0], {'compile_seconds': 3.0}, peak=(7, 'process'), rows=4
  )
  assert measured == roofline
  measuring.show(found)
  (line,) = capsys.readouterr().out.splitlines()
  read = json.loads(line)
  assert read['benchmark'] == 'some' and read['rows'] == 4
  assert read['seconds']['median'] == 1.5
  assert read['compile_seconds'] == 3.0
  assert (read['peak_bytes'], read['peak_of']) == (7, 'process')
  assert read['machine']['measured']['bytes_per_second'] == 3e9
  assert {'jax', 'python'} <= set(read['versions'])


def test_intervals_between_calls_of_the_reward(monkeypatch):
  monkeypatch.setattr(reward, 'calls', [])
  assert reward.vowels(['aab', '', 'xyz'], prompts=[]) == [2 / 3, 0.0, 0.0]
  assert len(reward.calls) == 1
  monkeypatch.setattr(reward, 'calls', [1.0, 3.0, 6.0])
  assert reward.intervals() == [2.0, 3.0]
