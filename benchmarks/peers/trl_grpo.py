"""GRPO steps of TRL's own trainer, with a reward on texts and its records."""

import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks import reward
from benchmarks.peers import work as work_lib


def main() -> None:
  """Does the work."""
  work = work_lib.read()
  tokenizer = AutoTokenizer.from_pretrained(work.folder)
  with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
      model=AutoModelForCausalLM.from_pretrained(work.folder, dtype='auto'),
      processing_class=work_lib.with_end(tokenizer, work),
      reward_funcs=reward.vowels,
      train_dataset=Dataset.from_dict({'prompt': work.texts}),
      args=_settings(work, folder),
    )
    trainer.train()
  lengths = [
    record['completions/min_length']
    for record in trainer.state.log_history
    if 'completions/min_length' in record
  ]
  if set(lengths) != {float(work.new_tokens)}:
    raise ValueError(f'responses of other lengths: {lengths}')
  seconds = reward.intervals()[-work.rounds :]
  work_lib.show(seconds, 'trl', 'transformers', 'torch', 'accelerate')


def _settings(work: work_lib.Work, folder: str) -> GRPOConfig:
  """Returns settings for the whole batch at once, with nothing repeated."""
  return GRPOConfig(
    output_dir=folder,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    per_device_train_batch_size=work.prompts * work.samples,
    num_generations=work.samples,
    max_completion_length=work.new_tokens,
    temperature=1.0,
    beta=0.0,
    loss_type='grpo',
    learning_rate=work.learning_rate,
    lr_scheduler_type='constant',
    max_grad_norm=1.0,
    max_steps=work.warmup + work.rounds,
    logging_steps=1,
    report_to='none',
    save_strategy='no',
  )


if __name__ == '__main__':
  main()
