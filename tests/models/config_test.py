"""ModelConfig: defaults, hashing and refusals."""

import mistakes
import pytest

from jaxrl_llm.models.config import ModelConfig, Rope, check_length

BASE = dict(
  vocab_size=32, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4
)


REFUSED = """
vocab_size=0 | vocab_size
num_layers=True | num_layers
unroll=0 | unroll
num_heads=3 | num_heads 3
num_heads=0 | num_heads
head_dim=0 | head_dim
head_dim=-2 | head_dim
hidden_size='a' | hidden_size
hidden_size=10**30 | hidden_size
num_kv_heads=3 | num_kv_heads 3
dtype='float16' | float16
norm='batch' | batch
family='bert' | bert
activation='relu' | relu
window=4, sliding=(True,) | sliding names 1
window=0 | window
window=-1 | window
window=2.5 | window
window='x' | window
rope='x' | rope must
rope={'theta': 1.0} | rope must
rope=5 | rope must
norm_epsilon='small' | norm_epsilon
norm_epsilon=float('nan') | norm_epsilon
logit_softcap='x' | logit_softcap
sliding=(True, False) | window
rope=Rope(kind='su') | 'su'
head_dim=5 | even head_dim
rope=Rope(theta=0.0) | positive theta
rope=Rope(kind='linear', factor=float('nan')) | positive factor
rope=Rope(kind='llama3', factor=8.0) | original_length
rope=Rope(kind='longrope', factor=2.0, original_length=64) | max_length=64
max_length=8, rope=Rope(kind='longrope', original_length=8) | 8 short factors
"""


@pytest.mark.parametrize('change, texts', mistakes.table(REFUSED))
def test_contradictions_are_refused(change, texts):
  with mistakes.refused(*texts):
    ModelConfig(**BASE | eval(f'dict({change})', {'Rope': Rope}))


def test_check_length():
  config = ModelConfig(**BASE, max_length=10)
  check_length(config, 10)
  with mistakes.refused('11 tokens exceed the 10'):
    check_length(config, 11)
