"""ModelConfig: defaults, hashing and refusals."""

import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.models.config import ModelConfig, Rope, check_length

BASE = dict(
  vocab_size=32,
  hidden_size=64,
  intermediate_size=96,
  num_layers=2,
  num_heads=4,
)


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(vocab_size=0), 'vocab_size'),
    (dict(num_layers=True), 'num_layers'),
    (dict(unroll=0), 'unroll'),
    (dict(num_heads=3), 'num_heads 3'),
    (dict(num_heads=0), 'num_heads'),
    (dict(head_dim=0), 'head_dim'),
    (dict(head_dim=-2), 'head_dim'),
    (dict(hidden_size='a'), 'hidden_size'),
    (dict(hidden_size=10**30), 'hidden_size'),
    (dict(num_kv_heads=3), 'num_kv_heads 3'),
    (dict(dtype='float16'), 'float16'),
    (dict(norm='batch'), 'batch'),
    (dict(family='bert'), 'bert'),
    (dict(activation='relu'), 'relu'),
    (dict(window=4, sliding=(True,)), 'sliding names 1'),
    *((dict(window=window), 'window') for window in (0, -1, 2.5, 'x')),
    *((dict(rope=rope), 'rope must') for rope in ('x', {'theta': 1.0}, 5)),
    (dict(norm_epsilon='small'), 'norm_epsilon'),
    (dict(norm_epsilon=float('nan')), 'norm_epsilon'),
    (dict(logit_softcap='x'), 'logit_softcap'),
    (dict(sliding=(True, False)), 'window'),
    (dict(rope=Rope(kind='su')), "'su'"),
    (dict(head_dim=5), 'even head_dim'),
    (dict(rope=Rope(theta=0.0)), 'positive theta'),
    (dict(rope=Rope(kind='linear', factor=float('nan'))), 'positive factor'),
    (dict(rope=Rope(kind='llama3', factor=8.0)), 'original_length'),
    (
      dict(rope=Rope(kind='longrope', factor=2.0, original_length=64)),
      'max_length=64',
    ),
    (
      dict(max_length=8, rope=Rope(kind='longrope', original_length=8)),
      '8 short factors',
    ),
  ],
)
def test_contradictions_are_refused(change, words):
  with pytest.raises(UserError, match=words) as caught:
    ModelConfig(**{**BASE, **change})
  assert len(str(caught.value).splitlines()) <= 3


def test_check_length():
  config = ModelConfig(**BASE, max_length=10)
  check_length(config, 10)
  with pytest.raises(UserError, match='11 tokens exceed the 10'):
    check_length(config, 11)
