"""Random rollouts with everything awkward in them, and a table of recipes."""

import numpy as np

from jaxrl_llm import estimators as est

NAN = float('nan')
# One entry per recipe and setting; every contract runs over all of them.
RECIPES = {
  'reinforce': est.reinforce(),
  'rloo': est.rloo(),
  'rloo with KL': est.rloo(kl=0.3),
  'grpo': est.grpo(clip=0.2, kl=0.04),
  'grpo without KL': est.grpo(clip=0.1, kl=0.0),
  'dr_grpo': est.dr_grpo(max_length=7, clip=0.2),
  'sft': est.sft(),
}
GROUP_BASED = [name for name, e in RECIPES.items() if e.needs.samples > 1]


def random_rollouts(
  seed, prompts=3, samples=4, length=5, *, invalid=True, dtype=np.float64
):
  """Rollouts and outputs of a policy some updates away from the sampler.

  Lengths are ragged, with an empty and a full response.  Outside the mask
  stands NaN.  With `invalid`, two responses are invalid: NaN all over.

  Returns:
    (rollouts, outputs) of NumPy arrays.
  """
  random = np.random.default_rng(seed)
  shape = (prompts, samples, length)
  lengths = random.integers(1, length + 1, (prompts, samples))
  lengths[0, 0], lengths[-1, -1] = length, 0
  mask = np.arange(length)[None, None] < lengths[..., None]
  valid = np.ones((prompts, samples, 1), bool)
  if invalid:
    valid[0, 1] = valid[-1, 0] = False
  kept = mask & valid
  nats = lambda: np.where(kept, -random.exponential(size=shape), NAN)
  log_probs = nats()
  moved = log_probs + random.normal(0.0, 0.3, shape)
  rewards = np.where(valid, random.normal(size=(prompts, samples, 1)), NAN)
  cast = lambda x: x.astype(dtype)
  rollouts = est.Rollouts(
    tokens=random.integers(0, 9, shape).astype(np.int32),
    mask=mask,
    log_probs=cast(log_probs),
    rewards=cast(rewards),
    valid=valid if invalid else None,
    ref_log_probs=cast(nats()),
  )
  entropy = np.where(kept, random.exponential(size=shape), NAN)
  return rollouts, est.Outputs(log_probs=cast(moved), entropy=cast(entropy))


def changed(x, function):
  """A copy of a dataclass of arrays, `function` applied to those present."""
  arrays = {name: v for name, v in x.items() if v is not None}
  return x.replace(**{name: function(v) for name, v in arrays.items()})
