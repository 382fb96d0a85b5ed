"""Reward models: one number for a whole response, learned from preferences.

A reward model is a critic with a trunk of its own (`critic.separate`), read at
one place: the score of a response is the value of the state after its last
token.  That is where *ForSequenceClassification of `transformers` reads it.
Parameters are {'trunk': …, 'value': …} of the critic.

`Outputs.values` of a critic stand before their tokens.  Here they are moved by
one, so that index t is the score of the response up to and with token t; the
state after token T is there too, and no batch needs a column for it.
"""

import jax

from jaxrl_llm.estimators import Batch, Outputs
from jaxrl_llm.models import value_head
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.prompts import Prompts
from jaxrl_llm.training.update import Forward


def forward(config: ModelConfig) -> Forward:
  """The forward pass for `estimators.reward_model`.

  `trainable['critic']` holds the parameters, as {'trunk': …, 'value': …}.  The
  head's bias gets no gradient: a constant cancels in every pair, and what is
  left of it by rounding Adam would blow up to steps of full size.

  A reward model gives no probabilities: those of the batch are handed on.

  Args:
    config: of the trunk.
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
