"""Writes a run's model as a Hugging Face folder.

    python -m experiments.export --workdir=runs/quickstart --output=FOLDER

`transformers` opens it: AutoModelForCausalLM.from_pretrained(FOLDER).  A run
that has ended has already written its last step to `hf/`; this serves a run
that goes on, or another of its checkpoints.
"""

import pathlib

from absl import flags

from experiments import cli, stored_runs
from jaxrl_llm.errors import UserError


def define_flags() -> None:
  """Defines the flags of this script."""
  flags.DEFINE_string('workdir', None, 'Folder of a run.')
  flags.DEFINE_string('step', 'newest', "'newest', 'best' or a number.")
  flags.DEFINE_string('output', None, 'Folder to write.')


def main() -> None:
  """Exports what the flags name."""
  values = flags.FLAGS
  for name in ('workdir', 'output'):
    if values[name].value is None:
      raise UserError(
        f'--{name} is missing\n'
        'for example --workdir=runs/quickstart --output=FOLDER'
      )
  trained = stored_runs.load(values.workdir, values.step)
  stored_runs.export(trained.model, values.output)
  print(f'step {trained.step} of {values.workdir} → {values.output}')
  for file in sorted(pathlib.Path(values.output).iterdir()):
    print(f'  {file.name:28} {file.stat().st_size:>14,} bytes')
  print('read back: every tensor is bit-equal to the checkpoint')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
