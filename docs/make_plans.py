"""Writes docs/plans.md from what `experiments.planning.plan --output` wrote.

    python docs/make_plans.py FOLDER

FOLDER holds a JSON file per plan; those whose names begin with `weak_` are of
the update alone and make the table of weak scaling.
"""

import json
import pathlib
import sys

from experiments.planning import plan_report

HEAD = """# Plans

<!-- written by docs/make_plans.py -->

What a step of RL takes on chips that were not there: compiled ahead of time by
`python -m experiments.planning.plan` on a CPU, from shapes alone.  Nothing was
measured on an accelerator.  The configuration is
`experiments/configs/qwen2_5_7b_tpu.py` (GRPO with a reference, prompts of 512
and responses of 1,024 tokens, float32 parameters, bfloat16 products) but for
the model and what the first line of a plan says.

`parameters`, `optimizer` and `reference` are there all the time; `other` are
further arguments, such as the parameters in the layout of sampling.  `repeated`
is how many times more FLOPs all chips compute together than the program asks
for.  TPU programs are compiled at the lowest effort (`--effort=-1`), and the
machine was busy: `compile s` is what it took there.  A chip's `limit` is what
its compiler allows, of a GPU JAX's share of 75%.
"""

SCALING = """## Weak scaling

The update with 8 responses per chip, on more and more chips, `tensor=1`: from
the collectives of the compiled programs at the bandwidth of the links that they
use.  `efficiency` is the time on the fewest chips over the time on these, with
nothing sent while a chip computes; `if hidden` with all sent meanwhile.  Only
bytes count: no latency, no contention, no slow host, so that this is a bound.
On a v5p torus XLA gathers parameters by all-reducing padded slices, which sends
twice the bytes of an all-gather; that is what is counted.
"""


def main(folder: str) -> None:
  """Reads a folder's plans and writes the page."""
  told = {
    path.stem: json.loads(path.read_text())
    for path in sorted(pathlib.Path(folder).glob('*.json'))
  }
  weak = [told.pop(name) for name in list(told) if name.startswith('weak_')]
  weak.sort(key=lambda numbers: numbers['chips'])
  parts = [HEAD]
  for numbers in told.values():
    title = f'## {numbers["model"]} on {numbers["topology"]}'
    parts += [title, plan_report.text(numbers)]
  if weak:
    parts += [SCALING, plan_report.markdown(plan_report.scaling_table(weak))]
  page = '\n\n'.join(part.strip() for part in parts) + '\n'
  (pathlib.Path(__file__).parent / 'plans.md').write_text(page)


if __name__ == '__main__':
  main(sys.argv[1])
