"""Stories with a poor reward model of sentiment: reward overoptimisation.

    python -m experiments.train --config=experiments/configs/stories_proxy.py \\
      --config.model.path=PATH/TO/stories260k \\
      --config.task.path=PATH/TO/tinystories_1000.json

The reward is the score of a reward model that `stories_reward_model.py` trained
on 124 pairs, with the commands in docs/reward_models.md.  The lexicon's
sentiment, which labelled those pairs, is also logged, with weight 0.  Model,
data and sizes are those of `stories_sentiment.py`, but there is no KL to the
original model.

On 2 busy CPU cores, 100 steps take 14 minutes.  Results on 128 held-out
prompts, with 4 samples each at temperature 1, after 0, 60 and 100 steps:

  proxy               −0.39   1.46   1.51
  gold                 0.50   0.98   0.18
  distinct bigrams    0.149  0.051  0.029
"""

from experiments.configs import base, stories_sentiment


def get_config():
  config = stories_sentiment.get_config()
  config.rewards = dict(
    proxy=dict(
      name='reward_model',
      path='runs/stories_reward_model_few/hf',
      batch_size=128,
    ),
    gold=dict(name='sentiment', weight=0.0),
  )
  config.algorithm = dict(name='grpo', kl=0.0)
  config.optimizer = base.optimizer(2e-4, warmup_updates=5)
  config.steps = 100
  config.evaluation.update(every=10, samples=4)
  return config
