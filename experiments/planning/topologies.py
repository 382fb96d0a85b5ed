"""Devices of a named topology that can be compiled for and not run on.

TPUs come from libtpu, GPUs from the CUDA plug-in; neither needs a device.
Both belong to the extra `plan`.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from experiments.planning.hardware import CHIPS, Chip
from jaxrl_llm.errors import UserError

# What XLA asks a GPU of this kind about itself.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


class Topology(NamedTuple):
  """Chips that are to be compiled for.

  Attributes:
    name: such as 'v5p:4x4x8', in chips, or 'h100:64'.
    chip: what each of them is.
    shape: chips along each axis of a TPU's torus; (machines, GPUs each).
    devices: abstract, in the order of the plug-in.
    compiler_options: of `jax.stages.Lowered.compile`.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  devices: list[Any]
  compiler_options: dict[str, Any]


def make(name: str, effort: float = -1.0) -> Topology:
  """The topology of a name.

  Args:
    name: as in `Topology`.
    effort: of the TPU's compiler, from −1 to 1; a run has 0.  At −1 it takes
      an eighth of the time and finds the same collectives, and memory within
      some per cent.  jax 0.12 no longer takes it.

  Raises:
    UserError: the name is none, or the plug-in is not installed or refuses it.
  """
  chip, shape = parse(name)
  if chip.per_machine is None:
    options = {}
    if 'jax_exec_time_optimization_effort' in jax.config.values:
      options['exec_time_optimization_effort'] = effort
    return Topology(name, chip, shape, _tpus(name, chip), options)
  # Autotuning measures on the device, which is not there.
  options = {'xla_gpu_autotune_level': '0'}
  return Topology(name, chip, shape, _gpus(chip, shape), options)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
  """The chip and the shape of a topology's name.

  Raises:
    UserError: the name is none.
  """
  match = re.fullmatch(r'([a-z]\w*):(\d+(?:x\d+)*)', name)
  if not match or match[1] not in CHIPS:
    raise UserError(
      f'--topology={name}: no such topology\nwrite CHIP:SHAPE in chips, such '
      f'as v5e:16x16, v5p:4x4x8 or h100:64; chips are {", ".join(CHIPS)}'
    )
  chip = CHIPS[match[1]]
  shape = tuple(int(size) for size in match[2].split('x'))
  if chip.per_machine is None:
    wanted = 2 if chip.wraps == 16 else 3
    if len(shape) != wanted:
      raise UserError(
        f'--topology={name}: a {chip.name} slice has {wanted} axes\n'
        f'write {chip.name}:{"x".join(["4"] * wanted)}, for example'
      )
    return chip, shape
  if len(shape) > 1 or (shape[0] > 8 and shape[0] % 8) or shape[0] < 1:
    raise UserError(
      f'--topology={name}: name a number of GPUs, in whole machines of '
      f'{chip.per_machine}\nwrite {chip.name}:64, for example'
    )
  machines = math.ceil(shape[0] / chip.per_machine)
  return chip, (machines, shape[0] // machines)


def _tpus(name: str, chip: Chip) -> list[Any]:
  if importlib.util.find_spec('libtpu') is None:
    raise _missing(name, 'libtpu')
  # Otherwise libtpu asks the cloud, for minutes, which machine this is.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # No chip is opened: several may compile at one time.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'none')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # A v4 chip is two cores that JAX sees as one device.
  options = {'chip_config_name': 'megacore'} if chip.name == 'v4' else {}
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=name, **options
    )
  except Exception as error:  # of the plug-in, in no narrower class
    raise UserError(f'--topology={name}: {_line(error)}') from error
  return found.devices


def _gpus(chip: Chip, shape: tuple[int, int]) -> list[Any]:
  if importlib.util.find_spec('jax_cuda13_plugin') is None:
    raise _missing(f'{chip.name}:{math.prod(shape)}', 'the CUDA plug-in')
  described = _HOPPER.format(
    bandwidth=int(chip.bandwidth),
    memory=chip.memory,
    name=f'NVIDIA {chip.name.upper()}',
  )
  machines, each = shape
  try:
    found = topologies.get_topology_desc(
      platform='cuda',
      topology_name=chip.name,
      target_config=described,
      topology=f'1x{machines}x{each}',
    )
  except Exception as error:  # of the plug-in, in no narrower class
    raise UserError(f'--topology={chip.name}: {_line(error)}') from error
  return found.devices


def _missing(name: str, what: str) -> UserError:
  return UserError(
    f'--topology={name}: {what} is not installed\n'
    "it compiles for chips that are not there: pip install 'jaxrl_llm[plan]'"
  )


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())


def coordinates(topology: Topology, numbers) -> np.ndarray:
  """[n, axes] int, where devices stand on the torus, or (machine, GPU).

  Args:
    numbers: n ids of devices.
  """
  by_id = {device.id: device for device in topology.devices}
  if topology.chip.per_machine is None:
    rows = [by_id[i].coords[: len(topology.shape)] for i in numbers]
  else:
    rows = [divmod(i, topology.shape[1]) for i in numbers]
  return np.array(rows)
