"""Online reinforcement learning in sixty lines, without a configuration.

    python examples/train.py MODEL DATA.jsonl

MODEL is a Hugging Face folder; a line of DATA is {"prompt": "3+4=", "answer":
"7"}.  Edit the reward, the estimator and the sizes below.
"""

import sys

import jax

from jaxrl_llm import estimators as est
from jaxrl_llm import rollouts, training
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.tasks import datasets, prompts, sources

STEPS, PROMPTS, SAMPLES, MAX_TOKENS = 60, 16, 8, 12


def contains_answer(completions, answer, **columns):
  """Returns 1 for each completion that contains its prompt's answer."""
  return [float(a in text) for text, a in zip(completions, answer, strict=True)]


def main(model_path, data_path):
  config, params = folders.load(model_path)
  tokenizer = folders.load_tokenizer(model_path)
  rows = datasets.read_rows(data_path)
  encoded = prompts.encode_prompts(rows, tokenizer, max_tokens=64)
  source = sources.PromptSource(encoded, PROMPTS, seed=0)

  trainer = training.online(
    config,
    tokenizer,
    est.rloo(),  # or est.trepo(), est.remax(), est.dr_grpo(MAX_TOKENS), …
    training.adamw(3e-4),
    [contains_answer],
    rollouts.Generation(
      samples=SAMPLES,
      max_tokens=MAX_TOKENS,
      eos_ids=folders.eos_token_ids(model_path, tokenizer),
      pad_id=encoded.pad_id,
    ),
  )
  state, key = trainer.init(params), jax.random.key(0)
  for step in range(STEPS):
    state, metrics, sampled = trainer.step(
      state, source.batch(step), jax.random.fold_in(key, step)
    )
    reward = metrics['reward']
    print(f'{step:4} {reward:6.3f}', '█' * int(40 * max(0, reward)), flush=True)
  print(sampled.responses.rows[0]['prompt'], sampled.responses.completions[0])
  params = state.trainable['policy']
  folders.save('trained', config, params, tokenizer=tokenizer)
  print('trained/: the model, for transformers')


if __name__ == '__main__':
  main(*sys.argv[1:]) if len(sys.argv) == 3 else sys.exit(__doc__)
