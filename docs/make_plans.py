"""Writes docs/plans.md from files of `experiments.planning.plan --output`.

    python docs/make_plans.py FOLDER

FOLDER contains a JSON file per plan.  Files whose names begin with `weak_`
describe the update alone and make the table of weak scaling.
"""

import json
import pathlib
import sys

from experiments.planning import plan_report

HEAD = """# Plans

<!-- written by docs/make_plans.py -->

Memory and time of an RL step on chips that were not available, compiled ahead
of time by `python -m experiments.planning.plan` on a CPU, from shapes alone.
Nothing here was measured on an accelerator.  The configuration is
`experiments/configs/qwen2_5_7b_tpu.py` (GRPO with a reference, prompts of 512
and responses of 1,024 tokens, float32 parameters, bfloat16 products), except
for the model and the values in the first line of each plan.

`parameters`, `optimizer` and `reference` are present throughout a step; `other`
are further arguments, such as the parameters in the layout of sampling.
`repeated` is the ratio of the FLOPs that all chips compute to those that the
program needs.  TPU programs are compiled at the lowest effort (`--effort=-1`);
`compile s` was measured on a busy machine.  A chip's `limit` is its compiler's;
for a GPU it is JAX's share of 75%.
"""

SCALING = """## Weak scaling

The update with 8 responses per chip, on increasing numbers of chips,
`tensor=1`, from the collectives of the compiled programs at the bandwidth of
their links.  `efficiency` is the time on the fewest chips divided by the time
on these if chips never compute and send at the same time; `if hidden` assumes
that they always do.  Only bytes count: without latency, contention and slow
hosts this is a bound.  On a v5p torus XLA gathers parameters by all-reducing
padded slices, which sends twice the bytes of an all-gather; the table counts
those.
"""


def main(folder: str) -> None:
  """Reads a folder's plans and writes the page."""
  plans = {
    path.stem: json.loads(path.read_text())
    for path in sorted(pathlib.Path(folder).glob('*.json'))
  }
  weak = [plans.pop(name) for name in list(plans) if name.startswith('weak_')]
  weak.sort(key=lambda numbers: numbers['chips'])
  parts = [HEAD]
  for numbers in plans.values():
    title = f'## {numbers["model"]} on {numbers["topology"]}'
    parts += [title, plan_report.text(numbers)]
  if weak:
    parts += [SCALING, plan_report.markdown(plan_report.scaling_table(weak))]
  page = '\n\n'.join(part.strip() for part in parts) + '\n'
  (pathlib.Path(__file__).parent / 'plans.md').write_text(page)


if __name__ == '__main__':
  main(sys.argv[1])
