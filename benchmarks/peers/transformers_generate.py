"""`generate` of transformers, texts in and texts out."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.peers import work as work_lib


def main() -> None:
  """Does the work."""
  work = work_lib.read()
  tokenizer = AutoTokenizer.from_pretrained(work.folder)
  tokenizer.padding_side = 'left'
  model = AutoModelForCausalLM.from_pretrained(work.folder, dtype='auto')
  model.eval()
  set_seed(0)

  @torch.inference_mode()
  def call() -> list[str]:
    inputs = tokenizer(work.texts[: work.prompts], return_tensors='pt')
    found = model.generate(
      **inputs,
      do_sample=True,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      max_new_tokens=work.new_tokens,
    )
    written = found[:, inputs['input_ids'].shape[1] :]
    if written.shape != (work.prompts, work.new_tokens):
      raise ValueError(f'responses of another length: {written.shape}')
    return tokenizer.batch_decode(written, skip_special_tokens=True)

  work_lib.show(work_lib.repeat(call, work), 'transformers', 'torch')


if __name__ == '__main__':
  main()
