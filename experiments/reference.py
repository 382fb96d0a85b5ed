"""The policy that the main phase begins with, kept where an estimator needs it.

It lies in `reference/`, of a form that `jaxrl_llm.runs.checkpoints` verifies.
"""

import pathlib
from typing import Any

import jax

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.checkpoints import Checkpoints


class Reference:
  """The reference policy of a run, in a folder of its own.

  Use it as a context manager.

  Args:
    run: the run's folder.
  """

  def __init__(self, run: pathlib.Path):
    self._kept = Checkpoints(run / 'reference', keep_latest=1, keep_best=0)
    self._unsaved = None  # (step, parameters) that took the place of damage

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self._kept.close()

  def save(self, step: int, params: Any) -> None:
    """Keeps the policy after `step` steps of the run.

    Raises:
      UserError: it could not be written.
    """
    self._kept.save(step, params, {})
    self._kept.wait()

  def restore(self, template: Any, initial: Any | None) -> Any:
    """The policy that was kept.

    Args:
      template: parameters of the same shapes, in the layout to be had.
      initial: the initial model's, where a run without a warm start has kept
        those: they take the place of damaged ones, of which the digests are
        left.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
      found = self._kept.restore(template)
    except UserError:
      if initial is None or not self._kept.is_of(0, initial):
        raise
      params = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), initial, template
      )
      self._unsaved = 0, params
      return params
    if found is None:
      raise UserError(
        f'{self._kept.folder} has no reference policy\n'
        'restore the folder from a copy, or start in another --workdir'
      )
    return found[1]

  def mend(self) -> list[str]:
    """Saves anew what was damaged; says so in a line, if it was.

    Raises:
      UserError: it could not be written.
    """
    if self._unsaved is None:
      return []
    self.save(*self._unsaved)
    self._unsaved = None
    return [
      f'{self._kept.folder} was damaged: the initial model has the same '
      'digests and is saved there anew'
    ]
