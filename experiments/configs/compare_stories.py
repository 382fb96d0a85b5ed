r"""Estimators compared on stories with sentiment, at equal generated tokens.

    python -m experiments.compare --jobs=2 \
      --config=experiments/configs/compare_stories.py \
      --config.base.model.path=PATH/TO/stories260k \
      --config.base.task.path=PATH/TO/tinystories_1000.json

Model, data and reward are those of `stories_sentiment.py`; the reward is a
number in [−1, 1] of the whole text, so that groups of equal rewards are rare,
unlike those of arithmetic.  Every method pays for its KL to the original model
in the reward, exactly and at the same rate, so that reward, KL and distinct
bigrams together say what a method is worth; for GRPO as published the KL is in
the loss, where its gradient is another.  The rates of KL and learning are not
tuned.  What came out, in 30 minutes on 2 cores, is in `docs/comparison.md`.
"""

from ml_collections import ConfigDict

from experiments.configs import base, compare_arithmetic, stories_sentiment
from experiments.configs.base import method

_KL = 0.02  # units of the reward per nat


def get_config() -> ConfigDict:
  metrics = (
    ('eval/reward', 'reward'),
    ('eval/kl', 'KL, nats per token'),
    ('eval/distinct_bigrams', 'distinct bigrams'),
  )
  return ConfigDict(
    dict(
      base=base_config(),
      init='original model',
      tokens=400_000,
      evaluations=6,
      seeds=(0, 1, 2),
      metrics=tuple(
        dict(name=name, title=title, scale=1, digits=3)
        for name, title in metrics
      ),
      methods=methods(),
    )
  )


def base_config() -> ConfigDict:
  """What all methods share."""
  config = stories_sentiment.get_config()
  config.algorithm = dict(name='rloo', kl=_KL)
  config.rollout.update(prompts=16, samples=8)
  config.steps = 100_000  # the budget of tokens ends a run
  config.optimizer = base.optimizer(3e-4, warmup_updates=5)
  config.evaluation.update(every=100_000, samples=4)
  config.checkpoints.update(every=1000, keep_latest=1, keep_best=0)
  config.log.samples = 1
  return config


def methods() -> tuple[dict, ...]:
  """One line per method, in the order of table and figure."""
  branched = dict(count=2, samples=4, kl=_KL)
  return (
    method('rloo', 'RLOO', dict(name='rloo', kl=_KL)),
    method('grpo', 'GRPO', dict(name='grpo', kl=0.33)),
    method(
      'ppo',
      'PPO',
      dict(name='ppo', kl=_KL),
      critic=dict(optimizer=dict(learning_rate=1e-3), warmup=5),
    ),
    method(
      'trepo_published',
      'TRePO, as published',
      dict(
        name=f'{compare_arithmetic.FILE}:trepo_published',
        count=4,
        samples=4,
        kl=_KL,
      ),
      4,
      4,
    ),
    method('trepo', 'TRePO, hold', dict(name='trepo', **branched), 6, 4),
    method(
      'trepo_tree', 'TRePO, tree', dict(name='trepo_tree', **branched), 6, 4
    ),
  )
