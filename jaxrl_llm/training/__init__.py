"""Training steps, online and on stored responses, and the shared update."""

from jaxrl_llm.training.critic import Critic, separate, shared
from jaxrl_llm.training.offline import OfflineTrainer, offline, score_pool
from jaxrl_llm.training.online import (
  Sampled,
  Trainer,
  as_reward,
  log_prob_difference,
  online,
)
from jaxrl_llm.training.update import (
  Forward,
  TrainState,
  Update,
  actor_critic_forward,
  adamw,
  by_part,
  delayed,
  init_state,
  make_update,
  mean_metrics,
  policy_forward,
  schedule,
)

__all__ = [
  'Critic',
  'Forward',
  'OfflineTrainer',
  'Sampled',
  'TrainState',
  'Trainer',
  'Update',
  'actor_critic_forward',
  'adamw',
  'as_reward',
  'by_part',
  'delayed',
  'init_state',
  'log_prob_difference',
  'make_update',
  'mean_metrics',
  'offline',
  'online',
  'policy_forward',
  'schedule',
  'score_pool',
  'separate',
  'shared',
]
