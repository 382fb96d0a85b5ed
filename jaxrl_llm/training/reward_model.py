"""Reward models: a number for a whole response, learned from preferences.

A reward model is a critic with its own trunk (`critic.separate`), read at one
position: the score of a response is the value of the state after its last
token.  *ForSequenceClassification of `transformers` reads the same position.
Its parameters are {'trunk': …, 'value': …} of the critic.

In `Outputs.values` of a critic, index t is the value of the state before token
t.  Here values are shifted by one: index t is the score of the response up to
and including token t.  This covers the state after the last of T tokens
without another column in the batch.
"""

import jax

from jaxrl_llm.estimators import Batch, Outputs
from jaxrl_llm.models import value_head
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.prompts import Prompts
from jaxrl_llm.training.update import Forward


def forward(config: ModelConfig) -> Forward:
  """Builds the forward pass for `estimators.reward_model`.

  `trainable['critic']` holds the parameters, as {'trunk': …, 'value': …}.  The
  head's bias gets no gradient: a constant cancels in every pair, and Adam would
  amplify the remaining rounding errors to steps of full size.

  A reward model has no token probabilities: those of the batch are returned.

  Args:
    config: configuration of the trunk.
  """

  def apply(trainable, frozen, prompts: Prompts, batch: Batch):
    del frozen
    params = trainable['critic']
    head = params['value']
    head = {**head, 'bias': jax.lax.stop_gradient(head['bias'])}
    params = {**params, 'value': head}
    values = value_head.values(config, params, prompts, batch.tokens)
    return Outputs(log_probs=batch.log_probs, values=values[:, :, 1:])

  return apply
