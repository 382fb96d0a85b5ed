"""A user's mistake: at most three lines with the remedy, status 2, no harm."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest
import scripts

from experiments import cli
from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.tasks import arithmetic, vocabulary

ROOT = pathlib.Path(__file__).parents[2]

# Flags after a sound configuration, and what the message must hold.
FLAGS = {
  'unknown flag': (['--confg=x'], ['--confg', 'did you mean --config?']),
  'unknown field': (
    ['--config.rollout.sample=3'],
    ['--config.rollout.sample:', "did you mean 'samples'?"],
  ),
  'unknown section': (
    ['--config.rolout.samples=3'],
    ['--config.rolout:', "did you mean 'rollout'?"],
  ),
  'unset parameter': (
    ['--config.algorithm.clipp=0.1'],
    ['--config.algorithm.clipp:', 'in the file'],
  ),
  'not a number': (
    ['--config.rollout.samples=many'],
    ['--config.rollout.samples=many', 'int'],
  ),
  'missing value': (['--workdir'], ['--workdir']),
  'no dashes': (['resume'], ["unexpected argument 'resume'", '--']),
  'algorithm': (
    ['--config.algorithm.name=grpoo'],
    ['config.algorithm', "'grpoo'", "did you mean 'grpo'?"],
  ),
  'greedy': (
    ['--config.rollout.temperature=0'],
    ['config.rollout.temperature is 0', 'above 0'],
  ),
  'does not divide': (
    ['--config.training.minibatches=3'],
    ['minibatches is 3', '4 prompts (config.rollout.prompts)', '[1, 2, 4]'],
  ),
  'does not divide a minibatch': (
    ['--config.training.micro_prompts=4'],
    [
      'micro_prompts is 4, which does not divide 2 prompts (of a minibatch: '
      'config.rollout.prompts, 4, divided by config.training.minibatches, 2)',
      '[1, 2]',
    ],
  ),
  'one sample': (
    ['--config.rollout.samples=1'],
    ['config.rollout.samples is 1', 'grpo needs at least 2'],
  ),
  'learning rate': (
    ['--config.optimizer.learning_rate=-1'],
    ['config.optimizer.learning_rate is -1', 'above 0'],
  ),
  'warm-up': (
    ['--config.optimizer.warmup_updates=40'],
    ['config.optimizer: warmup_updates is 40', '40 updates', 'to 39 or less'],
  ),
  'decay': (
    ['--config.warm_start.optimizer.decay=step'],
    ["config.warm_start.optimizer: decay is 'step'", "'cosine'"],
  ),
  'prompt over budget': (
    ['--config.prompts.max_tokens=3'],
    ['exceed 3 tokens', 'budget', "overlong='drop'"],
  ),
  'model too short': (
    ['--config.rollout.max_tokens=60'],
    ['60 response tokens', "model's 64", 'config.rollout.max_tokens'],
  ),
  'no model': (['--config.model.path=/no/model'], ['/no/model']),
  'characters': (
    ['--config.model.alphabet=0123456789='],
    ["tokenizer lacks: '+'"],
  ),
  'task': (
    ['--config.task.name=arithmatic'],
    ['config.task', "did you mean 'arithmetic'?"],
  ),
  'pair': (['--config.task.operations=(3,)'], ['config.task.operations']),
  'third of a pair': (
    ['--config.task.operations[2]=3'],
    ['--config.task.operations[2]: tuple index', 'set the whole tuple'],
  ),
  'reward file': (
    ['--config.rewards.symbols.name=/no/file.py:f'],
    ['config.rewards.symbols', '/no/file.py'],
  ),
  'reward': (
    ['--config.rewards.symbols.name=exact_mach'],
    ['config.rewards.symbols', "did you mean 'exact_match'?"],
  ),
  'temperature': (
    ['--config.evaluation.temperature=-1'],
    ['config.evaluation.temperature is -1', 'at least 0'],
  ),
  'top-p': (['--config.rollout.top_p=0'], ['config.rollout.top_p is 0']),
  'attention': (
    ['--config.model.attention=flash'],
    ["config.model.attention is 'flash'", 'cudnn'],
  ),
  'unset variable': (['--workdir='], ['--workdir is empty', 'not set']),
}

# Changes to the text of a sound configuration.
FILES = {
  'parameter': (
    ["name='grpo', kl", "name='grpo', clipp=0.1, kl"],
    ["grpo has no parameter 'clipp'", "did you mean 'clip'?"],
  ),
  'inert field': (
    ['config.checkpoints.every', 'config.checkpoint_every'],
    ['nothing reads config.checkpoint_every', 'config.checkpoints.every?'],
  ),
  'misspelt section': (
    ['config.rollout.update', 'config.rolout.update'],
    ['config.py, line', 'rollout'],
  ),
  'type': (
    ['minibatches = 2', "minibatches = 'two'"],
    ['config.py, line', 'minibatches'],
  ),
  'syntax': (
    ['return config', 'return (config'],
    ['config.py, line', 'Syntax'],
  ),
  'nothing returned': (
    ['return config', 'return None'],
    ['config.py', 'NoneType', 'base.get_config()'],
  ),
  'exit': (
    ['config.algorithm =', 'raise SystemExit(0)\n  config.algorithm ='],
    ['config.py, line', 'SystemExit: 0'],
  ),
  'no get_config': (
    ['def get_config', 'def got_config'],
    ['config.py has no function get_config()'],
  ),
  'no rewards': (
    ['config.algorithm =', 'config.rewards = {}\n  config.algorithm ='],
    ['config.rewards is empty'],
  ),
}


def refused(ended, *texts) -> None:
  """Asserts status 2 and nothing but a short message that holds `texts`."""
  assert ended.code == 2, ended
  assert ended.err.startswith('error: '), ended.err
  assert 1 <= len(ended.err.splitlines()) <= 3, ended.err
  for text in texts:
    assert text in ended.err, (text, ended.err)


def train(config, workdir, *flags):
  arguments = f'--config={config}', f'--workdir={workdir}', *flags
  return scripts.run('train', *arguments, cache=scripts.cache())


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return scripts.write_config(tmp_path_factory.mktemp('config'))


@pytest.mark.parametrize('name', FLAGS)
def test_wrong_flag(name, config, tmp_path):
  flags, texts = FLAGS[name]
  refused(train(config, tmp_path / 'run', *flags), *texts)
  # The corrected command finds the folder free.
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.mark.parametrize('name', FILES)
def test_wrong_configuration(name, tmp_path):
  (old, new), texts = FILES[name]
  assert old in scripts.CONFIG
  config = scripts.write_config(tmp_path, scripts.CONFIG.replace(old, new))
  refused(train(config, tmp_path / 'run'), *texts)


def test_configuration_missing(tmp_path):
  missing = tmp_path / 'missing.py'
  refused(train(missing, tmp_path / 'run'), f'no such file: {missing}')
  refused(train(tmp_path, tmp_path / 'run'), f'no such file: {tmp_path}')
  named = train('quickstrat', tmp_path / 'run')
  refused(named, 'did you mean experiments/configs/quickstart.py?')
  refused(scripts.run('train'), '--config is missing', 'quickstart.py')


def test_what_is_missing_is_named_by_its_absolute_path(config, tmp_path):
  for flag, name in (
    ('model.path={}', 'absent'),
    ('rewards.symbols.name={}:f', 'absent.py'),
    ('prompts.pass_rates={}', 'absent.jsonl'),
  ):
    flag = f'--config.{flag.format(name)}'
    ended = train(config, tmp_path / 'run', flag)
    refused(ended, str(pathlib.Path.cwd() / name))
  refused(train('absent.py', tmp_path), str(pathlib.Path.cwd() / 'absent.py'))


@pytest.mark.parametrize(
  'content, texts',
  [
    (None, ['rows.jsonl', 'No such file']),
    ('{"prompt": "1+1=", "answer": "2"}\n{"prompt"\n', ['rows.jsonl, line 2']),
    ('{"text": "1+1="}\n', ['rows.jsonl, line 1', 'prompt_column']),
    ('\n', ['rows.jsonl', 'no rows']),
  ],
)
def test_data_file(content, texts, tmp_path):
  rows = tmp_path / 'rows.jsonl'
  if content is not None:
    rows.write_text(content)
  task = f"config.task = dict(name='jsonl', train='{rows}', held_out='{rows}')"
  text = scripts.CONFIG.replace('  return', f'  {task}\n  return')
  config = scripts.write_config(tmp_path / 'config', text)
  ended = train(config, tmp_path / 'run', '--config.warm_start.steps=0')
  refused(ended, *texts)


@pytest.mark.parametrize(
  'vocab_size, change, texts',
  [
    (10, {}, ['tokenizer has ids up to 16', '10 rows']),
    (17, {'model_type': 'mamba'}, ["'mamba' is not supported", 'llama']),
    (17, {'num_hidden_layers': 2}, ['model.layers.1']),
  ],
)
def test_model_folder(vocab_size, change, texts, config, tmp_path):
  tokenizer = vocabulary.character_tokenizer(arithmetic.ALPHABET)
  shape = ModelConfig(vocab_size, 16, 32, 1, 2, max_length=64, tied=True)
  params = transformer.init(shape, jax.random.key(0))
  folder = tmp_path / 'model'
  folders.save(folder, shape, params)
  tokenizer.save_pretrained(folder)
  stored = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(stored | change))
  ended = train(config, tmp_path / 'run', f'--config.model.path={folder}')
  refused(ended, *texts)


def test_a_run_that_could_not_begin_leaves_the_folder_free(tmp_path):
  config = scripts.write_config(tmp_path / 'config', reward='import nothing\n')
  workdir = tmp_path / 'run'
  ended = train(config, workdir)
  refused(ended, 'reward.py does not load', "No module named 'nothing'")
  scripts.write_reward(tmp_path / 'config')
  ended = train(config, workdir, '--config.prompts.max_tokens=3')
  refused(ended, 'exceed 3 tokens')


def command(*arguments, option='-m', **settings):
  """As a user types it: a fresh interpreter, from the repository."""
  given = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | settings
  line = [sys.executable, option, *arguments]
  return subprocess.run(line, cwd=ROOT, text=True, timeout=120, **given)


def test_devices_that_do_not_start():
  environment = os.environ | {'JAX_PLATFORMS': 'absent'}
  ended = command('experiments.doctor', env=environment)
  assert ended.returncode == 1 and ended.stderr == ''
  *_, last = ended.stdout.splitlines()
  assert last.startswith('FAILED: devices: UserError: JAX starts no device')
  assert 'jaxlib' in ended.stdout and 'host memory' in ended.stdout


@pytest.mark.slow
def test_a_run_without_devices():
  quickstart = '--config=experiments/configs/quickstart.py'
  environment = os.environ | {'JAX_PLATFORMS': 'absent'}
  ended = command('experiments.train', quickstart, env=environment)
  assert ended.returncode == 2
  assert ended.stderr.startswith(
    'error: JAX starts no device for JAX_PLATFORMS=absent: Unable to initialize'
  )
  assert len(ended.stderr.splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [['train', '--help'], ['doctor']])
def test_nobody_reads_what_is_printed(arguments):
  """As behind `| head -1` once that has ended."""
  read, write = os.pipe()
  os.close(read)
  name, *rest = arguments
  ended = command(f'experiments.{name}', *rest, stdout=write)
  os.close(write)
  assert ended.stderr == '' and ended.returncode == 128 + signal.SIGPIPE


def test_errors_of_collectives_are_told_from_others():
  """Behind a jitted function those of gloo are no JaxRuntimeError."""
  lost = 'UNKNOWN: Gloo AllGather failed: Connection reset by peer'
  assert cli._is_of_runtime(ValueError(lost))
  assert cli._is_of_runtime(jax.errors.JaxRuntimeError(lost))
  assert not cli._is_of_runtime(ValueError('shapes differ'))


@pytest.mark.parametrize(
  'plugin, device, complains',
  [
    ('xla_cuda13', False, False),
    ('xla_cuda13', True, True),
    ('other', False, True),
  ],
)
def test_plugins_without_a_device_are_left_out(
  plugin, device, complains, tmp_path
):
  """A plug-in, as the extra `plan` installs one, that finds no library."""
  module = tmp_path / 'jax_plugins' / plugin
  module.mkdir(parents=True)
  (module / '__init__.py').write_text(
    'import jax\n'
    'def initialize():\n'
    "  if jax.config.jax_platforms != 'cpu':\n"
    "    raise RuntimeError('no cuDNN')\n"
  )
  metadata = tmp_path / 'plugin-1.dist-info'
  metadata.mkdir()
  (metadata / 'entry_points.txt').write_text(
    f'[jax_plugins]\n{plugin} = jax_plugins.{plugin}\n'
  )
  program = (
    'import jax; from experiments import cli; '
    f'cli._ACCELERATORS = ({str(tmp_path if device else "/absent")!r},); '
    'cli.run(lambda: print(jax.default_backend()))'
  )
  environment = os.environ | {'PYTHONPATH': str(tmp_path)}
  environment.pop('JAX_PLATFORMS', None)
  ended = command(program, option='-c', env=environment)
  assert ended.returncode == 0 and ended.stdout == 'cpu\n'
  assert ('no cuDNN' in ended.stderr) == complains
  assert complains or ended.stderr == ''


def test_nothing_is_said_of_a_missing_torch():
  hidden = "import sys; sys.modules['torch'] = None; "
  ended = command(f'{hidden}import experiments.build', option='-c')
  assert (ended.returncode, ended.stdout, ended.stderr) == (0, '', '')
  ended = command(f'{hidden}import transformers', option='-c')
  assert 'PyTorch was not found' in ended.stderr  # which is then filtered


def test_the_command_itself(tmp_path):
  quickstart = '--config=experiments/configs/quickstart.py'
  for arguments, text in (
    (('experiments.train', quickstart, '--config.stepz=1'), "mean 'steps'?"),
    (('experiments.evaluate', f'--workdir={tmp_path}'), 'holds no run'),
    (('experiments.export', f'--workdir={tmp_path}'), '--output is missing'),
  ):
    ended = command(*arguments)
    assert ended.returncode == 2 and ended.stdout == ''
    assert ended.stderr.startswith('error: ')
    assert len(ended.stderr.splitlines()) <= 3 and text in ended.stderr
