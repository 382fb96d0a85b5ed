"""Stores the initial policy of the main phase, if an estimator needs it.

It is saved in `reference/`, in a form that `jaxrl_llm.runs.checkpoints`
verifies.
"""

import pathlib
from typing import Any

import jax

from jaxrl_llm.errors import UserError
from jaxrl_llm.runs.checkpoints import Checkpoints


class Reference:
  """The reference policy of a run, in its own folder.

  Use it as a context manager.

  Args:
    run: the run's folder.
  """

  def __init__(self, run: pathlib.Path):
    self._kept = Checkpoints(run / 'reference', keep_latest=1, keep_best=0)
    self._unsaved = None  # (step, parameters) that replace damaged ones

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self._kept.close()

  def save(self, step: int, params: Any) -> None:
    """Saves the policy after `step` steps of the run.

    Raises:
      UserError: it could not be written.
    """
    self._kept.save(step, params, {})
    self._kept.wait()

  def restore(self, template: Any, initial: Any | None) -> Any:
    """Returns the saved policy.

    Args:
      template: parameters of the same shapes, in the desired layout.
      initial: parameters of the initial model if a run without a warm start
        saved those: they replace damaged ones with the same digests.

    Raises:
      UserError: the policy is missing or damaged.
    """
    try:
      restored = self._kept.restore(template)
    except UserError:
      if initial is None or not self._kept.is_of(0, initial):
        raise
      params = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), initial, template
      )
      self._unsaved = 0, params
      return params
    if restored is None:
      raise UserError(
        f'{self._kept.folder} has no reference policy\n'
        'restore the folder from a copy, or start in another --workdir'
      )
    return restored[1]

  def repair(self) -> list[str]:
    """Saves a damaged policy again; returns a line about it, if any.

    Raises:
      UserError: it could not be written.
    """
    if self._unsaved is None:
      return []
    self.save(*self._unsaved)
    self._unsaved = None
    return [
      f'{self._kept.folder} was damaged: the initial model has the same '
      'digests and was saved there again'
    ]
