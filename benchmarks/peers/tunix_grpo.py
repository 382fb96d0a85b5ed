"""GRPO steps of Tunix's own learner, with a reward on texts and its records."""

import tempfile

import numpy as np
import optax
from transformers import AutoTokenizer
from tunix.rl import rl_cluster as cluster_lib
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import metrics_logger

from benchmarks import reward
from benchmarks.peers import tunix_model
from benchmarks.peers import work as work_lib


def main() -> None:
  """Does the work."""
  work = work_lib.read()
  _, model = tunix_model.load(work.folder)
  tokenizer = AutoTokenizer.from_pretrained(work.folder)
  steps = work.warmup + work.rounds
  batches = [
    {'prompts': np.array(work.texts[i * work.prompts : (i + 1) * work.prompts])}
    for i in range(steps)
  ]
  with tempfile.TemporaryDirectory() as folder:
    mesh = tunix_model.mesh()
    cluster = cluster_lib.RLCluster(
      actor=model,
      tokenizer=work_lib.with_end(tokenizer, work),
      cluster_config=cluster_lib.ClusterConfig(
        role_to_mesh={
          cluster_lib.Role.ACTOR: mesh,
          cluster_lib.Role.REFERENCE: mesh,
          cluster_lib.Role.ROLLOUT: mesh,
        },
        training_config=_training(work, folder),
        rollout_config=_rollout(work),
      ),
    )
    learner = grpo_learner.GRPOLearner(
      rl_cluster=cluster,
      algo_config=grpo_learner.GRPOConfig(
        num_generations=work.samples, beta=0.0
      ),
      reward_fns=_reward,
    )
    with mesh:
      learner.train(batches)
  seconds = reward.intervals()[-work.rounds :]
  work_lib.show(seconds, 'google-tunix', 'jax', 'flax', 'optax')


def _reward(prompts, completions, **columns) -> list[float]:
  del prompts
  return reward.vowels(completions, **columns)


def _training(work: work_lib.Work, folder: str):
  """Returns settings for training on the whole batch at once."""
  return cluster_lib.RLTrainingConfig(
    actor_optimizer=optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(work.learning_rate, weight_decay=0.0),
    ),
    max_steps=work.warmup + work.rounds,
    eval_every_n_steps=10**6,
    mini_batch_size=work.prompts,
    train_micro_batch_size=work.prompts,
    metrics_logging_options=metrics_logger.MetricsLoggerOptions(
      log_dir=folder, backend_kwargs={'wandb': {'mode': 'disabled'}}
    ),
  )


def _rollout(work: work_lib.Work):
  """Returns settings with the least cache for prompt and response."""
  return base_rollout.RolloutConfig(
    max_tokens_to_generate=work.new_tokens,
    max_prompt_length=work.prompt_tokens,
    kv_cache_size=work.prompt_tokens + work.new_tokens,
    temperature=1.0,
    top_p=1.0,
  )


if __name__ == '__main__':
  main()
