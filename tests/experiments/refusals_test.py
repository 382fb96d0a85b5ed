"""Configurations that a script refuses before anything is loaded or written."""

import json

import mistakes
import pytest

from experiments import preference, rest_em, reward_model, sft, stored_runs
from experiments import train as online_rl
from experiments.configs import (
  arithmetic_dpop,
  arithmetic_rest_em,
  base,
  hh_rlhf_reward_model,
  quickstart,
)

# Name of a start → its script, its file and what it changes there.
GIVEN = 'rounds.sampling=0; rounds.learning=0; rounds.per_prompt=4'
STARTS = {
  'train': (online_rl, quickstart, ''),
  'ppo': (online_rl, quickstart, "algorithm=dict(name='ppo')"),
  'rloo': (online_rl, quickstart, "algorithm=dict(name='rloo')"),
  'rest_em': (rest_em, arithmetic_rest_em, 'rounds.per_prompt=3'),
  'dpo': (preference, arithmetic_dpop, "algorithm=dict(name='dpo')"),
  'sampling sft': (sft, arithmetic_rest_em, "algorithm=dict(name='sft')"),
  'sft': (sft, arithmetic_rest_em, f"algorithm=dict(name='sft'); {GIVEN}"),
  'reward_model': (reward_model, hh_rlhf_reward_model, ''),
}


def start(name):
  script, module, changes = STARTS[name]
  config = mistakes.change(module.get_config(), mistakes.changes(changes))
  return script.SCRIPT.check, config


REFUSED = """
train: rolout=dict(samples=4) | nothing reads config.rolout.samples
train: rollout.sample=4 | nothing reads config.rollout.sample | did you mean
train: rollout.top_p=... | config.rollout.top_p is missing | such as 1.0
train: rollout.samples='many' | samples is 'many' | an integer, such as 8
train: steps=True | config.steps is True
train: model.remat=1 | remat is 1 | true or false
train: evaluation.batch=None | config.evaluation.batch is None
train: algorithm='grpo' | config.algorithm is 'grpo' | a section
train: evaluation.every=0 | config.evaluation.every is 0 | at least 1
train: rollout.prompts=10**30 | rollout.prompts is 1000 | below 2147
train: seed=2**32 | config.seed is 4294967296
train: rollout.temperature=nan | temperature is nan
train: rollout.temperature=0 | config.rollout.temperature is 0 | above 0
train: rollout.top_p=0 | config.rollout.top_p is 0
train: optimizer.learning_rate=-1 | optimizer.learning_rate is -1 | above 0
train: optimizer.warmup_updates=99 | warmup_updates is 99 | to 79 or less
train: warm_start.optimizer.decay='step' | warm_start.optimizer: decay is 'step'
train: tokens=9; optimizer.decay='linear' | set decay to 'constant', or tokens
train: model.attention='flash' | attention is 'flash' | cudnn
train: algorithm=dict(name=5) | config.algorithm.name is 5
train: algorithm=dict(name='grpo', clip=[0.2]) | config.algorithm: grpo:
train: algorithm=dict(name='ppo', kl=dict(name=5)) | algorithm.kl: the name is 5
train: algorithm=dict(name='grpo', clipp=1) | parameter 'clipp' | mean 'clip'
train: algorithm=dict(name='grpoo') | config.algorithm | did you mean 'grpo'?
train: rollout.samples=1 | config.rollout.samples is 1 | grpo needs at least 2
train: training.minibatches=2; training.micro_prompts=3 | micro_prompts is 3 |\
 16 prompts (of a minibatch: config.rollout.prompts, 32, divided by
train: rounds.sampling=2 | config.rounds.sampling is 2
train: algorithm=dict(name='sft') | experiments.sft
train: algorithm=dict(name='ipo') | experiments.preference
rloo: training.epochs=2 | rloo has no importance ratio
rloo: critic.optimizer.b1=0.5 | critic.optimizer.b1 is 0.5, but rloo has no cri
rloo: rollout.refill=2; algorithm=dict(name='reinforce'); rollout.samples=1 |\
 samples is 1
rloo: rollout.hints=(0.0, 0.5) | give shares above 0
rloo: rollout.hints=(0.5, 0.25) | in increasing order
rloo: rollout.hint_threshold=0.5 | hint_threshold is 0.5, which
rloo: rollout.hints=(0.5,); rollout.hint_template='{prompt}' | 0 times
train: rollout.refill=2; algorithm=dict(name='trepo') | or have branches
rloo: prompts.min_pass_rate=0.1 | unless config.prompts.pass_rates is
rloo: prompts.pass_rates='f'; prompts.min_pass_rate=0.6; \
prompts.max_pass_rate=0.4 | the minimum first
rloo: prompts.curriculum_steps=5 | unless config.prompts.curriculum is
rloo: prompts.curriculum='level' | set it to 9 or more
ppo: critic.trunk='own' | config.critic.trunk is 'own' | separate, shared
ppo: critic.trunk='shared'; critic.path='model' | path is 'model' | 'separate'
ppo: critic.warmup=80 | config.critic.warmup is 80 | 80 steps | 79 or less
ppo: critic.warmup=75 | config.optimizer: warmup_updates is 10 | only 5 updates
ppo: critic.optimizer.warmup_updates=80 | warmup_updates is 80 | 80 updates
train: critic.warmup=5 | config.critic.warmup is 5, but grpo has no critic | ppo
ppo: algorithm.kl=dict(name='adaptive_kl', initial=0.1) |\
 config.algorithm.kl: adaptive_kl needs target, horizon
rest_em: algorithm.name='grpo' | 'grpo': this script supports
rest_em: rounds.sampling=0 | learns from its own samples
rest_em: rounds.learning=0 | a round would learn nothing
rest_em: steps=61 | set it to 60 or 80
rest_em: rollout.refill=2 | refill is 2, but rest_em does not
rest_em: training.epochs=2 | a step of rest_em is one update
dpo: algorithm.name='grpo' | set dpo or dpop or ipo, or | with experiments.train
dpo: rollout.samples=1 | needs at least 2 per prompt
dpo: rounds.sampling=0 | config.rounds.learning is 10
sampling sft: steps=20 | learns from the data of the task
sft: prompts.pass_rates='x' | learns from demonstrations
sft: tokens=9 | config.tokens is 9, but nothing
reward_model: rewards=dict(a=dict(name='sentiment')) | learns from pairs alone
reward_model: warm_start.steps=3 | config.warm_start.steps is 3
"""


@pytest.mark.parametrize('mistake, texts', mistakes.table(REFUSED))
def test_refused(mistake, texts):
  name, _, changes = mistake.partition(': ')
  check, config = start(name)
  with mistakes.refused(*texts):
    check(mistakes.change(config, mistakes.changes(changes)))


SOUND = [
  *(f'{name}: ' for name in STARTS if name != 'sampling sft'),
  'ppo: tokens=10**12',  # Counts of tokens may be large.
  "train: algorithm=dict(name='trepo'); training.epochs=2",
  "train: algorithm=dict(name='remax'); rollout.hints=[0.5]; rollout.refill=2",
  'sft: steps=0; optimizer.warmup_updates=10',
]


@pytest.mark.parametrize('sound', SOUND)
def test_sound(sound):
  name, _, changes = sound.partition(': ')
  check, config = start(name)
  check(mistakes.change(config, mistakes.changes(changes)))


def stored(folder, **values):
  """Writes the defaults with some changes as a run's config.json."""
  config = mistakes.change(base.get_config(), values)
  (folder / 'config.json').write_text(json.dumps(config.to_dict()))
  return folder


def test_what_a_run_stores_is_read_back_and_checked(tmp_path):
  config = stored_runs.read_config(stored(tmp_path, **{'rollout.samples': 3}))
  assert config.rollout.samples == 3 and config.is_locked
  # A whole number stands for a float, as on the command line.
  stored(tmp_path, **{'rollout.temperature': 1})
  assert stored_runs.read_config(tmp_path).rollout.temperature == 1
  stored(tmp_path, **{'rollout.samples': 'many'})
  with mistakes.refused(f'{tmp_path}/config.json: ', "samples is 'many'"):
    stored_runs.read_config(tmp_path)
  for text in ('{"seed":', '{"rollout.samples": 4}', '[1]'):
    (tmp_path / 'config.json').write_text(text)
    with mistakes.refused('JSON object' if text == '[1]' else 'cannot be read'):
      stored_runs.read_config(tmp_path)
