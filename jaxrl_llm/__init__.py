"""Online reinforcement learning of language models in JAX.

A policy-gradient estimator is a value, composed of small pure functions over
token log-probabilities and trajectory rewards (`jaxrl_llm.estimators`).  The
rest of the package supplies the inputs of an estimator.
"""

import logging as _logging

# At its import, before anything is logged: the models here are JAX's.
_logging.getLogger('transformers').addFilter(
  lambda record: not record.getMessage().startswith('PyTorch was not found')
)

__version__ = '0.1.0'
