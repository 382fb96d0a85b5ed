"""Random values in random fields: a sound configuration, or a UserError."""

import contextlib
import runpy

import jax
import mistakes
import scripts
from fuzzing import ANY_TEXT, fuzz, result_or_refusal
from hypothesis import strategies as st

from experiments import build, checks, cli
from experiments.configs import base
from jaxrl_llm import sharding

FIELDS = [name for name, _ in checks.leaves(base.get_config())]
NUMBERS = (
  st.integers(-3, 12)
  | st.sampled_from([2**31, 2**63, 10**30, -(10**30), 0.5, 1e-300, 1e300])
  | st.sampled_from([float('nan'), float('inf'), -float('inf'), -0.0])
)
WORDS = st.sampled_from(
  ['', 'auto', 'grpo', 'linear', 'bfloat16', 'float32', 'shared', 'drop', 'xla']
  + ['/no/file', '/no/file.py:f', 'no.module:f', '{prompt}{hint}', '{0}', '{']
  + ['1', 'None', '-x']
) | ANY_TEXT.filter(lambda text: ':' not in text and '/' not in text)
LEAVES = NUMBERS | WORDS | st.none() | st.booleans()
KEYS = st.sampled_from(
  ['name', 'clip', 'kl', 'samples', 'hidden_size', 'num_heads', 'weight']
  + ['head_dim', 'max_length', 'window', 'rope', 'sliding', 'num_layers']
)
VALUES = (
  LEAVES
  | st.lists(LEAVES, max_size=3)
  | st.lists(LEAVES, max_size=3).map(tuple)
  | st.dictionaries(KEYS, LEAVES, max_size=3)
)
NAMES = ['grpo', 'rloo', 'ppo', 'trepo', 'dr_grpo', 'dapo', 'vine_ppo', 'gspo']
ALGORITHMS = st.dictionaries(
  st.sampled_from(
    ['clip', 'clip_high', 'kl', 'max_length', 'buffer', 'lam', 'name']
    + ['positions', 'delimiters', 'entropy', 'samples', 'count']
  ),
  VALUES,
  max_size=2,
).flatmap(
  lambda given: st.sampled_from(NAMES).map(lambda name: {'name': name, **given})
)


def use(config):
  """What a run does with a configuration before it loads or writes."""
  checks.check(config)
  model = build.outline(config.model)
  for section in (config.rollout, config.evaluation):
    given = {name: section[name] for name in ('samples', 'temperature')}
    build.generation(config, model, 0, **given)
  build.reward_parts(config)
  sharding.make_mesh(**config.mesh, devices=jax.devices()[:1])
  return 0


@fuzz(
  25,
  600,
  changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
  algorithm=st.none() | ALGORITHMS,
  architecture=st.none() | st.dictionaries(KEYS, VALUES, max_size=2),
)
def test_values_in_a_file(config_file, changes, algorithm, architecture):
  config = runpy.run_path(str(config_file))['get_config']()
  if architecture is not None:
    architecture = {**config.model.architecture.to_dict(), **architecture}
    changes = {'model.architecture': architecture, **changes}
  if algorithm is not None:
    changes = {'algorithm': algorithm, **changes}
  for name, value in changes.items():
    with contextlib.suppress(KeyError, TypeError):  # There is no such place.
      mistakes.change(config, {name: value})
  result_or_refusal(use, config.lock())


TEXTS = st.sampled_from(
  ['', '0', '1', '-1', '3', '2.5', '1e999', 'nan', '-inf', '9' * 5000, '0x10']
  + ['true', 'None', '(1, 2)', '(0.5,)', '()', '[', "'", '{"a": 1}', '{prompt}']
  + ['grpo', 'rloo', 'linear', '/no/file.py:f', '(' * 500, '1_0', '٣']
) | st.text(
  st.characters(exclude_categories=['Cs'], exclude_characters='\0:/'),
  max_size=12,
)
FLAGS = st.sampled_from(FIELDS) | st.sampled_from(
  ['', '.', 'rollout', 'rollout.', 'rollout.sample', 'rollout.samples.x']
  + ['algorithm.name', 'algorithm.kl', 'algorithm.clipp', 'steps.0', 'model..x']
  + ['rewards.symbols.name', 'rewards.correct.weight', 'task.operations']
  + ['task.operations[0]', 'task.operations[9]', 'model.architecture.num_heads']
)


@fuzz(
  40,
  1000,
  given=st.lists(st.tuples(FLAGS, TEXTS), min_size=1, max_size=3),
  more=st.sampled_from([[], ['-x'], ['word'], ['--config']]),
)
def test_values_in_flags(config_file, given, more):
  def script():
    cli.define_config_flag()
    cli.run(lambda: use(cli.config()))

  arguments = [f'--config.{name}={text}' for name, text in given]
  ended = scripts.call(script, f'--config={config_file}', *arguments, *more)
  assert ended.code == 0 or ended.err.startswith('error: '), ended
  if ended.code:
    mistakes.assert_refused(ended)
