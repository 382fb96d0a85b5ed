"""Every configuration of a training can be read, checked and started."""

import importlib
import json
import pathlib

import jax
import pytest
import scripts
from ml_collections import ConfigDict

from benchmarks import job
from experiments import (
  build,
  checks,
  data,
  preference,
  rest_em,
  reward_model,
  sft,
  train,
)
from experiments.configs import base
from jaxrl_llm import naming, sharding
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import folders

FOLDER = pathlib.Path(base.__file__).parent
NAMES = sorted(
  path.stem
  for path in FOLDER.glob('*.py')
  if path.stem not in ('__init__', 'base')
  and not path.stem.startswith(('audit_', 'compare_'))
)


def get(name):
  """A configuration as the command line gives it."""
  config = importlib.import_module(f'experiments.configs.{name}').get_config()
  return config.lock()


def script(config):
  """The script that learns by a configuration's algorithm."""
  scripts_of = {
    'sft': sft,
    'dpop': preference,
    'rest_em': rest_em,
    'reward_model': reward_model,
  }
  return scripts_of.get(config.algorithm.name, train)


@pytest.mark.parametrize('name', NAMES)
def test_configuration_is_sound(name):
  config = get(name)
  check = script(config).SCRIPT.check
  check(config)
  # A reward model is a folder that another run leaves.
  given = config.copy_and_resolve_references().unlock()
  for part, spec in config.rewards.items():
    if spec.name == 'reward_model':
      del given.rewards[part]
  assert not given.rewards or build.reward_parts(given)
  naming.find(data, config.task.name, 'config.task')
  # What a run stores and evaluation reads back.
  stored = ConfigDict(json.loads(json.dumps(config.to_dict())))
  check(stored)
  module = importlib.import_module(f'experiments.configs.{name}')
  assert f'python -m {script(config).__name__}' in module.__doc__
  assert f'--config=experiments/configs/{name}.py' in module.__doc__


def test_every_field_is_read():
  # A field that nothing reads would be a setting without effect.  Sections
  # whose fields are keyword arguments are read as a whole.
  whole = ('optimizer.', 'critic.optimizer.', 'warm_start.optimizer.', 'mesh.')
  source = ''.join(
    path.read_text()
    for path in FOLDER.parent.glob('*.py')
    if path.name != 'checks.py'
  )
  for name, _ in checks.leaves(base.get_config()):
    field = name.rpartition('.')[2]
    if not name.startswith(whole):
      assert f'.{field}' in source or f"['{field}']" in source, name
  arguments = set(base.optimizer(1.0))
  assert arguments == set(base.get_config().warm_start.optimizer)
  build.optimizer(base.get_config().optimizer, 10)
  sharding.make_mesh(**base.get_config().mesh, devices=jax.devices()[:1])


def qwen2_folder(folder) -> None:
  """Writes a tiny random Qwen2 model with a chat tokenizer like its own."""
  tokenizer = job.tokenizer(600)
  tokenizer.add_special_tokens(
    {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'}
  )
  tokenizer.chat_template = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
  )
  # More rows than tokens, as in the published model.
  shape = dict(family='qwen2', tied=True, query_bias=True, max_length=512)
  config = ModelConfig(640, 32, 64, 2, 4, num_kv_heads=2, **shape)
  params = transformer.init(config, jax.random.key(0))
  folders.save(folder, config, params, tokenizer)


@pytest.mark.slow
def test_gsm8k_runs_on_a_tiny_qwen2(shared, tmp_path):
  for split in ('train', 'test'):
    source = shared / 'data' / 'gsm8k' / f'{split}.jsonl'
    lines = source.read_text().splitlines(keepends=True)[:200]
    (tmp_path / f'{split}.jsonl').write_text(''.join(lines))
  qwen2_folder(tmp_path / 'model')
  settings = {
    'model.path': tmp_path / 'model',
    'task.path': tmp_path,
    'task.held_out': 8,
    'prompts.max_tokens': 400,
    'rollout.prompts': 2,
    'rollout.samples': 2,
    'rollout.max_tokens': 12,
    'rollout.log_prob_tolerance': 0.0,
    'steps': 2,
    'optimizer.warmup_updates': 0,
    'evaluation.prompts': 4,
    'evaluation.batch': 4,
  }
  flags = [f'--config.{name}={value}' for name, value in settings.items()]
  config, workdir = FOLDER / 'gsm8k_grpo.py', tmp_path / 'run'
  ended = scripts.run(
    'train', f'--config={config}', f'--workdir={workdir}', *flags
  )
  assert ended.code == 0, ended.err
  said, records = ' '.join(ended.err.split()), scripts.records(workdir)
  assert 'qwen2 model' in said and 'over budget' in said
  # Nothing is that exact: the trainer's log-probabilities take the sampler's
  # place, as they do where bfloat16 makes them differ.
  assert 'the trainer recomputes' in said
  assert [record['step'] for record in records] == [0, 1, 2]
  assert 0 < records[1]['completions/mean_length'] <= 12
  assert 'eval/rewards/correct' in records[0] and 'kl' in records[2]

  assert folders.load(workdir / 'hf')[0].family == 'qwen2'
  assert folders.load_tokenizer(workdir / 'hf').chat_template
