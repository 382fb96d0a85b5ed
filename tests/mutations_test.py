"""Checks that tests fail when the package is broken, one line at a time.

The slow form breaks a copy of the package and expects one test file to fail;
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

ROOT = pathlib.Path(__file__).parents[1]
SOURCES, TESTS = pathlib.Path('jaxrl_llm'), pathlib.Path('tests')
# The tests also import the experiments.
COPIED = 'jaxrl_llm', 'experiments', 'tests'


class Mutation(NamedTuple):
  """A line to break and the test file that has to fail.

  Attributes:
    source: path below `jaxrl_llm/`.
    old: text that occurs once in the source.
    new: its replacement.
    test: path below `tests/`.
  """

  source: str
  old: str
  new: str
  test: str


MUTATIONS = {
  'leave-one-out scale upside down': Mutation(
    'estimators/baselines.py',
    'scale = count / jnp.maximum(count - 1, 1)',
    'scale = jnp.maximum(count - 1, 1) / jnp.maximum(count, 1)',
    'estimators/baselines_test.py',
  ),
  'deviation with G in its denominator': Mutation(
    'estimators/baselines.py',
    'squares.sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)',
    'squares.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)',
    'estimators/baselines_test.py',
  ),
  'equal rewards divided by their rounding': Mutation(
    'estimators/baselines.py',
    'return jnp.where(varies(advantages, valid), standardized, 0.0)',
    'return standardized',
    'estimators/baselines_test.py',
  ),
  'own sample in the weighted baseline': Mutation(
    'estimators/baselines.py',
    'jnp.eye(samples, dtype=bool)',
    'jnp.zeros((samples, samples), bool)',
    'estimators/baselines_test.py',
  ),
  'running mean that forgets too fast': Mutation(
    'estimators/baselines.py',
    'decay * value + (1 - decay) * mean',
    '(1 - decay) * value + decay * mean',
    'estimators/baselines_test.py',
  ),
  'hold takes the next knot': Mutation(
    'estimators/credit.py',
    '  start, _ = _segment(where, mask)\n',
    '  _, start = _segment(where, mask)\n'
    '  start = jnp.minimum(start, mask.shape[2] - 1)\n',
    'estimators/credit_test.py',
  ),
  'GAE takes the value of another state': Mutation(
    'estimators/credit.py',
    'xs = (rewards, known.values, ',
    'xs = (rewards, jnp.roll(known.values, -1, axis=2), ',
    'estimators/credit_test.py',
  ),
  'later advantages without γ': Mutation(
    'estimators/credit.py',
    '    advantage = gamma * advantage\n',
    '',
    'estimators/credit_test.py',
  ),
  'whitening over responses': Mutation(
    'estimators/credit.py',
    'per_token = advantages.shape == rollouts.mask.shape',
    'per_token = False',
    'estimators/credit_test.py',
  ),
  'sign of the KL to go': Mutation(
    'estimators/credit.py',
    'return advantages - current(coefficient, rollouts) * token_kl(rollouts)',
    'return advantages + current(coefficient, rollouts) * token_kl(rollouts)',
    'estimators/credit_test.py',
  ),
  'clip low and high swapped': Mutation(
    'estimators/token_losses.py',
    'inside = jnp.clip(rho, 1.0 - low, 1.0 + high)',
    'inside = jnp.clip(rho, 1.0 - high, 1.0 + low)',
    'estimators/token_losses_test.py',
  ),
  'dual clip on positive advantages': Mutation(
    'estimators/token_losses.py',
    'return jnp.where(advantages < 0, bounded, loss)',
    'return bounded',
    'estimators/token_losses_test.py',
  ),
  'gradient through a clipped weight': Mutation(
    'estimators/token_losses.py',
    '    weight = jax.lax.stop_gradient(weight)\n',
    '',
    'estimators/token_losses_test.py',
  ),
  'the better of two value errors': Mutation(
    'estimators/token_losses.py',
    'error = jnp.maximum(error,',
    'error = jnp.minimum(error,',
    'estimators/token_losses_test.py',
  ),
  'k3 of the other direction': Mutation(
    'estimators/token_losses.py',
    'difference = ref_log_probs - log_probs',
    'difference = log_probs - ref_log_probs',
    'estimators/token_losses_test.py',
  ),
  'sequence ratio without 1/T': Mutation(
    'estimators/ratios.py',
    '_exp(total / length)',
    '_exp(total)',
    'estimators/ratios_test.py',
  ),
  'gradient through the pair': Mutation(
    'estimators/ratios.py',
    'both = jax.lax.stop_gradient(total + partner(total))',
    'both = total + partner(total)',
    'estimators/ratios_test.py',
  ),
  'what is not kept counts in N': Mutation(
    'estimators/compose.py',
    'mask, counted = batch.mask & batch.valid, batch.valid',
    'mask, counted = batch.mask & batch.valid, jnp.ones_like(batch.valid)',
    'estimators/weights_test.py',
  ),
  'branches count in N': Mutation(
    'estimators/compose.py',
    '    counted &= batch.whole\n',
    '',
    'estimators/compose_test.py',
  ),
  'a branch trains what it inherited': Mutation(
    'estimators/compose.py',
    'rollouts.mask & (time >= rollouts.forked_at)',
    'rollouts.mask & (time >= 0)',
    'estimators/compose_test.py',
  ),
  'a continuation in its own baseline': Mutation(
    'estimators/trees.py',
    'rest = _of_fork(rollouts, total + onward) - rewards\n',
    'rest = _of_fork(rollouts, total + onward)\n',
    'estimators/trees_test.py',
  ),
  'what is behind a fork weighs as before it': Mutation(
    'estimators/trees.py',
    'jnp.cumprod(1.0 / (1.0 + count), axis=2)',
    '1.0 / (1.0 + count)',
    'estimators/trees_test.py',
  ),
  'a fork is worth its branches alone': Mutation(
    'estimators/trees.py',
    'return (total + value) / (count + 1), value',
    'return jnp.where(count > 0, total / jnp.maximum(count, 1), value), value',
    'estimators/trees_test.py',
  ),
  'branches that are scored without what shapes responses': Mutation(
    'estimators/advantages.py',
    'return needs._replace(branches=needs.branches._replace(shaping=shaping))',
    'return needs._replace(branches=needs.branches._replace(shaping=inner))',
    'estimators/values_test.py',
  ),
  'a critic bootstraps from itself': Mutation(
    'estimators/values.py',
    'return Known(rollouts.branch_values, rollouts.values, everywhere, fresh)',
    'return Known(rollouts.values, rollouts.values, everywhere, everywhere)',
    'estimators/values_test.py',
  ),
  'the padded width for a constant': Mutation(
    'estimators/weights.py',
    'float(max_length)',
    'float(mask.shape[2])',
    'estimators/weights_test.py',
  ),
  'KL coefficient steered by batches, not responses': Mutation(
    'estimators/advantages.py',
    'value * (1.0 + jnp.minimum(count / horizon, 1.0) * error)',
    'value * (1.0 + error / horizon)',
    'estimators/advantages_test.py',
  ),
  'the floor under the wrong response': Mutation(
    'estimators/preferences.py',
    'preferred = jnp.where(batch.advantages > 0,',
    'preferred = jnp.where(batch.advantages < 0,',
    'estimators/preferences_test.py',
  ),
  'a score before the last token': Mutation(
    'estimators/preferences.py',
    'numbers = jnp.arange(1, mask.shape[2] + 1)[None, None]',
    'numbers = jnp.arange(mask.shape[2], 0, -1)[None, None]',
    'estimators/preferences_test.py',
  ),
  'DAPO with one clip': Mutation(
    'estimators/algorithms.py',
    '    clipped(clip, clip_high),\n    token_mean(),\n    keep',
    '    clipped(clip),\n    token_mean(),\n    keep',
    'estimators/algorithms_test.py',
  ),
  'VAPO with one λ': Mutation(
    'estimators/actor_critic.py',
    'lambda_return(1.0, 1.0)',
    'lambda_return(1.0, 0.95)',
    'estimators/actor_critic_test.py',
  ),
  'RestEM averages over tokens': Mutation(
    'estimators/supervised_preference.py',
    '    sequence_sum(),\n    keep=',
    '    token_mean(),\n    keep=',
    'estimators/supervised_preference_test.py',
  ),
}
# What the fuzz of masks has to see: (source, old, new).
MASKS = {
  'a sum over responses with what is masked': (
    'estimators/weights.py',
    'return mask / (_count(valid) * self.divisor)\n',
    'return jnp.ones_like(mask) / (_count(valid) * self.divisor)\n',
  ),
  'a mean over responses with what is masked': (
    'estimators/weights.py',
    'return mask / (_count(valid) * lengths)',
    'return jnp.ones_like(mask) / (_count(valid) * lengths)',
  ),
  'a mean over tokens with what is masked': (
    'estimators/weights.py',
    'mask / jnp.maximum(mask.sum(keepdims=True), 1)',
    'jnp.ones_like(mask) / jnp.maximum(mask.sum(keepdims=True), 1)',
  ),
  'weights of what is not valid': (
    'estimators/compose.py',
    'mask, counted = batch.mask & batch.valid, batch.valid',
    'mask, counted = batch.mask, batch.valid',
  ),
  'what is not valid counts in a mean of a group': (
    'estimators/baselines.py',
    '  count = jnp.maximum(valid.sum(axis=1, keepdims=True), 1)\n  return',
    '  count = jnp.asarray(x.shape[1])\n  return',
  ),
  'what is not valid makes a group vary': (
    'estimators/baselines.py',
    '  highest = jnp.where(valid, x, -jnp.inf)',
    '  valid = jnp.ones_like(valid)\n  highest = jnp.where(valid, x, -jnp.inf)',
  ),
  # Of a product with a mask XLA makes a `where`: it would not be seen.
  'garbage less itself': (
    'estimators/types.py',
    'jnp.where(mask, x, 0.0)\n\n\ndef blank_rollouts',
    'x - jnp.where(mask, 0.0, x)\n\n\ndef blank_rollouts',
  ),
  'rewards of what is not valid': (
    'estimators/types.py',
    'rewards=blank(valid, rollouts.rewards)',
    'rewards=rollouts.rewards',
  ),
  'garbage in what the model says': (
    'estimators/compose.py',
    'log_probs=inside(outputs.log_probs)',
    'log_probs=outputs.log_probs',
  ),
  'garbage of what is not valid in what the model says': (
    'estimators/compose.py',
    'inside = functools.partial(blank, batch.mask & batch.valid)',
    'inside = functools.partial(blank, batch.mask)',
  ),
  'a gradient of what is masked': (
    'estimators/compose.py',
    'return jnp.sum(batch.weights * token_loss.apply(outputs, batch))',
    'loss = jnp.sum(batch.weights * token_loss.apply(outputs, batch))\n'
    '    return loss + jnp.clip(jnp.nan_to_num(arrays[0]), -1.0, 0.0).sum()',
  ),
  'equal rewards divided by their rounding, in a group': (
    'estimators/baselines.py',
    'return jnp.where(varies(advantages, valid), standardized, 0.0)',
    'return standardized',
  ),
  'the rounding of equal rewards, without siblings': (
    'estimators/baselines.py',
    'centred = scale * (advantages - group_mean(advantages, valid))\n'
    '    return jnp.where(varies(advantages, valid), centred, 0.0)',
    'return scale * (advantages - group_mean(advantages, valid))',
  ),
  # A bool by 0 is 0, as XLA divides.
  '0/0 where no response is valid': (
    'estimators/weights.py',
    'return mask / (_count(valid) * self.divisor)\n',
    'return jnp.where(mask, 1.0, 0.0) / valid.sum(keepdims=True)\n',
  ),
  '0/0 in an empty response': (
    'estimators/weights.py',
    'return mask / (_count(valid) * lengths)',
    'lengths = mask.sum(axis=2, keepdims=True)\n'
    '    return jnp.where(mask, 1.0, 0.0) / (_count(valid) * lengths)',
  ),
  '0/0 where no token is': (
    'estimators/weights.py',
    'mask / jnp.maximum(mask.sum(keepdims=True), 1)',
    'jnp.where(mask, 1.0, 0.0) / mask.sum(keepdims=True)',
  ),
  "0/0 in an empty response's ratio": (
    'estimators/ratios.py',
    'return total, jnp.maximum(mask.sum(axis=2, keepdims=True), 1)',
    'return total, mask.sum(axis=2, keepdims=True)',
  ),
}
MUTATIONS |= {
  name: Mutation(*mutation, 'estimators/fuzz_estimators_test.py')
  for name, mutation in MASKS.items()
}
# Mistakes outside the estimators: (source, old, new, test).
MUTATIONS |= {
  name: Mutation(*mutation)
  for name, mutation in {
    'a missing reward trains as 0': (
      'rollouts/collect.py',
      'scores.valid.reshape(shape)',
      'np.isfinite(scores.total).reshape(shape)',
      'rollouts/responses_test.py',
    ),
    'the policy as its own reference': (
      'rollouts/collect.py',
      'score(setting.reference).log_probs',
      "score(trainable['policy']).log_probs",
      'rollouts/responses_test.py',
    ),
    'a missing reward counts as 0 in the record': (
      'rollouts/collect.py',
      'known = ~np.isnan(scores)\n',
      'scores, known = np.nan_to_num(scores), scores != np.inf\n',
      'rollouts/responses_test.py',
    ),
    'running numbers stay at their start': (
      'training/online.py',
      'state = state.replace(running=running)',
      'state = state.replace(running=state.running)',
      'training/online_test.py',
    ),
    'the same order in every epoch': (
      'training/online.py',
      'jax.random.fold_in(keys.shuffle, epoch)',
      'jax.random.fold_in(keys.shuffle, 0)',
      'training/online_test.py',
    ),
    'a finite loss excuses its gradient': (
      'training/update.py',
      'finite &= jnp.isfinite(optax.tree.norm(gradients))',
      "finite &= jnp.isfinite(metrics['loss'])",
      'training/update_test.py',
    ),
    'norms and biases decay': (
      'training/update.py',
      'mask=_is_matrix',
      'mask=None',
      'training/update_test.py',
    ),
    'a decay that ends too late': (
      'training/update.py',
      'remaining = max(total_updates - warmup_updates, 1)',
      'remaining = max(total_updates, 1)',
      'training/update_test.py',
    ),
    'the record of a later step is kept': (
      'runs/metrics.py',
      "and record['step'] <= limit",
      "and record['step'] <= limit + 1",
      'runs/metrics_test.py',
    ),
    'records without a synchronization': (
      'runs/metrics.py',
      '    self._metrics.sync()\n',
      '',
      'runs/metrics_test.py',
    ),
    'a missing score counts as 0': (
      'rewards/scoring.py',
      'np.stack(list(scores.values()))',
      'np.nan_to_num(np.stack(list(scores.values())))',
      'rewards/scoring_test.py',
    ),
    'None of one function leaves the response out': (
      'rewards/scoring.py',
      '(weights != 0)).any(axis=0)',
      '(weights != 0)).all(axis=0)',
      'training/online_test.py',
    ),
    'a failure is a None': (
      'rewards/scoring.py',
      'valid = scored & ~np.any(list(failed.values()), axis=0)',
      'valid = scored',
      'rewards/scoring_test.py',
    ),
    'a failure counts as a None in the record': (
      'rollouts/collect.py',
      'np.isnan(scores) & ~responses.scores.failed[name]',
      'np.isnan(scores)',
      'rollouts/responses_test.py',
    ),
    'weights of rewards are ignored': (
      'rewards/scoring.py',
      'np.nansum(weights * stacked, axis=0)',
      'np.nansum(stacked, axis=0)',
      'rewards/scoring_test.py',
    ),
    'a failure scores 0': (
      'rewards/workers.py',
      "[content if kind == 'score' else None for",
      "[content if kind == 'score' else 0.0 for",
      'rewards/workers_test.py',
    ),
    'replies in the order of their arrival': (
      'rewards/workers.py',
      'outcome.result() for outcome in self._outcomes',
      'outcome.result() for outcome in self._outcomes[::-1]',
      'rewards/workers_test.py',
    ),
    'a reply without the token of its request': (
      'rewards/workers.py',
      'if answered == token:',
      'if True:',
      'rewards/workers_test.py',
    ),
    'a sample pays for an earlier one': (
      'rewards/workers.py',
      "if used and reply[0] != 'timeout':",
      'if False:',
      'rewards/workers_test.py',
    ),
    'settings of a reward are dropped': (
      'rewards/calling.py',
      'functools.partial(function, **settings) if settings else function',
      'function',
      'rewards/functions_test.py',
    ),
    'a number in a base is an expression': (
      'rewards/mathematics.py',
      r"_LITERAL = re.compile(r'\d_|",
      "_LITERAL = re.compile(r'",
      'rewards/mathematics_test.py',
    ),
    'tuples have no order': (
      'rewards/mathematics.py',
      "not in ('in any order', '∪')",
      "not in ('in any order', '∪', '()')",
      'rewards/mathematics_test.py',
    ),
    'SymPy compares six digits': (
      'rewards/symbolic.py',
      '_DIGITS = 100',
      '_DIGITS = 6',
      'rewards/mathematics_test.py',
    ),
    'variables are units': (
      'rewards/symbolic.py',
      'units=False',
      'units=True',
      'rewards/mathematics_test.py',
    ),
    'tiny numbers are equal': (
      'rewards/symbolic.py',
      'return found and _same_size(*(each[0] for each in parsed))',
      'return found',
      'rewards/mathematics_test.py',
    ),
    'the library is not asked in a worker': (
      'rewards/functions.py',
      'math_answer.warm_up = symbolic.enter_worker\n',
      '',
      'rewards/mathematics_test.py',
    ),
    'an answer that was cut off is the one before it': (
      'tasks/answers.py',
      "      return ''\n",
      '      continue\n',
      'rewards/answers_test.py',
    ),
    'the last of two letters': (
      'tasks/answers.py',
      r"  r'(?![\s)*]*(?:[,/&]|or\b|and\b)\W*[A-Z](?!\w))'" '\n',
      '',
      'rewards/answers_test.py',
    ),
    'a program reads the home folder': (
      'rewards/sandbox_landlock.py',
      'in rights.items():',
      "in (rights | {'/': _READ | _LIST}).items():",
      'rewards/sandbox_test.py',
    ),
    'the limit of processes is not set': (
      'rewards/sandbox_child.py',
      "limits['RLIMIT_NPROC'] = settings['processes']",
      'pass',
      'rewards/sandbox_test.py',
    ),
    "the program's built-in functions": (
      'rewards/sandbox_harness.py',
      'name in used if not hasattr(builtins, name)}',
      'name in used}',
      'rewards/sandbox_harness_test.py',
    ),
    "the program's version of a module": (
      'rewards/sandbox_harness.py',
      'and name in sys.stdlib_module_names:',
      'and False:',
      'rewards/sandbox_harness_test.py',
    ),
    'objects of a program equal everything': (
      'rewards/sandbox_harness.py',
      'return self._opaque()',
      'return True',
      'rewards/sandbox_harness_test.py',
    ),
    'arguments that change stay as they were': (
      'rewards/sandbox_harness.py',
      'values.fill(value, content)',
      'pass',
      'rewards/sandbox_harness_test.py',
    ),
    'bytes name any function': (
      'rewards/sandbox_values.py',
      'return _NAMED[text]',
      'return getattr(builtins, text)',
      'rewards/sandbox_harness_test.py',
    ),
    'a program that fails has printed the right answer': (
      'rewards/sandbox_harness.py',
      'assert code == 0, ',
      'assert True, ',
      'rewards/code_test.py',
    ),
    'tests that test nothing': (
      'rewards/programs.py',
      'if not any(_is_assertion(n) or isinstance(n, ast.Call) for n in nodes):',
      'if False:',
      'rewards/code_test.py',
    ),
    'a program that the deadline cut short scores 0': (
      'rewards/code.py',
      'and left < timeout',
      'and False',
      'rewards/code_test.py',
    ),
    'failures of the last batch alone': (
      'rewards/scoring.py',
      'before.counts[kind] + counts[kind]',
      'counts[kind]',
      'evaluation/held_out_test.py',
    ),
    'the end of a response is masked': (
      'sampling/decoding.py',
      '_write(rows.mask, writes, index)',
      '_write(rows.mask, writes & ~is_end(token, settings.eos_ids), index)',
      'sampling/sampler_test.py',
    ),
    'a branch loses its last token': (
      'sampling/sampler.py',
      'max_tokens - positions, 0)',
      'max_tokens - positions - 1, 0)',
      'sampling/fork_test.py',
    ),
    'the first token beyond the vocabulary': (
      'sampling/policy.py',
      'ids < decoding.num_tokens',
      'ids <= decoding.num_tokens',
      'sampling/policy_test.py',
    ),
    'rows that continue alone draw as the first rows': (
      'sampling/decoding.py',
      'uniform[rows.number]',
      'uniform[: rows.number.size]',
      'sampling/decoding_test.py',
    ),
    'a failure is a reward of 0 in an evaluation': (
      'evaluation/held_out.py',
      'np.where(piece.scores.valid, piece.scores.total, np.nan)',
      'piece.scores.total',
      'evaluation/held_out_test.py',
    ),
    'every batch of an evaluation draws alike': (
      'evaluation/held_out.py',
      'jax.random.fold_in(held_out.key, start)',
      'held_out.key',
      'evaluation/held_out_test.py',
    ),
    'digests are not compared': (
      'runs/checkpoints.py',
      'if loaded.get(name) != leaf:',
      'if name not in loaded:',
      'runs/checkpoints_failures_test.py',
    ),
  }.items()
}
# Of weighted prefix trees: (source, old, new, test below `tests/`).
WEIGHTED = 'estimators/weighted_trees_test.py'
GROWN = 'sampling/trees_test.py'
MUTATIONS |= {
  name: Mutation(*mutation)
  for name, mutation in {
    'the baseline sees cousins': (
      'estimators/weighted_trees.py',
      'flip = lambda x: x[:, ::-1]',
      'flip = lambda x: x',
      WEIGHTED,
    ),
    'the baseline sees the token that it weighs': (
      'estimators/weighted_trees.py',
      'at = jnp.minimum(jnp.arange(length)[None], longest[:, None])',
      'at = jnp.minimum(jnp.arange(length)[None] + 1, longest[:, None])',
      WEIGHTED,
    ),
    'leaves count alike': (
      'estimators/weighted_trees.py',
      'sums = _below(leaf_weights(rollouts) * rewards, common, rollouts)',
      'sums = _below(rewards * 0.25, common, rollouts)',
      WEIGHTED,
    ),
    'nodes count alike': (
      'estimators/compose.py',
      '  shares = rollouts.node_weights\n',
      '  shares = rollouts.node_weights\n  if shares is not None:\n'
      '    shares = jnp.ones_like(shares)\n',
      WEIGHTED,
    ),
    'a state may end without a child': (
      'estimators/thresholds.py',
      'return jnp.minimum(weights, jnp.maximum(tau, of_states))',
      'return jnp.maximum(tau, of_states)',
      WEIGHTED,
    ),
    'more children than fit': (
      'estimators/thresholds.py',
      'return raised(jnp.where(over, jnp.exp(high), free))',
      'return raised(free)',
      GROWN,
    ),
    'small children keep their own weight': (
      'sampling/allocation.py',
      '  weight = jnp.where(sure, weight, threshold)\n',
      '',
      GROWN,
    ),
    'sure children fill the draw': (
      'sampling/allocation.py',
      'point = point + (rank - counted[:, -1:]) * _UNIT',
      'point = point + rank * _UNIT',
      GROWN,
    ),
    'siblings read the keys of another slot': (
      'sampling/trees.py',
      'y = jax.lax.dynamic_slice_in_dim(x, sources[i], 1, axis=0)',
      'y = jax.lax.dynamic_slice_in_dim(x, copies[i], 1, axis=0)',
      GROWN,
    ),
    'a row lacks what its parent wrote': (
      'sampling/trees.py',
      'before = time[None] < forked_at[:, r, None]',
      'before = time[None] + 1 < forked_at[:, r, None]',
      GROWN,
    ),
  }.items()
}
every_mutation = pytest.mark.parametrize('name', MUTATIONS)


@every_mutation
def test_the_table_fits_the_sources(name):
  source, old, new, test = MUTATIONS[name]
  text = (ROOT / SOURCES / source).read_text()
  assert text.count(old) == 1
  compile(text.replace(old, new), source, 'exec')
  assert (ROOT / TESTS / test).is_file()


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
  """A folder with the package and its tests."""
  folder = tmp_path_factory.mktemp('copy')
  for name in COPIED:
    ignore = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, folder / name, ignore=ignore)
  shutil.copy(ROOT / 'setup.cfg', folder)
  return folder


def run(folder, test):
  """Runs a test file of a copy; returns pytest's exit status and output."""
  command = [sys.executable, '-m', 'pytest', '-n0', '-x', '-q', '--tb=line']
  # A source may be restored within a second, which bytecode does not notice.
  changed = {'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'}
  done = subprocess.run(
    [*command, '-p', 'no:cacheprovider', str(TESTS / test)],
    cwd=folder,
    env=os.environ | changed,
    capture_output=True,
    text=True,
    timeout=600,
  )
  return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('test', sorted({m.test for m in MUTATIONS.values()}))
def test_unbroken_the_copy_passes(test, copy):
  status, output = run(copy, test)
  assert status == 0, output


@pytest.mark.slow
@every_mutation
def test_mutation_is_caught(name, copy):
  """By a test that fails, not because the broken line does not run."""
  source, old, new, test = MUTATIONS[name]
  path = copy / SOURCES / source
  text = path.read_text()
  path.write_text(text.replace(old, new))
  try:
    status, output = run(copy, test)
  finally:
    path.write_text(text)
  assert status == 1, output
  crash = r'\b(Name|Type|Attribute|Import|Syntax|Index|Key)Error\b'
  assert not re.search(crash, output), output
