"""Training steps as values: online, on stored responses, and their update."""

from jaxrl_llm.training.update import (
  DelayedState,
  Forward,
  TrainState,
  Update,
  actor_critic_forward,
  adamw,
  by_part,
  delayed,
  init_state,
  make_update,
  policy_forward,
  schedule,
)

__all__ = [
  'DelayedState',
  'Forward',
  'TrainState',
  'Update',
  'actor_critic_forward',
  'adamw',
  'by_part',
  'delayed',
  'init_state',
  'make_update',
  'policy_forward',
  'schedule',
]
