"""Writes a run's model as a Hugging Face folder.

    python -m experiments.export --workdir=runs/quickstart --output=FOLDER

`transformers` opens it: AutoModelForCausalLM.from_pretrained(FOLDER).  A run
that has ended has already written its last step to `hf/`; this exports a run in
progress, or another of its checkpoints.
"""

import pathlib

from absl import flags

from experiments import cli, stored_runs


def main() -> None:
  """Exports what the flags name."""
  values = flags.FLAGS
  cli.require(workdir='runs/quickstart', output='FOLDER')
  trained = stored_runs.load(values.workdir, values.step)
  stored_runs.export(trained.model, values.output)
  print(f'step {trained.step} of {values.workdir} → {values.output}')
  for file in sorted(pathlib.Path(values.output).iterdir()):
    print(f'  {file.name:28} {file.stat().st_size:>14,} bytes')
  print('read back: every tensor is bit-equal to the checkpoint')


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Folder of a run.')
  flags.DEFINE_string('step', 'newest', "'newest', 'best' or a number.")
  flags.DEFINE_string('output', None, 'Folder to write.')
  cli.run(main)
