"""The training script: what it writes, how it ends, when it stops."""

import importlib
import json
import os
import pathlib
import signal
import time
import types

import numpy as np
import pytest
import scripts
from mistakes import assert_refused

from experiments import run, train
from jaxrl_llm.runs.folder import open_run

FLAGS = ['--config.warm_start.steps=0']


def test_the_defaults_say_nothing_to_worry_about(tmp_path):
  """With nothing set but the model, the task, the reward and the algorithm."""
  lines = scripts.CONFIG.splitlines(keepends=True)
  first = next(i for i, x in enumerate(lines) if 'config.prompts' in x)
  text = ''.join(lines[:first]).replace('max_length=64', 'max_length=512')
  text += (
    "  config.rewards = dict(correct=dict(name='arithmetic_answer'))\n"
    "  config.algorithm = dict(name='grpo')\n"
    '  config.steps = 10\n'  # of which the mean is judged
    '  return config\n'
  )
  config = scripts.write_config(tmp_path, text)
  ended = scripts.train(tmp_path / 'run', config).wait()
  assert ended.code == 0, ended.err
  for worry in ('sampler and trainer', 'recomputes', 'effective_samples'):
    assert worry not in ended.err, ended.err


def test_records():
  whole = scripts.undisturbed()
  records = scripts.records(whole)
  steps = [record['step'] for record in records]
  assert steps == list(range(1, scripts.TOTAL + 1))
  # Equal bits mean nothing if the numbers do not move.
  assert len({r['reward'] for r in records if 'reward' in r}) > 15
  evaluated = [r['step'] for r in records if 'eval/reward' in r]
  evaluations = range(scripts.WARM, scripts.TOTAL + 1, scripts.EVERY)
  assert evaluated == list(evaluations)
  # Adding up what the samples say gives what the record says.
  samples = scripts.records(whole, 'samples.jsonl')
  held = [sample for sample in samples if sample['advantage'] is None]
  assert {s['step'] for s in held} == set(evaluated)
  for sample in held:
    parts = sample['rewards']
    total = parts['symbols'] + 0.5 * parts['correct']
    np.testing.assert_allclose(sample['reward'], total, rtol=1e-12)
  records = records[scripts.WARM - 1 :]
  assert records[0]['num_tokens'] == 0
  for before, after in zip(records, records[1:], strict=False):
    tokens = after['num_tokens'] - before['num_tokens']
    count = scripts.PROMPTS * scripts.SAMPLES
    mean = after['completions/mean_length']
    np.testing.assert_allclose(tokens, count * mean, rtol=1e-6)
    total = after['rewards/symbols/mean'] + 0.5 * after['rewards/correct/mean']
    np.testing.assert_allclose(after['reward'], total, rtol=1e-6)
    assert after['log_prob_difference/max'] < 1e-5 and after['skipped'] == 0
  # The reference is the policy that RL began with.
  assert records[1]['kl'] < 1e-3 < records[-1]['kl']
  env = json.loads((whole / 'starts.jsonl').read_text())
  assert env['command'][1:] and env['device_count'] == 1


@pytest.mark.parametrize('moment', ['__init__', 'train', 'finish'])
def test_an_interrupt_ends_in_one_line(moment, tmp_path, monkeypatch, capsys):
  def interrupted(self, *arguments):
    raise KeyboardInterrupt

  for name in ('__init__', 'train', 'finish'):
    ended = interrupted if name == moment else lambda self, *arguments: None
    monkeypatch.setattr(run.Run, name, ended)
  first = types.SimpleNamespace(step=0)
  monkeypatch.setattr(run.Run, 'schedule', first, raising=False)
  config = importlib.import_module('experiments.configs.quickstart')
  config, workdir = config.get_config().lock(), tmp_path / 'run'
  assert train.train(config, workdir) == 128 + signal.SIGINT
  said = 'interrupted: --resume continues from the last checkpoint\n'
  assert capsys.readouterr().err == said
  # The folder is free.
  with open_run(workdir, True, config.to_dict()) as folder:
    assert folder.resuming


@pytest.mark.slow
def test_a_stop_is_heard_while_rewards_hang(tmp_path):
  """In the first step of RL, after an evaluation."""
  hang = (
    f'  if calls > {scripts.HELD_OUT}:\n'
    '    open(__file__ + ".hangs", "w").write(str(os.getpid()))\n'
    '    time.sleep(1000)\n'
  )
  body = 'import os\n' + scripts.REWARD.replace('  # BREAK\n', hang)
  text = scripts.CONFIG.replace(
    "symbols=dict(name='REWARD:symbols')",
    "symbols=dict(name='REWARD:symbols', workers=1, timeout=2000.0)",
  )
  config = scripts.write_config(tmp_path / 'config', text, body)
  workdir, hangs = tmp_path / 'run', config.with_name('reward.py.hangs')

  script = scripts.train(workdir, config, *FLAGS)
  scripts.wait_until(hangs.exists, script)
  time.sleep(5.0)  # The device is told all it has to do.
  began = time.monotonic()
  script.signal(signal.SIGTERM)
  ended = script.wait()
  assert ended.code == 128 + signal.SIGTERM, ended
  assert 'after step 0' in ended.err and 'Traceback' not in ended.err
  # Saving takes most of it.
  assert time.monotonic() - began < 20.0
  assert scripts.steps_written(workdir) == 1
  assert not (workdir / 'checkpoints').exists()  # Nothing was learned.
  worker = pathlib.Path('/proc', hangs.read_text(), 'cmdline')
  assert not worker.exists() or worker.read_bytes() == b''


@pytest.mark.slow
def test_diverging_run_ends(config_file, tmp_path):
  workdir = tmp_path / 'run'
  rate = '--config.warm_start.optimizer.learning_rate=1e38'
  ended = scripts.train(workdir, config_file, rate).wait()
  texts = '3 updates in a row were not finite', 'optimizer.learning_rate'
  assert_refused(ended, *texts)
  skipped = [record['skipped'] for record in scripts.records(workdir)]
  assert skipped == [0, 1, 2, 3]
  assert os.listdir(workdir / 'checkpoints') == ['00000004']
