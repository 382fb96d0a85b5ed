"""Scores and gradients against torch over more than 32,768 rows.

jax 0.10.2 computed wrong numbers on CPU beyond that many rows of a jitted
`vmap`, silently; the doctor checks that case itself.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from experiments import doctor
from jaxrl_llm.errors import UserError
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.sampling import policy

pytestmark = pytest.mark.usefixtures('optimized')

PROMPTS, SAMPLES, TOKENS, PROMPT_TOKENS = 24, 24, 58, 5  # 33,408 scored


def as_parameters(model, folder):
  """Gradients of a torch model in the layout of our parameters."""
  gradient = copy.deepcopy(model)
  for copied, own in zip(
    gradient.parameters(), model.parameters(), strict=True
  ):
    copied.data = own.grad
  gradient.save_pretrained(folder)
  return folders.load(folder)[1]


@pytest.mark.parametrize(
  'chunk', [pytest.param(256, marks=pytest.mark.slow), 40_000]
)
def test_scores_and_gradient(chunk, tmp_path):
  torch = pytest.importorskip('torch')
  random = np.random.default_rng(0)
  draw = lambda *shape: random.integers(0, tiny_models.VOCABULARY, shape)
  prompts = draw(PROMPTS, PROMPT_TOKENS).astype(np.int32)
  responses = draw(PROMPTS, SAMPLES, TOKENS).astype(np.int32)
  weights = random.normal(size=responses.shape).astype(np.float32)

  model = tiny_models.build('llama_linear', tmp_path / 'model')
  texts = np.concatenate(
    [np.repeat(prompts[:, None], SAMPLES, 1), responses], 2
  )
  texts = torch.tensor(texts.reshape(-1, PROMPT_TOKENS + TOKENS)).long()
  logits = model(texts).logits[:, PROMPT_TOKENS - 1 : -1]
  expected = torch.log_softmax(logits, -1)
  chosen = texts[:, PROMPT_TOKENS:, None]
  expected = expected.gather(-1, chosen)[..., 0].reshape(responses.shape)
  (expected * torch.tensor(weights)).mean().backward()
  with tiny_models.quiet():
    expected_gradient = as_parameters(model, tmp_path / 'gradient')

  config, params = folders.load(tmp_path / 'model')
  given = policy.Prompts(
    tokens=prompts, lengths=jnp.full(PROMPTS, PROMPT_TOKENS, jnp.int32)
  )

  def loss(params):
    scored = policy.score(config, params, given, responses, chunk=chunk)
    return (weights * scored.log_probs).mean(), scored.log_probs

  gradient, log_probs = jax.jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(log_probs, expected.detach(), atol=1e-4)
  scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
  for ours, theirs in zip(
    jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * scale)


def test_the_doctor_finds_wrong_rows(monkeypatch):
  assert 'right' in doctor.compiler()
  right = jax.vmap
  # Every row behind the 32,768th as jax 0.10.2 computed the last one.
  monkeypatch.setattr(
    jax, 'vmap', lambda f: lambda x: right(f)(x).at[32_768:].mul(0.992)
  )
  with pytest.raises(UserError, match='jax 0.10.2'):
    doctor.compiler()
