"""`generate` of transformers, texts in and texts out.

It uses the faster of its caches, the growing or the static one.
"""

import functools
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.peers import work as work_lib


def main() -> None:
  """Does the work."""
  work = work_lib.read()
  tokenizer = AutoTokenizer.from_pretrained(work.folder)
  tokenizer.padding_side = 'left'
  model = AutoModelForCausalLM.from_pretrained(work.folder, dtype='auto')
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  model.to(device).eval()
  set_seed(0)

  @torch.inference_mode()
  def call(cache: str) -> list[str]:
    inputs = tokenizer(work.texts[: work.prompts], return_tensors='pt')
    inputs = inputs.to(device)
    output = model.generate(
      **inputs,
      do_sample=True,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      max_new_tokens=work.new_tokens,
      cache_implementation=cache,
    )
    written = output[:, inputs['input_ids'].shape[1] :]
    if written.shape != (work.prompts, work.new_tokens):
      raise ValueError(f'responses of another length: {written.shape}')
    return tokenizer.batch_decode(written, skip_special_tokens=True)

  cache = _faster(call)
  seconds = work_lib.repeat(functools.partial(call, cache), work)
  work_lib.show(seconds, 'transformers', 'torch')


def _faster(call) -> str:
  """Returns the name of the cache with the fastest of three calls."""
  times = {}
  for _ in range(3):
    for cache in ('dynamic', 'static'):
      start = time.perf_counter()
      call(cache)
      taken = time.perf_counter() - start
      times[cache] = min(taken, times.get(cache, taken))
  return min(times, key=times.get)


if __name__ == '__main__':
  main()
