"""Functions named by a configuration."""

import types

import optax
import pytest
from mistakes import refused

from jaxrl_llm import naming
from jaxrl_llm.errors import UserError

module = types.ModuleType('shapes')
exec(  # Functions whose module is `shapes`, as `find` wants them.
  'from math import sqrt\n'
  'def square(side, *, colour="red"):\n  return side * side, colour\n'
  'def disc(radius=1.0, tokenizer=None):\n  return radius, tokenizer\n'
  'def _hidden():\n  pass\n'
  'number = 3\n',
  module.__dict__,
)


def test_call_passes_what_is_named():
  assert naming.call(module, dict(name='square', side=3), 'f') == (9, 'red')
  spec = dict(name='square', side=2, colour='blue')
  assert naming.call(module, spec, 'f') == (4, 'blue')
  assert spec == dict(name='square', side=2, colour='blue')


def test_several_modules_are_searched_in_turn():
  other = types.ModuleType('solids')
  exec('def ball(radius):\n  return radius', other.__dict__)
  both = (module, other)
  assert naming.call(both, dict(name='ball', radius=4), 'f') == 4
  assert naming.call(both, dict(name='disc'), 'f')[0] == 1.0
  with pytest.raises(UserError, match='ball, disc, square'):
    naming.find(both, 'cone', 'f')


def test_an_argument_may_be_a_part_with_a_name():
  inner = dict(name='disc', radius=dict(name='disc', radius=3.0))
  spec = dict(name='square', side=1, colour=inner)
  found = naming.call(module, spec, 'f', parts=module)
  assert found == (1, ((3.0, None), None))
  # Where there are no parts it is what it is.
  assert naming.call(module, spec, 'f') == (1, inner)
  with pytest.raises(UserError, match=r"f.colour: disc has no parameter 'x'"):
    naming.call(
      module, spec | {'colour': dict(name='disc', x=1)}, 'f', parts=module
    )


def test_extra_goes_to_functions_that_take_it():
  assert naming.call(module, dict(name='disc'), 'f', tokenizer='t') == (
    1.0,
    't',
  )
  spec = dict(name='square', side=1)
  assert naming.call(module, spec, 'f', tokenizer='t') == (1, 'red')


def test_a_function_of_a_module_that_can_be_imported():
  assert naming.find(module, 'optax.losses:l2_loss', 'f') is optax.l2_loss
  with pytest.raises(UserError, match="f: no function 'l3' in optax\nit has"):
    naming.find(module, 'optax:l3', 'f')
  for absent in ('optx', 'optax.loses', 'optax.loses.deeper'):
    with pytest.raises(UserError, match=f'no such Python file: {absent}\n'):
      naming.find(module, f'{absent}:l2_loss', 'f')


@pytest.mark.parametrize(
  'name',
  [
    'os:system',
    'builtins:exec',
    'os.path:join',
    'multiprocessing.util:spawnv_passfds',
    # What other modules have imported of it.
    'exporting.py:system',
    'exporting.py:Popen',
    'exporting.py:choice',
  ],
)
def test_functions_of_the_standard_library_are_refused(name, tmp_path):
  (tmp_path / 'exporting.py').write_text(
    'from os import system\n'
    'from random import choice\n'
    'from subprocess import Popen\n'
  )
  where = name.replace('exporting.py', str(tmp_path / 'exporting.py'))
  with refused('f: ', ' of the standard library\n'):
    naming.find(module, where, 'f')


def test_a_users_file_may_be_called_as_a_module_of_the_standard_library(
  tmp_path, monkeypatch
):
  (tmp_path / 'code.py').write_text(
    'import functools\n'
    'def double(x):\n'
    '  return 2 * x\n'
    'four = functools.partial(double, 2)\n'
    'cached = functools.cache(double)\n'
  )
  monkeypatch.chdir(tmp_path)
  assert naming.find(module, 'code.py:double', 'f')(3) == 6
  assert naming.find(module, 'code.py:four', 'f')() == 4
  assert naming.find(module, 'code.py:cached', 'f')(1) == 2


def test_the_file_of_a_name(tmp_path, monkeypatch):
  (tmp_path / 'my_rewards.py').write_text('')
  monkeypatch.syspath_prepend(tmp_path)
  assert naming.file_of('square') is None
  assert naming.file_of('no/such.py:f') == 'no/such.py'
  assert naming.file_of('my_rewards:f') == str(tmp_path / 'my_rewards.py')
  assert naming.file_of('optax.losses:f') == optax.losses.__file__
  for absent in ('optx', 'optax.loses.deeper', 'a/b'):
    assert naming.file_of(f'{absent}:f') == absent


def test_a_module_whose_own_imports_fail_says_which(tmp_path, monkeypatch):
  (tmp_path / 'needy_module.py').write_text('import not_installed_here')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match='does not load\n.*not_installed_here'):
    naming.find(module, 'needy_module:f', 'f')


@pytest.mark.parametrize(
  'spec, texts',
  [
    (dict(name='squre', side=1), ["no 'squre' in shapes", "'square'"]),
    (dict(name='_hidden'), ["no '_hidden'", 'disc, square']),
    (dict(name='sqrt'), ["no 'sqrt'"]),  # imported, not the module's own
    (dict(name='number'), ["no 'number'"]),
    (dict(side=1), ["config.shape has no 'name'"]),
    (dict(name='square'), ['square needs side']),
    (dict(name='square', sdie=1), ["no parameter 'sdie'", "mean 'side'?"]),
    (dict(name='disc', x=1), ["no parameter 'x'", 'radius, tokenizer']),
  ],
)
def test_refusals(spec, texts):
  with refused('config.shape', *texts):
    naming.call(module, spec, 'config.shape')
