"""Do the tests notice?  Estimators broken on purpose, one line at a time.

The slow form copies the package, breaks it and expects a test file to fail;
the fast one keeps the table in step with the sources.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = pathlib.Path('jaxrl_llm/estimators')
TESTS = pathlib.Path('tests/estimators')


class Mutation(NamedTuple):
  """What is broken: in a source file, and which test file has to see it."""

  source: str
  old: str
  new: str
  test: str


MUTATIONS = {
  'leave-one-out scale upside down': Mutation(
    'baselines.py',
    'scale = count / jnp.maximum(count - 1, 1)',
    'scale = jnp.maximum(count - 1, 1) / jnp.maximum(count, 1)',
    'baselines_test.py',
  ),
  'deviation with G in its denominator': Mutation(
    'baselines.py',
    'squares.sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)',
    'squares.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)',
    'baselines_test.py',
  ),
  'equal rewards divided by their rounding': Mutation(
    'baselines.py',
    'return jnp.where(varies(advantages, valid), standardized, 0.0)',
    'return standardized',
    'baselines_test.py',
  ),
  'own sample in the weighted baseline': Mutation(
    'baselines.py',
    'jnp.eye(samples, dtype=bool)',
    'jnp.zeros((samples, samples), bool)',
    'baselines_test.py',
  ),
  'running mean that forgets too fast': Mutation(
    'baselines.py',
    'decay * value + (1 - decay) * mean',
    '(1 - decay) * value + decay * mean',
    'baselines_test.py',
  ),
  'hold takes the next knot': Mutation(
    'credit.py',
    '  start, _ = _segment(where, mask)\n',
    '  _, start = _segment(where, mask)\n'
    '  start = jnp.minimum(start, mask.shape[2] - 1)\n',
    'credit_test.py',
  ),
  'GAE takes the value of another state': Mutation(
    'credit.py',
    'xs = (rewards, known.values, ',
    'xs = (rewards, jnp.roll(known.values, -1, axis=2), ',
    'credit_test.py',
  ),
  'later advantages without γ': Mutation(
    'credit.py',
    '    advantage = gamma * advantage\n',
    '',
    'credit_test.py',
  ),
  'whitening over responses': Mutation(
    'credit.py',
    'per_token = advantages.shape == rollouts.mask.shape',
    'per_token = False',
    'credit_test.py',
  ),
  'sign of the KL to go': Mutation(
    'credit.py',
    'return advantages - current(coefficient, rollouts) * token_kl(rollouts)',
    'return advantages + current(coefficient, rollouts) * token_kl(rollouts)',
    'credit_test.py',
  ),
  'clip low and high swapped': Mutation(
    'token_losses.py',
    'inside = jnp.clip(rho, 1.0 - low, 1.0 + high)',
    'inside = jnp.clip(rho, 1.0 - high, 1.0 + low)',
    'token_losses_test.py',
  ),
  'dual clip on positive advantages': Mutation(
    'token_losses.py',
    'return jnp.where(advantages < 0, bounded, loss)',
    'return bounded',
    'token_losses_test.py',
  ),
  'gradient through a clipped weight': Mutation(
    'token_losses.py',
    '    weight = jax.lax.stop_gradient(weight)\n',
    '',
    'token_losses_test.py',
  ),
  'the better of two value errors': Mutation(
    'token_losses.py',
    'error = jnp.maximum(error,',
    'error = jnp.minimum(error,',
    'token_losses_test.py',
  ),
  'k3 of the other direction': Mutation(
    'token_losses.py',
    'difference = ref_log_probs - log_probs',
    'difference = log_probs - ref_log_probs',
    'token_losses_test.py',
  ),
  'sequence ratio without 1/T': Mutation(
    'ratios.py',
    '_exp(total / length)',
    '_exp(total)',
    'ratios_test.py',
  ),
  'gradient through the pair': Mutation(
    'ratios.py',
    'both = jax.lax.stop_gradient(total + partner(total))',
    'both = total + partner(total)',
    'ratios_test.py',
  ),
  'what is not kept counts in N': Mutation(
    'compose.py',
    'mask, counted = batch.mask & batch.valid, batch.valid',
    'mask, counted = batch.mask & batch.valid, jnp.ones_like(batch.valid)',
    'weights_test.py',
  ),
  'branches count in N': Mutation(
    'compose.py',
    '    counted &= batch.whole\n',
    '',
    'compose_test.py',
  ),
  'a branch trains what it inherited': Mutation(
    'compose.py',
    'rollouts.mask & (time >= rollouts.forked_at)',
    'rollouts.mask & (time >= 0)',
    'compose_test.py',
  ),
  'a continuation in its own baseline': Mutation(
    'trees.py',
    'rest = _of_fork(rollouts, total + onward) - rewards\n',
    'rest = _of_fork(rollouts, total + onward)\n',
    'trees_test.py',
  ),
  'what is behind a fork weighs as before it': Mutation(
    'trees.py',
    'jnp.cumprod(1.0 / (1.0 + count), axis=2)',
    '1.0 / (1.0 + count)',
    'trees_test.py',
  ),
  'a fork is worth its branches alone': Mutation(
    'trees.py',
    'return (total + value) / (count + 1), value',
    'return jnp.where(count > 0, total / jnp.maximum(count, 1), value), value',
    'trees_test.py',
  ),
  'branches that are scored without what shapes responses': Mutation(
    'advantages.py',
    'return needs._replace(branches=needs.branches._replace(shaping=shaping))',
    'return needs._replace(branches=needs.branches._replace(shaping=inner))',
    'values_test.py',
  ),
  'a critic bootstraps from itself': Mutation(
    'values.py',
    'return Known(rollouts.branch_values, rollouts.values, everywhere, fresh)',
    'return Known(rollouts.values, rollouts.values, everywhere, everywhere)',
    'values_test.py',
  ),
  'the padded width for a constant': Mutation(
    'weights.py',
    'float(max_length)',
    'float(mask.shape[2])',
    'weights_test.py',
  ),
  'KL coefficient steered by batches, not responses': Mutation(
    'advantages.py',
    'value * (1.0 + jnp.minimum(count / horizon, 1.0) * error)',
    'value * (1.0 + error / horizon)',
    'advantages_test.py',
  ),
  'the floor under the wrong response': Mutation(
    'preferences.py',
    'preferred = jnp.where(batch.advantages > 0,',
    'preferred = jnp.where(batch.advantages < 0,',
    'preferences_test.py',
  ),
  'a score before the last token': Mutation(
    'preferences.py',
    'numbers = jnp.arange(1, mask.shape[2] + 1)[None, None]',
    'numbers = jnp.arange(mask.shape[2], 0, -1)[None, None]',
    'preferences_test.py',
  ),
  'DAPO with one clip': Mutation(
    'algorithms.py',
    '    clipped(clip, clip_high),\n    token_mean(),\n    keep',
    '    clipped(clip),\n    token_mean(),\n    keep',
    'algorithms_test.py',
  ),
  'VAPO with one λ': Mutation(
    'actor_critic.py',
    'lambda_return(1.0, 1.0)',
    'lambda_return(1.0, 0.95)',
    'actor_critic_test.py',
  ),
  'RestEM averages over tokens': Mutation(
    'supervised_preference.py',
    '    sequence_sum(),\n    keep=',
    '    token_mean(),\n    keep=',
    'supervised_preference_test.py',
  ),
}
# What the fuzz of masks has to see: (source, old, new).
MASKS = {
  'a sum over responses with what is masked': (
    'weights.py',
    'return lambda mask, valid: mask / _count(valid)\n',
    'return lambda mask, valid: jnp.ones_like(mask) / _count(valid)\n',
  ),
  'a mean over responses with what is masked': (
    'weights.py',
    'return mask / (_count(valid) * lengths)',
    'return jnp.ones_like(mask) / (_count(valid) * lengths)',
  ),
  'a mean over tokens with what is masked': (
    'weights.py',
    'mask / jnp.maximum(mask.sum(keepdims=True), 1)',
    'jnp.ones_like(mask) / jnp.maximum(mask.sum(keepdims=True), 1)',
  ),
  'weights of what is not valid': (
    'compose.py',
    'mask, counted = batch.mask & batch.valid, batch.valid',
    'mask, counted = batch.mask, batch.valid',
  ),
  'what is not valid counts in a mean of a group': (
    'baselines.py',
    '  count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)\n  return',
    '  count = jnp.asarray(x.shape[1])\n  return',
  ),
  'what is not valid makes a group vary': (
    'baselines.py',
    '  highest = jnp.where(valid, x, -jnp.inf)',
    '  valid = jnp.ones_like(valid)\n  highest = jnp.where(valid, x, -jnp.inf)',
  ),
  # Of a product with a mask XLA makes a `where`: it would not be seen.
  'garbage less itself': (
    'types.py',
    'jnp.where(mask, x, 0.0)\n\n\ndef blank_rollouts',
    'x - jnp.where(mask, 0.0, x)\n\n\ndef blank_rollouts',
  ),
  'rewards of what is not valid': (
    'types.py',
    'rewards=blank(valid, rollouts.rewards)',
    'rewards=rollouts.rewards',
  ),
  'garbage in what the model says': (
    'compose.py',
    'log_probs=inside(outputs.log_probs)',
    'log_probs=outputs.log_probs',
  ),
  'garbage of what is not valid in what the model says': (
    'compose.py',
    'inside = functools.partial(blank, batch.mask & batch.valid)',
    'inside = functools.partial(blank, batch.mask)',
  ),
  'a gradient of what is masked': (
    'compose.py',
    'return jnp.sum(batch.weights * token_loss.apply(outputs, batch))',
    'loss = jnp.sum(batch.weights * token_loss.apply(outputs, batch))\n'
    '    return loss + jnp.clip(jnp.nan_to_num(given[0]), -1.0, 0.0).sum()',
  ),
  'equal rewards divided by their rounding, in a group': (
    'baselines.py',
    'return jnp.where(varies(advantages, valid), standardized, 0.0)',
    'return standardized',
  ),
  'the rounding of equal rewards, without siblings': (
    'baselines.py',
    'centred = scale * (advantages - group_mean(advantages, valid))\n'
    '    return jnp.where(varies(advantages, valid), centred, 0.0)',
    'return scale * (advantages - group_mean(advantages, valid))',
  ),
  # A bool by 0 is 0, as XLA divides.
  '0/0 where no response is valid': (
    'weights.py',
    'return lambda mask, valid: mask / _count(valid)\n',
    'return lambda mask, valid: (\n'
    '    jnp.where(mask, 1.0, 0.0) / valid.sum(keepdims=True)\n'
    '  )\n',
  ),
  '0/0 in an empty response': (
    'weights.py',
    'return mask / (_count(valid) * lengths)',
    'lengths = mask.sum(axis=2, keepdims=True)\n'
    '    return jnp.where(mask, 1.0, 0.0) / (_count(valid) * lengths)',
  ),
  '0/0 where no token is': (
    'weights.py',
    'mask / jnp.maximum(mask.sum(keepdims=True), 1)',
    'jnp.where(mask, 1.0, 0.0) / mask.sum(keepdims=True)',
  ),
  "0/0 in an empty response's ratio": (
    'ratios.py',
    'return total, jnp.maximum(mask.sum(axis=2, keepdims=True), 1)',
    'return total, mask.sum(axis=2, keepdims=True)',
  ),
}
MUTATIONS |= {
  name: Mutation(*found, 'fuzz_estimators_test.py')
  for name, found in MASKS.items()
}
every_mutation = pytest.mark.parametrize('name', MUTATIONS)


@every_mutation
def test_the_table_fits_the_sources(name):
  mutation = MUTATIONS[name]
  source = (ROOT / SOURCES / mutation.source).read_text()
  assert source.count(mutation.old) == 1
  compile(source.replace(mutation.old, mutation.new), mutation.source, 'exec')
  assert (ROOT / TESTS / mutation.test).is_file()


def copy(folder):
  for name in ('jaxrl_llm', 'tests'):
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, folder / name, ignore=ignore)
  shutil.copy(ROOT / 'setup.cfg', folder)


def run(folder, *tests):
  command = [sys.executable, '-m', 'pytest', '-n0', '-x', '-q', '--tb=line']
  paths = [str(TESTS / test) for test in tests]
  done = subprocess.run(
    [*command, '-p', 'no:cacheprovider', *paths],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(folder)},
    capture_output=True,
    text=True,
    timeout=600,
  )
  return done.returncode, done.stdout


@pytest.mark.slow
def test_unbroken_the_copy_passes(tmp_path):
  copy(tmp_path)
  tests = {mutation.test for mutation in MUTATIONS.values()}
  status, output = run(tmp_path, *sorted(tests))
  assert status == 0, output


@pytest.mark.slow
@every_mutation
def test_mutation_is_caught(name, tmp_path):
  """By a test that fails: not because the broken line does not run."""
  mutation = MUTATIONS[name]
  copy(tmp_path)
  path = tmp_path / SOURCES / mutation.source
  path.write_text(path.read_text().replace(mutation.old, mutation.new))
  status, output = run(tmp_path, mutation.test)
  assert status == 1, output
  crash = r'\b(Name|Type|Attribute|Import|Syntax|Index|Key)Error\b'
  assert not re.search(crash, output), output
