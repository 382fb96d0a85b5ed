"""Writes docs/plans.md from the files of `experiments.planning.plan --output`.

    python docs/make_plans.py FOLDER

FOLDER holds a JSON file per plan.  Files whose names begin with `weak_` are
plans of the update alone (`--update`); they make the table of weak scaling.
"""

import json
import pathlib
import sys

from experiments.planning import report

HEAD = """# Plans

<!-- written by docs/make_plans.py -->

Memory and time of an RL step on chips that were not there: compiled ahead of
time by `python -m experiments.planning.plan` on a CPU, from shapes alone.
Nothing here was measured on an accelerator.  The configuration is
`experiments/configs/qwen2_5_7b_tpu.py` (GRPO with a reference, prompts of 512
and responses of 1,024 tokens, float32 parameters, bfloat16 products), except
for the model and the numbers in the first line of each plan.

`parameters`, `optimizer` and `reference` are always present; `other` are
further arguments, such as the parameters in the layout of sampling.  `repeated`
is how many times more FLOPs all chips compute together than the program asks
for.  TPU programs are compiled at the compiler's lowest effort, on a busy
machine, which `compile s` reflects.  A chip's `limit` is what its compiler
allows; for a GPU, JAX's share of 75%.
"""

SCALING = """## Weak scaling

The update with 8 responses per chip, on more and more chips, `tensor=1`: from
the collectives of the compiled programs at the bandwidth of the links that they
use.  `efficiency` is the time on the fewest chips over the time on these, with
nothing sent while a chip computes; `if hidden` with everything sent meanwhile.
Only bytes count (no latency, no contention, no slow host), so this is a bound.
On a v5p torus XLA gathers parameters by all-reducing padded slices, which sends
twice the bytes of an all-gather; these bytes are counted.
"""

COLUMNS = (
  'chips',
  'prompts per update',
  'TFLOP/chip',
  'GB sent',
  'compute s',
  'network s',
  'efficiency',
  'if hidden',
)


def scaling_table(plans: list[dict]) -> list[list[str]]:
  """The update of each plan, the fewest chips first."""
  rows, first = [list(COLUMNS)], None
  for plan in plans:
    update = next(x for x in plan['programs'] if x['name'] == 'update')
    compute = max(update['compute'], update['traffic'])
    network = update['network']
    seconds = compute + network, max(compute, network)
    first = first or seconds
    rows.append(
      [
        str(plan['chips']),
        str(plan['prompts'] // plan['minibatches']),
        f'{update["computed"] / 1e12:.1f}',
        f'{sum(x["sent"] for x in update["collectives"]) / 1e9:.1f}',
        f'{compute:.3f}',
        f'{network:.3f}',
        *(f'{x / y:.0%}' for x, y in zip(first, seconds, strict=True)),
      ]
    )
  return rows


def main(folder: str) -> None:
  """Reads a folder's plans and writes the page."""
  plans = {
    path.stem: json.loads(path.read_text())
    for path in sorted(pathlib.Path(folder).glob('*.json'))
  }
  weak = [plans.pop(name) for name in list(plans) if name.startswith('weak_')]
  weak.sort(key=lambda plan: plan['chips'])
  parts = [HEAD]
  for plan in plans.values():
    title = f'## {plan["model"]} on {plan["topology"]}'
    parts += [title, report.text(plan)]
  if weak:
    parts += [SCALING, report.markdown(scaling_table(weak))]
  page = '\n\n'.join(part.strip() for part in parts) + '\n'
  (pathlib.Path(__file__).parent / 'plans.md').write_text(page)


if __name__ == '__main__':
  main(sys.argv[1])
