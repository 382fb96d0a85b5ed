"""Tries meshes and micro-batches for `experiments.planning.plan`."""

from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from experiments.planning.hardware import GIB
from experiments.planning.memory_analysis import TooLarge
from experiments.planning.programs import Plan
from jaxrl_llm.errors import UserError

# More parts of a layer than this leave a chip's matrices too narrow.
_MOST_PARTS = 16


def search(
  config: ConfigDict,
  chips: int,
  make: Callable[[ConfigDict], Plan],
  say: Callable[[str], None],
) -> Plan:
  """The plan whose iteration is shortest, among those that fit.

  For every number of parts that a layer can be cut into (`tensor`, a power of
  two) the largest micro-batch that fits is taken, for the more a chip computes
  at one time, the less often it gathers parameters.

  Args:
    config: the whole configuration; its mesh and micro-batches are replaced.
    chips: in the topology.
    make: a plan with nothing compiled yet of a configuration.
    say: told of each candidate.

  Raises:
    UserError: none fits.
  """
  found, refused = [], []
  for tensor in _powers(min(chips, _MOST_PARTS)):
    for micro in _micro_prompts(config):
      changed = config.copy_and_resolve_references()
      changed.mesh.update(data=1, fsdp=-1, tensor=tensor)
      changed.training.micro_prompts = micro
      name = f'tensor={tensor}, micro_prompts={micro}'
      try:
        plan = make(changed)
        plan.check_state()
        plan.update()
        plan.compile()
      except TooLarge as error:
        lacks = f'{error.program} lacks {error.missing / GIB:.1f} GiB'
        say(f'{name}: {lacks}')
        refused.append((error.missing, f'{name}: {lacks}'))
        if error.program != 'update':
          break  # no micro-batch changes that
        continue
      except UserError as error:
        say(f'{name}: {str(error).splitlines()[0]}')
        continue
      say(f'{name}: {plan.seconds:.1f} s')
      found.append(plan)
      break
  if found:
    return min(found, key=lambda plan: plan.seconds)
  nearest = min(refused)[1] if refused else 'no mesh divides the batch'
  raise UserError(
    f'nothing that was tried fits; nearest is {nearest}\n'
    'take more chips, or fewer prompts, samples or tokens'
  )


def _powers(most: int) -> Iterator[int]:
  power = 1
  while power <= most:
    yield power
    power *= 2


def _micro_prompts(config: ConfigDict) -> list[int]:
  """Divisors of a minibatch by powers of two, the largest first."""
  count = config.rollout.prompts // config.training.minibatches
  found = [count]
  while found[-1] % 2 == 0:
    found.append(found[-1] // 2)
  return found
