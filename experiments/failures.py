"""What a run says of rewards that failed in their worker processes."""

from collections.abc import Mapping

from jaxrl_llm.rewards.failures import Failures
from jaxrl_llm.rollouts import Responses


def of_step(
  responses: Responses,
  greedy: Responses | None = None,
  branches: Responses | None = None,
) -> dict[str, Failures]:
  """Failures of all that a step has scored, by their names in the record.

  Args:
    responses: the step's.
    greedy: the greedy ones, where there are any.
    branches: whole branches, where there are any.

  Returns:
    Of every reward in workers: 'rewards/NAME' of the responses, and
    'greedy/rewards/NAME', 'branches/rewards/NAME' of the others.
  """
  scored = {'': responses, 'greedy/': greedy, 'branches/': branches}
  return {
    f'{prefix}rewards/{name}': found
    for prefix, given in scored.items()
    if given is not None
    for name, found in given.scores.failures.items()
  }


def failure_counts(failures: Mapping[str, Failures]) -> dict[str, int]:
  """Numbers for the record: NAME/failed, of all kinds."""
  return {f'{name}/failed': found.total for name, found in failures.items()}


def failure_messages(
  failures: Mapping[str, Failures], where: str, told: set[tuple[str, str]]
) -> list[str]:
  """A line for each kind of failure that was not told before.

  Args:
    failures: by name in the record.
    where: such as 'at step 7'.
    told: (name, kind) of what was told; what is now is added.
  """
  lines = []
  for name, found in failures.items():
    for kind, message in found.messages.items():
      if (name, kind) not in told:
        told.add((name, kind))
        lines.append(
          f'{name}: {found.counts[kind]} {where} without a score by {kind}: '
          f'{message}'
        )
  return lines
