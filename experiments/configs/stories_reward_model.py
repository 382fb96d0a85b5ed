"""A reward model of stories, of pairs that a lexicon's sentiment judged.

    for split in train held_out; do
      python -m experiments.make_pairs --split=$split --samples=8 \\
        --per_prompt=4 --output=runs/stories_pairs/$split.jsonl \\
        --config=experiments/configs/stories_sentiment.py \\
        --model=PATH/TO/stories260k \\
        --config.task.path=PATH/TO/tinystories_1000.json
    done
    python -m experiments.reward_model \\
      --config=experiments/configs/stories_reward_model.py \\
      --config.model.path=PATH/TO/stories260k
"""

from experiments.configs import base


def get_config():
  config = base.get_config()
  config.model.path = 'PATH/TO/stories260k'
  config.task = dict(
    name='jsonl',
    train='runs/stories_pairs/train.jsonl',
    held_out='runs/stories_pairs/held_out.jsonl',
  )
  config.algorithm = dict(name='reward_model')
  config.prompts.max_tokens = 16
  # Text is tokenised anew, prompt and response together: not as it was sampled.
  config.rollout.max_tokens = 80
  config.rounds.batch = 32
  config.steps = 80
  config.optimizer = base.optimizer(1e-3, warmup_updates=10, decay='linear')
  config.evaluation.update(every=40, prompts=0)
  config.checkpoints.every = 100
  return config
