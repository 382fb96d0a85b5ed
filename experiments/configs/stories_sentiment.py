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

On 2 CPU cores 120 steps take under 3 minutes.  On 128 held-out prompts, 2
samples each at temperature 1:

  mean reward              0.489 → 0.857
  KL, nats per token           0 → 0.055
  distinct bigrams         0.2233 → 0.2095 (93.8 %; the aim was 95 %)

Three continuations, prompt | response, with their reward:

  before (0.40): Once upon a time, there was a little car named Bee | p who
    lived in a room. One sunny day, Bee decided to jog at the end of the well
    alone. The sun was distant that he didn't want to
  after (0.95): Once upon a time, there was a little car named Bee | p who
    lived in a room. Boo loved to live with his friends. One day, Bella's
    friend Jimmy came to Bear and told Bella. Bella was very happy and played
  before (0.85): Once upon a time, in a big forest, there was | a little boy
    named Tim. Tim loved to play outside. He would see the boss. One day, Tim
    saw a big plate with a tail behind bed. It was a funny ide
  after (0.92): Once upon a time, in a big forest, there was | a happy boy
    named Tim. Tim loved to play with his toys, especially his toy. One day,
    Tim saw a big storm with a telephone. The storm had a fun rope in
  before (0.91): Once upon a time, there was a little white cat | named Tom.
    Tom liked to eat again soon. Every day, Tom told his friends to play in
    the forest. One day, Tom Lily saw a new cat and said, "Wow! Why are
  after (0.94): Once upon a time, there was a little white cat | named Tom.
    Tom loved to play with it, explore. Tom was his friends who liked to play
    with herself. One day, Tom was playing outside in the chimney. He was very
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
