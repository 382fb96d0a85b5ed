"""A story model learns to write happy stories.

    python -m experiments.train \\
      --config=experiments/configs/stories_sentiment.py \\
      --config.model.path=PATH/TO/stories260k \\
      --config.task.path=PATH/TO/tinystories_1000.json

Needs `pip install -e '.[sentiment]'`.  The model is karpathy/tinyllamas'
stories260K as a Hugging Face folder, the prompts are the first 16 tokens of
stories of roneneldan/TinyStories.  Reward: VADER's compound score, in [−1, 1],
of the 64 tokens that follow.  The KL to the original model is k3 in the loss:
its gradient is that of KL(π_ref‖π), which punishes what the policy forgets, and
so keeps the stories varied.
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
  config.algorithm = dict(name='grpo', kl=0.34)
  config.rollout.update(
    prompts=16, samples=8, max_tokens=64, log_prob_tolerance=1e-4
  )
  config.steps = 120
  config.optimizer = base.optimizer(5e-4, warmup_updates=5, decay='linear')
  config.evaluation.update(
    every=25, prompts=128, batch=128, samples=2, temperature=1.0
  )
  config.checkpoints.every = 100
  return config
