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
from experiments.configs.base import method
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
  """Returns one entry per method, in the order of table and figure."""
  branched = dict(count=2, samples=4, kl=_KL)
  uncertain = dict(name='entropy_sum', nats=25.0)
  critic = dict(optimizer=dict(learning_rate=1e-3), warmup=5)
  return (
    method('reinforce', 'REINFORCE', dict(name=f'{_FILE}:reinforce', kl=_KL)),
    method('remax', 'ReMax', dict(name=f'{_FILE}:remax', kl=_KL), 64, 1),
    method('rloo', 'RLOO', dict(name='rloo', kl=_KL)),
    method('grpo', 'GRPO', dict(name='grpo', kl=0.33)),
    method(
      'dr_grpo',
      'Dr. GRPO',
      dict(name=f'{_FILE}:dr_grpo', kl=_KL, max_length=64),
    ),
    method('ppo', 'PPO', dict(name='ppo', kl=_KL), critic=critic),
    method(
      'trepo_published',
      'TRePO as published',
      dict(
        name=f'{compare_arithmetic.FILE}:trepo_published',
        count=4,
        samples=4,
        kl=_KL,
      ),
      4,
      4,
    ),
    method('trepo', 'TRePO, hold', dict(name='trepo', **branched), 6, 4),
    method(
      'trepo_tree', 'TRePO, tree', dict(name='trepo_tree', **branched), 6, 4
    ),
    method(
      'trepo_uncertain',
      'TRePO, where uncertain',
      dict(name='trepo', positions=uncertain, **branched),
      6,
      4,
    ),
    method(
      'trepo_critic',
      'TRePO, critic of branches',
      dict(name='trepo_critic', count=1, samples=4, kl=_KL),
      10,
      4,
      critic=critic,
    ),
    method(
      'vine_ppo',
      'VinePPO',
      dict(name='vine_ppo', delimiters=_SENTENCE_ENDS, count=3, kl=0.33),
      2,
      4,
    ),
    method(
      'score_weighted',
      'score-weighted RLOO',
      dict(name=f'{_FILE}:score_weighted', kl=_KL),
    ),
  )
