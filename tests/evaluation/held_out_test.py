"""Held-out numbers: the KL is scored in parts, whatever the batch."""

import jax
import numpy as np
import pytest
import toys
from selection import mostly_slow

from experiments import build, schedule
from experiments.configs import base
from jaxrl_llm import estimators, evaluation, rollouts
from jaxrl_llm.rewards import RewardPart, Workers
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks.vocabulary import character_tokenizer

TOKENIZER = character_tokenizer('abcdefghij')
ROWS = [{'prompt': text} for text in ('abc', 'd', 'ef', 'ghij', 'ab')]
DECODING = policy.Decoding(temperature=1.2)


def make(micro_prompts, batch, reference=None):
  config, _ = toys.make_policy('llama')
  ones = RewardPart('length', lambda completions: [1.0] * len(completions))
  setting = rollouts.Setting(
    config,
    TOKENIZER,
    estimators.Needs(),
    [ones],
    rollouts.Generation(2, 6, (1,), 0, DECODING),
    reference,
    micro_prompts=micro_prompts,
    chunk=5,
  )
  encoded = prompts_lib.encode_prompts(ROWS, TOKENIZER, 4)
  return evaluation.HeldOut(setting, encoded, batch, jax.random.key(0))


def expected_kl(batch):
  """Mean log-ratio of the same responses from dense logits, in float64."""
  config, params = toys.make_policy('llama')
  held = make(1, batch)
  total, count = 0.0, 0
  for start in range(0, len(ROWS), batch):
    chosen = range(start, min(start + batch, len(ROWS)))
    prompts, samples = rollouts.generate(
      config,
      params,
      prompts_lib.gather(held.encoded, chosen),
      held.setting.generation,
      jax.random.fold_in(held.key, start),
    )
    logs = [
      toys.exact_statistics(config, x, prompts, samples.tokens, DECODING)
      for x in (params, reference(params))
    ]
    mask = np.asarray(samples.mask)
    total += (logs[0]['log_probs'] - logs[1]['log_probs'])[mask].sum()
    count += mask.sum()
  return total / count


def reference(params):
  return jax.tree.map(lambda x: 0.9 * x, params)


@pytest.mark.parametrize('batch', [pytest.param(5, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize('micro_prompts', mostly_slow([1, 2, 5, 99], 2, 99))
def test_kl_is_scored_in_parts(micro_prompts, batch, monkeypatch):
  _, params = toys.make_policy('llama')
  score, sizes = rollouts.score_tokens, []

  def watched(config, weights, prompts, tokens, *rest):
    sizes.append(len(tokens))
    return score(config, weights, prompts, tokens, *rest)

  monkeypatch.setattr(rollouts, 'score_tokens', watched)
  held = make(micro_prompts, batch, reference(params))
  answers = evaluation.answer(held, params)
  np.testing.assert_allclose(answers.kl, expected_kl(batch), rtol=1e-4)
  assert max(sizes) == min(micro_prompts, batch)
  # Both policies, every prompt once.
  assert sum(sizes) == 2 * len(ROWS)


@pytest.mark.parametrize(
  'samples, micro_prompts, expected', [(1, 0, 16), (4, 0, 4), (64, 2, 1)]
)
def test_as_many_responses_as_in_training(samples, micro_prompts, expected):
  config = base.get_config()
  config.prompts.max_tokens = config.rollout.max_tokens = 8
  config.rollout.update(prompts=8, samples=4)
  config.training.update(minibatches=2, micro_prompts=micro_prompts)
  shape, _ = toys.make_policy('llama')
  model = build.Model(shape, None, TOKENIZER, (1,), None)
  found = schedule.build_held_out(
    config, model, ROWS, [], jax.random.key(0), samples=samples, temperature=1.0
  )
  assert found.setting.micro_prompts == expected


def test_failures_of_all_batches_are_counted(tmp_path):
  (tmp_path / 'odd.py').write_text(
    'def odd(completions):\n'
    '  if len(completions[0]) % 2 == 0: raise ValueError("even")\n'
    '  return [1.0]\n'
  )
  _, params = toys.make_policy('llama')
  with Workers(f'{tmp_path}/odd.py:odd', workers=1, timeout=60) as workers:
    held = make(1, batch=2)
    rewards = [RewardPart('odd', workers), *held.setting.rewards]
    held = held._replace(setting=held.setting._replace(rewards=rewards))
    answers = evaluation.answer(held, params)
  even = [len(text) % 2 == 0 for text in answers.completions]
  per_batch = [sum(even[i : i + 4]) for i in range(0, 10, 4)]
  assert sum(count > 0 for count in per_batch) > 1, 'the test needs other rows'
  summary = evaluation.summary(answers)
  assert summary['eval/rewards/odd/failed'] == sum(even) < len(even)
  assert summary['eval/rewards/odd'] == 1.0
  assert 'eval/rewards/length/failed' not in summary
  assert np.isnan(answers.rewards).sum() == sum(even)
