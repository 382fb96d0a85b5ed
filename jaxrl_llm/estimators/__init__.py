"""Policy-gradient estimators as composable transformations.

from jaxrl_llm import estimators as est
mine = est.estimator(
  est.subtract_leave_one_out_mean(), est.clipped(0.2), est.sequence_sum()
)
"""

from jaxrl_llm.estimators import diagnostics
from jaxrl_llm.estimators.advantages import (
  chain,
  identity,
  ones,
  standardize,
  subtract_group_mean,
  subtract_leave_one_out_mean,
  subtract_response_kl,
)
from jaxrl_llm.estimators.algorithms import (
  dr_grpo,
  grpo,
  reinforce,
  rloo,
  sft,
)
from jaxrl_llm.estimators.compose import Estimator, estimator
from jaxrl_llm.estimators.token_losses import (
  add,
  clipped,
  k1,
  k2,
  k3,
  kl_penalty,
  score_function,
  token_ratio,
)
from jaxrl_llm.estimators.types import (
  AdvantageTransform,
  Batch,
  Needs,
  Outputs,
  Rollouts,
  TokenLoss,
  TokenWeights,
  merge_needs,
  valid_responses,
)
from jaxrl_llm.estimators.weights import (
  constant_length,
  sequence_mean,
  sequence_sum,
  token_mean,
)

__all__ = [
  'AdvantageTransform',
  'Batch',
  'Estimator',
  'Needs',
  'Outputs',
  'Rollouts',
  'TokenLoss',
  'TokenWeights',
  'add',
  'chain',
  'clipped',
  'constant_length',
  'diagnostics',
  'dr_grpo',
  'estimator',
  'grpo',
  'identity',
  'k1',
  'k2',
  'k3',
  'kl_penalty',
  'merge_needs',
  'ones',
  'reinforce',
  'rloo',
  'score_function',
  'sequence_mean',
  'sequence_sum',
  'sft',
  'standardize',
  'subtract_group_mean',
  'subtract_leave_one_out_mean',
  'subtract_response_kl',
  'token_mean',
  'token_ratio',
  'valid_responses',
]
