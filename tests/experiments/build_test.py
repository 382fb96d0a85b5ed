"""From configurations to models, rewards, estimators and optimisers."""

import mistakes
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import build
from experiments.configs import base
from jaxrl_llm import estimators as est

REWARDS = """
from __future__ import annotations
import dataclasses


@dataclasses.dataclass
class Word:
  text: str


def shouts(completions, answer, **kwargs):
  return [float(Word(c).text == a.upper()) for c, a in zip(completions, answer)]
"""


@pytest.fixture
def config():
  config = base.get_config()
  config.model.alphabet = 'ab'
  config.model.architecture = dict(
    hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, max_length=32
  )
  config.prompts.max_tokens = 16
  config.rollout.max_tokens = 16
  config.algorithm = dict(name='grpo')
  config.rewards = dict(match=dict(name='exact_match'))
  return config


def test_rewards_of_a_file_and_in_workers(config, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(REWARDS)
  form = dict(name='format_match', pattern='a+', weight=0.5)
  config.rewards = dict(
    shout=dict(name=f'{path}:shouts', weight=2),
    form=dict(form, workers=1, timeout=60),
  )
  assert build.code_files(config) == [str(path)]
  form, shout = build.reward_parts(config)
  assert (shout.weight, form.weight) == (2, 0.5)
  given = dict(completions=['A', 'a'], answer=['a', 'a'])
  assert shout.function(**given) == [1.0, 0.0]
  with form.function as workers:
    assert workers(prompts=['', ''], **given) == [0.0, 1.0]


REFUSED = """
'exact_match' | write dict(name='exact_match')
dict(weight=1.0) | has no 'name'
dict(name='exact_match', weight='1') | weight is '1', not a number
dict(name='format_match', patern='a') | did you mean 'pattern'?
dict(name='mine.txt:f') | no such Python file: mine.txt
dict(name='FILE:shout') | no function 'shout' in | it has shouts
dict(name='FILE:shouts', limit=3, workers=1) | has no setting 'limit'
dict(name='FILE:shouts', workers=0) | workers is 0
"""


@pytest.mark.parametrize('spec, texts', mistakes.table(REFUSED))
def test_rewards_refused(spec, texts, config, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(REWARDS)
  config.rewards = dict(part=eval(spec.replace('FILE', str(path))))
  with mistakes.refused('config.rewards.part', *texts):
    build.reward_parts(config)


MODELS = """
architecture.hiden_size=8 | no field 'hiden_size' | it takes hidden_size
architecture.num_layers=0 | num_layers must be a positive integer
architecture.num_heads=... | architecture: | 'num_heads'
alphabet='' | --config.model.path=FOLDER
"""


@pytest.mark.parametrize('change, texts', mistakes.table(MODELS))
def test_models_refused(change, texts, config):
  with mistakes.refused(*texts):
    build.model(mistakes.change(config.model, mistakes.changes(change)), 0)


def test_generation_fits_the_model(config):
  model = build.model(config.model, 0)
  found = build.generation(config, model, 0, samples=3, temperature=0.5)
  assert found.decoding.num_tokens == len(model.tokenizer)
  config.rollout.max_tokens = 17
  with mistakes.refused("17 response tokens exceed the model's 32"):
    build.generation(config, model, 0, samples=3, temperature=0.5)


def test_the_clipped_ratio_is_the_one_reported(config):
  config.algorithm = dict(name='gspo', clip=0.1, clip_high=0.1)
  # Tokens far off whose geometric mean is not: nothing is clipped.
  change = np.log([[[0.5, 2.0]]])
  batch = est.Batch(
    tokens=np.zeros((1, 1, 2), int),
    mask=np.ones((1, 1, 2), bool),
    log_probs=np.full((1, 1, 2), -3.0),
    valid=np.ones((1, 1, 1), bool),
    advantages=np.ones((1, 1, 1)),
    weights=np.ones((1, 1, 2)),
  )
  outputs = est.Outputs(log_probs=batch.log_probs + change)
  metric = build.token_metrics(config)['clip_ratio/high']
  assert not metric(outputs, batch).any()
  config.algorithm = ConfigDict(dict(name='grpo', clip=0.1))
  metric = build.token_metrics(config)['clip_ratio/high']
  assert metric(outputs, batch).tolist() == [[[False, True]]]


NAMED = """
dict(name='trepo', score_weighted=True, kl=0.1)
dict(name='trepo', positions=dict(name='fixed', positions=(1, 3)))
dict(name='trepo', positions=dict(name='delimiter', token_ids=(1, 3)))
dict(name='trepo', positions=dict(name='entropy_above', threshold=0.5))
dict(name='trepo', positions=dict(name='entropy_sum', nats=0.5))
dict(name='trepo', positions=dict(name='pairs', positions=dict(name='uniform')))
dict(name='trepo_critic')
dict(name='vine_ppo', delimiters=(3,))
"""


def test_every_use_of_branches_can_be_named(config):
  for algorithm in NAMED.strip().splitlines():
    config.algorithm = ConfigDict(eval(algorithm))
    assert build.estimator(config).needs.branches
  # What an estimator refuses is the user's mistake.
  pairs = dict(name='pairs', positions=dict(name='uniform'))
  config.algorithm = ConfigDict(dict(name='trepo', count=3, positions=pairs))
  with mistakes.refused('even count'):
    build.estimator(config)
