"""Chips, and topologies of chips that JAX compiles for without having them.

libtpu compiles for TPUs and the CUDA plug-in for GPUs; neither needs a device.
Both belong to the extra `plan`.

Peaks and bandwidths of TPUs: Austin et al., `How to Scale Your Model
<https://jax-ml.github.io/scaling-book/tpus>`_, 2025, chapter 2.  GPUs: the data
sheets of `H100 <https://www.nvidia.com/en-us/data-center/h100/>`_ and `H200
<https://www.nvidia.com/en-us/data-center/h200/>`_ (SXM), and 400 Gbit/s of
network per GPU, as in `DGX H100
<https://docs.nvidia.com/dgx/dgxh100-user-guide/>`_.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from jaxrl_llm.errors import UserError

GIB = 2**30
# NVLink joins the GPUs of a machine.
_MACHINE = 8


class Chip(NamedTuple):
  """An accelerator.

  Attributes:
    name: as in `--topology`.
    memory: bytes that a TPU program may use; bytes of a whole GPU.
    flops: peak FLOP/s of bfloat16 matrix products.
    bandwidth: bytes/s of the memory.
    link: bytes/s, one way, of one link: each of the two per axis of a TPU's
      torus, or all of a GPU's NVLink.
    network: bytes/s, one way, per GPU between machines; None for a TPU.
    wraps: a TPU's axis whose size is a multiple of this is a ring.
  """

  name: str
  memory: int
  flops: float
  bandwidth: float
  link: float
  network: float | None = None
  wraps: int | None = None

  @property
  def limit(self) -> int:
    """Bytes that JAX may allocate: on a GPU, a fraction of the memory."""
    if self.network is None:
      return self.memory
    fraction = os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.75')
    return int(self.memory * float(fraction))


# Memory of TPUs: the limits that libtpu 0.0.52 reports when it refuses.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', int(30.75 * GIB), 275e12, 1.2e12, 45e9, wraps=4),
    Chip('v5e', int(15.75 * GIB), 197e12, 0.82e12, 45e9, wraps=16),
    Chip('v5p', int(95.73 * GIB), 459e12, 2.8e12, 90e9, wraps=4),
    Chip('v6e', int(31.24 * GIB), 918e12, 1.6e12, 90e9, wraps=16),
    Chip('h100', 84_929_347_584, 989e12, 3.35e12, 450e9, network=50e9),
    Chip('h200', 150_110_011_392, 989e12, 4.8e12, 450e9, network=50e9),
  )
}

# The properties of a GPU that XLA's compiler asks for.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }} dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
# libtpu spends minutes asking the cloud about this machine, and locks it,
# unless told otherwise; no chip is opened.
_LIBTPU = dict(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
_LIBTPU |= dict(TPU_ACCELERATOR_TYPE='none', TPU_WORKER_HOSTNAMES='localhost')


class Topology(NamedTuple):
  """Abstract devices to compile for, and the options of their compiler.

  The shape is that of a TPU's torus, in chips, or (machines, GPUs of each).
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  devices: list[Any]
  compiler_options: dict[str, Any]


def make(name: str) -> Topology:
  """Returns the topology of a name, UserError if there is none."""
  chip, shape = parse(name)
  tpu, options = chip.network is None, {}
  if importlib.util.find_spec('libtpu' if tpu else 'jax_cuda13_plugin') is None:
    raise UserError(
      f'--topology={name}: its compiler is not installed\n'
      "pip install 'jaxrl_llm[plan]'"
    )
  if not tpu:
    options['xla_gpu_autotune_level'] = '0'  # it measures on a device
  elif 'jax_exec_time_optimization_effort' in jax.config.values:
    # Takes an eighth of the time for the same collectives, and memory within
    # some per cent.  jax 0.12 has no such option.
    options['exec_time_optimization_effort'] = -1.0
  try:
    described = _describe(name, chip, shape)
  except Exception as error:  # plug-ins raise no narrower class
    line = ' '.join(str(error).split())
    raise UserError(f'--topology={name}: {line}') from error
  return Topology(name, chip, shape, described.devices, options)


def _describe(name: str, chip: Chip, shape: tuple[int, ...]):
  if chip.network is None:
    os.environ.update(_LIBTPU | os.environ)
    # A v4 chip has two cores, which JAX treats as one device.
    options = {'chip_config_name': 'megacore'} if chip.name == 'v4' else {}
    return topologies.get_topology_desc(name, 'tpu', **options)
  properties = _HOPPER.format(
    bandwidth=int(chip.bandwidth),
    memory=chip.memory,
    name=f'NVIDIA {chip.name.upper()}',
  )
  return topologies.get_topology_desc(
    chip.name,
    'cuda',
    target_config=properties,
    topology=f'1x{shape[0]}x{shape[1]}',
  )


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
  """Returns the chip and the shape in a name, UserError if it is wrong."""
  match = re.fullmatch(r'([a-z]\w*):(\d+(?:x\d+)*)', name)
  if not match or match[1] not in CHIPS:
    raise UserError(
      f'--topology={name}: no such topology\nwrite CHIP:SHAPE in chips, such '
      f'as v5e:16x16, v5p:4x4x8 or h100:64; chips are {", ".join(CHIPS)}'
    )
  chip = CHIPS[match[1]]
  shape = tuple(int(size) for size in match[2].split('x'))
  if chip.network is None:
    example = '4x4' if chip.wraps == 16 else '4x4x4'
    if len(shape) != len(example.split('x')):
      raise UserError(
        f'--topology={name}: a {chip.name} slice has another number of axes\n'
        f'write {chip.name}:{example}, for example'
      )
    return chip, shape
  machines, each = math.ceil(shape[0] / _MACHINE), min(shape[0], _MACHINE)
  if len(shape) > 1 or not shape[0] or shape[0] != machines * each:
    raise UserError(
      f'--topology={name}: name a number of GPUs, in whole machines of '
      f'{_MACHINE}\nwrite {chip.name}:64, for example'
    )
  return chip, (machines, each)
