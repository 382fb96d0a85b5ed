"""Steps of a tiny model with refilling and hints: what is trained on."""

import numpy as np
import scripts
import steps

from experiments import build
from jaxrl_llm import rollouts


def rewards_of(prompts, completions):
  """Half of the prompts fail often; responses with a 1 get more."""
  return [
    text.count('1') if sum(map(ord, prompt)) % 2 else float('1' in text[:2])
    for prompt, text in zip(prompts, completions, strict=True)
  ]


def test_the_update_reads_the_prompts_that_were_sampled_from():
  config = scripts.tiny_config()
  config.rollout.update(prompts=8, samples=4, max_tokens=12)
  config.rollout.update(refill=1, hints=(0.5,))
  config.prompts.max_tokens = 20
  config.task.update(train=200, held_out=8, demonstrations=8)
  config.algorithm = dict(name='remax')
  rl, state, model = steps.begin(config, rewards_of)
  rows = build.dataset(config, model.tokenizer).train
  collected = rl.collect(state, 6)  # in which both tools have work to do
  record = collected.record
  assert record['hints/saved'] > 0 and record['refill/replaced'] > 0
  read = collected.responses.prompts
  texts = [
    model.tokenizer.decode(ids[:n])
    for ids, n in zip(np.asarray(read.tokens), read.lengths, strict=True)
  ]
  assert texts == [row['prompt'] for row in collected.responses.rows]
  plain = {row['prompt']: row['solution'] for row in rows}
  hinted = [text for text in texts if text not in plain]
  assert hinted
  for text in hinted:
    own = text[: text.index('=') + 1]
    assert (own + plain[own]).startswith(text) and len(text) > len(own)
  # The trainer's log-probabilities are the sampler's, of the same prompts.
  given = model.config, model.params, read, collected.rollouts.tokens
  scored = rollouts.score_tokens(*given, rl.generation.decoding, 4)
  mask = np.asarray(collected.rollouts.mask)
  np.testing.assert_allclose(
    np.asarray(scored.log_probs)[mask],
    np.asarray(collected.rollouts.log_probs)[mask],
    rtol=0,
    atol=1e-4,
  )
