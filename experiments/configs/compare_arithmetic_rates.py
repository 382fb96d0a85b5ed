r"""Learning rates for `compare_arithmetic.py`, with a separate seed.

    python -m experiments.studies.compare --jobs=2 \
      --config=experiments/configs/compare_arithmetic_rates.py

Runs every method with half, once and twice the learning rate of the comparison,
for 200,000 tokens each.  The results, computed in 29 minutes on 2 cores, are in
`docs/comparison.md`.
"""

from ml_collections import ConfigDict

from experiments.configs import compare_arithmetic

RATES = (1e-4, 2e-4, 4e-4)


def get_config() -> ConfigDict:
  config = compare_arithmetic.get_config()
  config.seeds = (100,)
  config.tokens = 200_000
  config.evaluations = 8
  config.methods = tuple(
    {
      **method,
      'label': f'{method["label"]}_{i}',
      'title': f'{method["title"]}, {rate:.0e}',
      'optimizer': dict(learning_rate=rate),
    }
    for method in config.methods
    for i, rate in enumerate(RATES)
  )
  return config
