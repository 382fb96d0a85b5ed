r"""Estimators compared on stories with sentiment, at equal generated tokens.

    python -m experiments.studies.compare --jobs=2 \
      --config=experiments/configs/compare_stories.py \
      --config.base.model.path=PATH/TO/stories260k \
      --config.base.task.path=PATH/TO/tinystories_1000.json

Model, data and reward are those of `stories_sentiment.py`.  The reward of a
whole text is a number in [−1, 1], so that groups of equal rewards are rare,
unlike in arithmetic.  Every method is charged for its KL to the original model
in the reward, exactly and with the same coefficient, so that reward, KL and
distinct bigrams together measure a method.  GRPO and VinePPO as published have
the KL in the loss instead, where its gradient differs.  The KL coefficient and
the learning rate are not tuned.  The results, computed in about 70 minutes on 2
cores, are in `docs/comparison.md`.
"""

from ml_collections import ConfigDict

from experiments.configs import base, compare_arithmetic, stories_sentiment
from jaxrl_llm import estimators as est

_KL = 0.02  # units of the reward per nat
_SENTENCE_ENDS = (426, 443, 450)  # . ! ? in the vocabulary of stories260k
_FILE = 'experiments/configs/compare_stories.py'


def reinforce(kl: float):
  """Builds REINFORCE with its KL charged in the reward."""
  return _charged(kl, est.identity())


def remax(kl: float):
  """Builds ReMax with its KL charged in the reward.

  The greedy response is not charged.
  """
  return _charged(kl, est.subtract_greedy_reward())


def dr_grpo(kl: float, max_length: int, clip: float = 0.2):
  """Builds Dr. GRPO with its KL charged in the reward."""
  return est.estimator(
    est.chain(est.subtract_response_kl(kl), est.subtract_group_mean()),
    est.clipped(clip),
    est.constant_length(max_length),
  )


def score_weighted(kl: float):
  """Builds RLOO with a score-weighted baseline and its KL charged."""
  baseline = est.subtract_weighted_leave_one_out_mean(est.score_norm())
  return _charged(kl, baseline)


def _charged(kl: float, baseline: est.AdvantageTransform):
  advantages = est.chain(est.subtract_response_kl(kl), baseline)
  return est.estimator(advantages, est.score_function(), est.sequence_sum())


def get_config() -> ConfigDict:
  metrics = (
    ('eval/reward', 'reward'),
    ('eval/kl', 'KL, nats per token'),
    ('eval/distinct_bigrams', 'distinct bigrams'),
  )
  return ConfigDict(
    dict(
      base=base_config(),
      init='original model',
      tokens=400_000,
      evaluations=6,
      seeds=(0, 1, 2),
      metrics=tuple(
        dict(name=name, title=title, scale=1, digits=3)
        for name, title in metrics
      ),
      methods=methods(),
    )
  )


def base_config() -> ConfigDict:
  """Returns the configuration that all methods share."""
  config = stories_sentiment.get_config()
  config.algorithm = dict(name='rloo', kl=_KL)
  config.rollout.update(prompts=16, samples=8)
  config.steps = 100_000  # the token budget ends a run
  config.optimizer = base.optimizer(3e-4, warmup_updates=5)
  config.evaluation.update(every=100_000, samples=4)
  config.checkpoints.update(every=1000, keep_latest=1, keep_best=0)
  config.log.samples = 1
  return config


def methods() -> tuple[dict, ...]:
  """Returns the comparison's methods with RL on arithmetic, KL charged."""
  uncertain = dict(name='entropy_sum', nats=25.0)
  changes = {
    'reinforce': dict(name=f'{_FILE}:reinforce'),
    'remax': dict(name=f'{_FILE}:remax'),
    'grpo': dict(kl=0.33),
    'dr_grpo': dict(name=f'{_FILE}:dr_grpo', max_length=64),
    'trepo_uncertain': dict(positions=uncertain),
    'vine_ppo': dict(delimiters=_SENTENCE_ENDS, kl=0.33),
    'obl_reinforce': dict(name=f'{_FILE}:score_weighted'),
  }
  prompts = {
    'remax': 64,
    'trepo_interpolated': 4,
    'trepo': 6,
    'trepo_tree': 6,
    'trepo_uncertain': 6,
    'trepo_critic': 10,
    'vine_ppo': 2,
  }
  entries = []
  for entry in compare_arithmetic.methods():
    label = entry['label']
    if 'rounds' in entry:  # not RL
      continue
    entry['algorithm'] |= dict(kl=_KL) | changes.get(label, {})
    if label in prompts:
      entry['rollout']['prompts'] = prompts[label]
    if label == 'obl_reinforce':
      entry['label'] = 'score_weighted'
    entries.append(entry)
  return tuple(entries)
