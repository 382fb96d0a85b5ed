"""GRPO on the sentiment of stories: a small model writes happier stories.

    python -m experiments.train \\
      --config=experiments/configs/stories_sentiment.py \\
      --config.model.path=PATH/TO/stories260k \\
      --config.task.path=PATH/TO/tinystories_1000.json

Requires `pip install -e '.[sentiment]'`.  The model is stories260K of
karpathy/tinyllamas as a Hugging Face folder; the prompts are the first 16
tokens of stories in roneneldan/TinyStories.  The reward is VADER's compound
score, in [−1, 1], of the next 64 tokens.  The KL to the original model is k3 in
the loss: its gradient is that of KL(π_ref‖π), which penalises stories that the
policy no longer writes, and so preserves variety.

On 2 CPU cores, 120 steps take 3:36 minutes.  Results on 128 held-out prompts,
with 8 samples each at temperature 1:

  mean reward              0.454 → 0.867
  KL, nats per token           0 → 0.050
  distinct bigrams         0.0952 → 0.0907 (95.3 %)

A prompt with a response before and after training, prompt | response, and the
reward:

  before (0.40): Once upon a time, there was a little car named Bee | p who
    lived in a room. One sunny day, Bee decided to jog at the end of the well
    alone. The sun was distant that he didn't want to
  after (0.90): Once upon a time, there was a little car named Bee | p who
    lived in a room. Betsy loved to eat yummy things, but he needed to play
    with his friends. One day, Bella and his friends were sad. They dec
"""

from experiments.configs import base


def get_config():
  config = base.get_config()
  config.model.path = 'PATH/TO/stories260k'
  config.task = dict(
    name='text',
    path='PATH/TO/tinystories_1000.json',
    prompt_tokens=16,
    held_out=128,
  )
  config.prompts.max_tokens = 16
  config.rewards = dict(sentiment=dict(name='sentiment'))
  config.algorithm = dict(name='grpo', kl=0.33)
  config.rollout.update(prompts=32, samples=8, max_tokens=64)
  config.steps = 120
  config.optimizer = base.optimizer(5e-4, warmup_updates=5, decay='linear')
  config.evaluation.update(
    every=40, prompts=128, batch=128, samples=8, temperature=1.0
  )
  config.checkpoints.every = 100
  return config
