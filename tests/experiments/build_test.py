"""From configurations to models, rewards, estimators and optimisers."""

import jax
import jax.numpy as jnp
import mistakes
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import build
from experiments.configs import base
from jaxrl_llm import estimators as est
from jaxrl_llm import training
from jaxrl_llm.models.huggingface import families
from jaxrl_llm.rewards import Workers

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
  return config.lock()


def test_what_a_run_sets_of_a_model_is_no_other_model(config):
  """Else a checkpoint could not be exported after it."""
  assert set(build.model_settings(config.model)) <= set(families.RUN_FIELDS)


def test_reward_from_a_users_file(config, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(REWARDS)
  with config.unlocked():
    config.rewards = dict(
      shout=dict(name=f'{path}:shouts', weight=2),
      form=dict(name='format_match', pattern='a+', weight=0.5),
      match=dict(name='exact_match'),
    )
  parts = {part.name: part for part in build.reward_parts(config)}
  weights = {name: part.weight for name, part in parts.items()}
  assert weights == {'shout': 2, 'form': 0.5, 'match': 1.0}
  given = dict(completions=['A', 'a'], answer=['a', 'a'])
  assert parts['shout'].function(**given) == [1.0, 0.0]
  assert parts['form'].function(**given) == [0.0, 1.0]
  assert parts['match'].function(**given) == [0.0, 1.0]


def test_reward_in_worker_processes(config):
  with config.unlocked():
    config.rewards = dict(
      form=dict(
        name='format_match', pattern='a+', workers=1, timeout=60, weight=0.5
      )
    )
  (part,) = build.reward_parts(config)
  assert (part.name, part.weight) == ('form', 0.5)
  with part.function as workers:
    assert isinstance(workers, Workers)
    given = dict(prompts=['', ''], completions=['aa', 'b'])
    assert workers(**given) == [1.0, 0.0]


def test_code_files_are_those_that_are_executed(config, tmp_path):
  mine, other = tmp_path / 'mine.py', tmp_path / 'other.py'
  for path in (mine, other):
    path.write_text(REWARDS)
  assert build.code_files(config) == []
  with config.unlocked():
    config.rewards = dict(
      shout=dict(name=f'{mine}:shouts'),
      again=dict(name=f'{mine}:shouts'),
      match=dict(name='exact_match'),
      missing=dict(name=f'{tmp_path}/no.py:f'),
      wrong='exact_match',
    )
    config.algorithm = dict(name=f'{other}:grpo')
    config.task = dict(name=f'{tmp_path}/task.py:rows')
  assert build.code_files(config) == [str(other), str(mine)]


REFUSED = """
'exact_match' | write dict(name='exact_match')
dict(weight=1.0) | has no 'name'
dict(name='exact_match', weight='1') | weight is '1', not a number
dict(name='exact_match', pattern='a') | has no setting 'pattern'
dict(name='format_match') | format_match needs pattern
dict(name='format_match', patern='a') | did you mean 'pattern'?
dict(name='mine.txt:f') | no such Python file: mine.txt
dict(name='FILE:shout') | no function 'shout' in | it has shouts
dict(name='FILE:shouts', limit=3) | has no setting 'limit'
dict(name='FILE:shouts', limit=3, workers=1) | has no setting 'limit'
dict(name='FILE:shouts', timeout=3.0) | has no setting 'timeout'
dict(name='FILE:shouts', workers=0) | workers is 0
"""


@pytest.mark.parametrize('spec, texts', mistakes.table(REFUSED))
def test_rewards_refused(spec, texts, config, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(REWARDS)
  with config.unlocked():
    config.rewards = dict(part=eval(spec.replace('FILE', str(path))))
  with mistakes.refused('config.rewards.part', *texts):
    build.reward_parts(config)


def test_model_from_a_stored_configuration(config):
  # JSON has no tuples; the architecture must be hashable all the same.
  with config.unlocked():
    config.model.architecture.update(sliding=(True,), window=4)
  stored = ConfigDict(
    {
      **config.model.to_dict(),
      'architecture': {
        **config.model.architecture.to_dict(),
        'sliding': [True],
      },
    }
  )
  first, second = build.model(config.model, 0), build.model(stored, 0)
  assert hash(first.config) == hash(second.config)
  assert first.config == second.config
  equal = jax.tree.map(lambda a, b: (a == b).all(), first.params, second.params)
  assert all(jax.tree.leaves(equal))
  assert first.config.vocab_size == len(first.tokenizer) == 5
  assert first.eos_ids == (first.tokenizer.eos_token_id,)


MODELS = """
architecture.hiden_size=8 | no field 'hiden_size' | it takes hidden_size
architecture.vocab_size=8 | no field 'vocab_size'
architecture.num_layers=0 | num_layers must be a positive integer
architecture.num_heads=... | architecture: | 'num_heads'
alphabet='' | --config.model.path=FOLDER
"""


@pytest.mark.parametrize('change, texts', mistakes.table(MODELS))
def test_models_refused(change, texts, config):
  with config.unlocked(), mistakes.refused(*texts):
    build.model(mistakes.change(config.model, mistakes.changes(change)), 0)


def test_generation_fits_the_model(config):
  model = build.model(config.model, 0)
  found = build.generation(config, model, 0, samples=3, temperature=0.5)
  assert found.samples == 3 and found.max_tokens == 16
  assert found.decoding.temperature == 0.5
  assert found.decoding.num_tokens == len(model.tokenizer)
  config.rollout.max_tokens = 17
  with mistakes.refused("17 response tokens exceed the model's 32"):
    build.generation(config, model, 0, samples=3, temperature=0.5)


def test_estimator_and_its_metrics(config):
  clips = {'clip_ratio/low', 'clip_ratio/high'}
  assert clips <= set(build.token_metrics(config))
  assert build.estimator(config).needs.reference
  with config.unlocked():
    config.algorithm = dict(name='rloo')
  assert not clips & set(build.token_metrics(config))
  assert not build.estimator(config).needs.reference
  with config.unlocked():
    config.algorithm = dict(name='ppo')
  assert build.estimator(config).needs.critic


def test_the_clipped_ratio_is_the_one_reported(config):
  with config.unlocked():
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
  with config.unlocked():
    config.algorithm = dict(name='grpo', clip=0.1)
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


@pytest.mark.parametrize('algorithm', NAMED.strip().splitlines())
def test_every_use_of_branches_can_be_named(config, algorithm):
  config.algorithm = ConfigDict(eval(algorithm))
  assert build.estimator(config).needs.branches


def test_what_an_estimator_refuses_is_the_users_mistake(config):
  pairs = dict(name='pairs', positions=dict(name='uniform'))
  config.algorithm = dict(name='trepo', count=3, positions=pairs)
  with mistakes.refused('even count'):
    build.estimator(config)
  with config.unlocked():
    config.algorithm = dict(name='p3o')
    config.rollout.samples = 3
  with mistakes.refused('p3o: responses pair up: 3 per prompt'):
    build.estimator(config)


def test_optimizer_states_are_interchangeable():
  # A checkpoint of either phase is restored into the state of either.
  params = {'kernel': jnp.ones((2, 2))}
  structures = set()
  for changes in (
    {},
    dict(decay='linear'),
    dict(decay='cosine', warmup_updates=3),
    dict(weight_decay=0.1),
  ):
    optimizer, course = build.optimizer(base.optimizer(0.5, **changes), 10)
    assert float(course(9)) <= 0.5
    state = training.init_state({'policy': params}, optimizer)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    structures.add(tuple(jax.tree_util.keystr(path) for path, _ in leaves))
  assert len(structures) == 1
