r"""TRePO's three fills with nearly exact values: noise, or tilt?

    python -m experiments.train --workdir=runs/fill \
      --config=experiments/configs/interpolation.py:advantages \
      --config.model.path=runs/compare_trees_arithmetic/init/hf

The argument is hold, values or advantages.  64 branches at four positions of
128 responses, 30 updates: the values' noise is small, so that what is left of a
method's handicap is its bias.  `docs/comparison.md` has the results.
"""

from ml_collections import ConfigDict

from experiments.configs import compare_trees
from jaxrl_llm import estimators as est

_FILE = 'experiments/configs/interpolation.py'
_FILLS = {
  'hold': est.hold,
  'values': est.interpolate_values,
  'advantages': est.interpolate_advantages,
}


def trepo_filled(fill: str, count: int = 4, samples: int = 64):
  """Builds TRePO with a fill by name."""
  return est.trepo(count, samples, fill=_FILLS[fill])


def get_config(fill: str = 'advantages') -> ConfigDict:
  """Configures a run from the model of the comparison on arithmetic."""
  config = compare_trees.base_config()
  config.algorithm = dict(name=f'{_FILE}:trepo_filled', fill=fill)
  config.rollout.update(prompts=32, samples=4)
  config.steps = 30
  config.warm_start.steps = 0
  config.evaluation.every = 10
  return config
