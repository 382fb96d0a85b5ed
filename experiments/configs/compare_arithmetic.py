r"""Estimators compared on multi-step arithmetic, at equal generated tokens.

    python -m experiments.studies.compare --jobs=2 \
      --config=experiments/configs/compare_arithmetic.py

Example: '8+5*7+8*8=' → '8+5+8*8=8+5+4=3+4=7', answer '7' (every result is taken
modulo 10), 20 tokens with the end token.  The initial model, 223,000
parameters, was trained on solutions, 65 % of them careless: computed from left
to right, without precedence of products.  The reward of RL only checks the
last number; each method has to find the error in a solution by itself.

Each update uses about 5,000 generated tokens: 256 responses, or fewer with
branches.  If branches fork by uncertainty, which falls during training, an
update uses more tokens at first and fewer later.  One update per batch, one
learning rate for all, no KL; `compare_arithmetic_rates.py` tries half and twice
the rate.  The results, computed in 44 minutes on 2 cores, are in
`docs/comparison.md`.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart
from jaxrl_llm import estimators as est
from jaxrl_llm.tasks import arithmetic

_EQUALS = 3 + arithmetic.ALPHABET.index('=')  # after three special tokens
_FILE = 'experiments/configs/compare_arithmetic.py'


def trepo_interpolated(
  count: int, samples: int, clip: float = 0.2, kl: float = 0.0
):
  """Builds the most literal reading of TRePO.

  Args:
    count: positions per response: two for each token with a known advantage.
    samples: K.
    clip: ε.
    kl: β, in the reward.
  """
  fill = est.interpolate_advantages
  return est.trepo(count, samples, fill=fill, clip=clip, kl=kl)


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      base=base_config(),
      init='Init SFT',
      tokens=300_000,
      evaluations=12,
      seeds=(0, 1, 2, 3, 4),
      metrics=(
        dict(
          name='eval/rewards/correct',
          title='accuracy, %',
          scale=100,
          digits=1,
        ),
      ),
      methods=methods(),
    )
  )


def base_config() -> ConfigDict:
  """Returns the configuration that all methods share."""
  config = quickstart.get_config()
  config.model.architecture.update(
    hidden_size=96, intermediate_size=256, max_length=32
  )
  config.task.update(operations=(4, 4), careless=0.65)
  config.prompts.max_tokens = 10
  config.algorithm = dict(name='rloo')
  config.rollout.max_tokens = 22
  config.steps = 100_000  # the token budget ends a run
  config.optimizer.warmup_updates = 5
  config.warm_start.steps = 500
  config.evaluation.every = 100_000
  config.checkpoints.update(every=1000, keep_latest=1, keep_best=0)
  config.log.samples = 1
  return config


def method(label: str, title: str, **algorithm) -> dict:
  """Builds an entry of a comparison (`experiments.studies.compare`).

  Args:
    label: name of its runs.
    title: title in table and figure.
    **algorithm: fields of `config.algorithm`; its name is the label by default.
  """
  return dict(label=label, title=title, algorithm=dict(name=label) | algorithm)


def groups(prompts: int, samples: int) -> dict:
  """Builds the section of an entry whose P and G differ from the base's."""
  return dict(rollout=dict(prompts=prompts, samples=samples))


def methods() -> tuple[dict, ...]:
  """Returns one entry per method, in the order of table and figure."""
  branched = dict(count=2, samples=4)
  uncertain = dict(name='entropy_sum', nats=0.5)
  interpolated = dict(name=f'{_FILE}:trepo_interpolated', count=4, samples=4)
  critic = dict(critic=dict(optimizer=dict(learning_rate=1e-3), warmup=5))
  rounds = dict(sampling=5, batch=64, per_prompt=4)
  return (
    method('reinforce', 'REINFORCE'),
    method('remax', 'ReMax') | groups(128, 1),
    method('rloo', 'RLOO'),
    method('grpo', 'GRPO', kl=0.0),
    method('dr_grpo', 'Dr. GRPO', max_length=22),
    method('ppo', 'PPO') | critic,
    method(
      'trepo_interpolated', 'TRePO, advantages interpolated', **interpolated
    )
    | groups(10, 4),
    method('trepo', 'TRePO, hold', **branched) | groups(16, 4),
    method('trepo_tree', 'TRePO, tree', **branched) | groups(16, 4),
    method(
      'trepo_uncertain',
      'TRePO, where uncertain',
      name='trepo',
      positions=uncertain,
      **branched,
    )
    | groups(42, 4),
    method('trepo_critic', 'TRePO, critic of branches', count=1, samples=4)
    | critic
    | groups(25, 4),
    method('vine_ppo', 'VinePPO', delimiters=(_EQUALS,), count=3, kl=0.0)
    | groups(15, 4),
    method('obl_reinforce', 'score-weighted RLOO'),
    # Methods other than RL, with as many tokens or demonstrations.
    method('rest_em', 'RestEM') | dict(rounds=dict(learning=45, **rounds)),
    method('dpop', 'DPO-Positive') | dict(rounds=dict(learning=15, **rounds)),
    method('sft', 'SFT, more of the same')
    | dict(steps=59, rounds=dict(batch=256)),
  )
