"""The table and the figure of a comparison, from made-up runs."""

import numpy as np
from ml_collections import ConfigDict

from experiments.studies import compare_report
from jaxrl_llm import evaluation

CONFIG = ConfigDict(
  dict(
    init='Init SFT',
    tokens=1000,
    evaluations=4,
    seeds=(0, 1, 2),
    metrics=(
      dict(name='eval/right', title='accuracy, %', scale=100, digits=1),
      dict(name='eval/kl', title='KL, nats', scale=1, digits=3),
    ),
    methods=(
      dict(label='grpo', title='GRPO', algorithm=dict(name='grpo')),
      dict(label='rloo', title='RLOO', algorithm=dict(name='rloo')),
      dict(label='ppo', title='PPO', algorithm=dict(name='ppo')),
    ),
  )
)


def run(label, seed, ends, updates=10, **more):
  curve = {
    'tokens': [0, 400, 800, 1100],
    'updates': [0, updates * 4 // 11, updates * 8 // 11, updates],
    'eval/right': [0.25, 0.35, 0.55, ends],
  }
  return {
    'label': label,
    'seed': seed,
    'curve': curve | more,
    'tokens': 1100,
    'updates': updates,
    'seconds_per_update': 0.25,
    'rollout_share': 0.4,
    'update_bytes': 3 * 2**20,
    'cores': 1,
  }


def results():
  ends = [0.8, 0.85, 0.9]
  kl = {'eval/kl': [0.0, 0.01, 0.02, 0.03]}
  runs = [run('grpo', i, end, **kl) for i, end in enumerate(ends)]
  runs += [run('rloo', 0, 0.7, updates=22)]
  return {
    'runs': {f'{r["label"]}-{r["seed"]}': r for r in runs},
    'failures': {'ppo-1': 'out of memory (status 1)'},
  }


def rows(text):
  lines = [line for line in text.splitlines() if line.startswith('|')]
  return [[cell.strip() for cell in line[1:-1].split('|')] for line in lines]


def test_table_and_figure(tmp_path):
  text = compare_report.table(CONFIG, results())
  header, _, init, grpo, rloo = rows(text)
  assert header[:5] == [
    'method', 'seeds', 'accuracy, %', 'at half the tokens', 'KL, nats'
  ]  # fmt: skip
  assert init[:5] == ['Init SFT', '', '25.0', '', '0.000']
  mean, low, high = evaluation.bootstrap_few(np.array([80.0, 85.0, 90.0]))
  assert mean == 85.0 and low < 80.0
  # A quarter of the way from 400 to 800 tokens: 35 + 20 / 4.
  assert grpo == [
    'GRPO', '3 of 3', f'85.0 [{low:.1f}, {high:.1f}]', '40.0', '0.030',
    '110', '10', '0.250', '40 %', '3.0',
  ]  # fmt: skip
  assert rloo[:7] == ['RLOO', '1 of 3', '70.0', '40.0', '–', '50', '22']
  assert '\nfailed: ppo-1: out of memory (status 1)\n' in text
  assert 'to 1,000;' in text and 'each run on 1 core(s) of its own' in text
  empty = compare_report.table(CONFIG, {'runs': {}, 'failures': {}})
  assert len(rows(empty)) == 2
  compare_report.figure(tmp_path / 'figure.png', CONFIG, results())
  assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')
