"""What one chip can do, and how fast chips exchange data.

Peaks and bandwidths of TPUs: Austin et al., `How to Scale Your Model
<https://jax-ml.github.io/scaling-book/tpus>`_, 2025, chapter 2.  Of GPUs: the
data sheets of `H100 SXM <https://www.nvidia.com/en-us/data-center/h100/>`_ and
`H200 SXM <https://www.nvidia.com/en-us/data-center/h200/>`_, and 400 Gbit/s of
network per GPU as in `DGX H100 <https://docs.nvidia.com/dgx/dgxh100-user-guide
/introduction-to-dgxh100.html>`_.
"""

import dataclasses
import os

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator, as a plan sees it.

  Attributes:
    name: as in the topology's name.
    memory: bytes that a program may use.  Of a TPU what the compiler calls
      available; of a GPU the whole device, of which JAX takes a fraction.
    flops: bfloat16 matrix multiplication, peak, FLOP/s.
    bandwidth: of the memory, bytes/s.
    link: bytes/s one way over one link: of a TPU each of the two per axis of
      its torus; of a GPU all of NVLink within a machine.
    network: bytes/s one way per GPU between machines; None for a TPU slice,
      which has links alone.
    wraps: a TPU's axis of so many chips, or of a multiple, is a ring.
    per_machine: GPUs that NVLink joins; None for a TPU.
  """

  name: str
  memory: int
  flops: float
  bandwidth: float
  link: float
  network: float | None = None
  wraps: int | None = None
  per_machine: int | None = None


# The limits of TPUs are those that libtpu 0.0.52 names when it refuses.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', int(30.75 * GIB), 275e12, 1.2e12, 45e9, wraps=4),
    Chip('v5e', int(15.75 * GIB), 197e12, 0.82e12, 45e9, wraps=16),
    Chip('v5p', int(95.73 * GIB), 459e12, 2.8e12, 90e9, wraps=4),
    Chip('v6e', int(31.24 * GIB), 918e12, 1.6e12, 90e9, wraps=16),
    Chip(
      'h100',
      84_929_347_584,
      989e12,
      3.35e12,
      450e9,
      network=50e9,
      per_machine=8,
    ),
    Chip(
      'h200',
      150_110_011_392,
      989e12,
      4.8e12,
      450e9,
      network=50e9,
      per_machine=8,
    ),
  )
}


def limit(chip: Chip) -> int:
  """Bytes of its memory that JAX takes.

  Of a GPU a fraction, which the variable XLA_PYTHON_CLIENT_MEM_FRACTION sets;
  `JAX takes 0.75 <https://docs.jax.dev/en/latest/gpu_memory_allocation.html>`_
  without it.
  """
  if chip.per_machine is None:
    return chip.memory
  fraction = os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.75')
  return int(chip.memory * float(fraction))
