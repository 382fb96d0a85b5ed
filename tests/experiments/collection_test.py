"""Refilling and hints over recorded responses, against plain Python."""

import jax
import mistakes
import numpy as np
import pytest

from experiments import online
from experiments.configs import base
from jaxrl_llm import rollouts, sampling
from jaxrl_llm.rewards import Scores
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import prompts as prompts_lib
from jaxrl_llm.tasks import sources
from jaxrl_llm.tasks.vocabulary import character_tokenizer

TOKENIZER = character_tokenizer('0123456789+=')
PROMPTS, GROUP, LENGTH = 6, 4, 5
ROWS = [
  {'prompt': f'{i:03}=', 'solution': f'{i:03}+', 'level': i % 5}
  for i in range(40)
]
KEY = jax.random.key(5)


class Recorder:
  """Stands for a model: responses and rewards from the key, all recorded."""

  def __init__(self, reward):
    self.reward, self.batches, self.calls, self.asked = reward, [], [], 0

  def __call__(self, batch, key):
    shape = len(batch.rows), GROUP, LENGTH
    rng = np.random.default_rng(jax.random.key_data(key).tolist())
    texts = [
      TOKENIZER.decode(ids[:n])
      for ids, n in zip(batch.tokens, batch.lengths, strict=True)
    ]
    rewards = np.asarray(self.reward(rng, texts), float)
    valid = ~np.isnan(rewards.reshape(-1))
    total = np.where(valid, rewards.reshape(-1), 0.0)
    lengths = rng.integers(1, LENGTH + 1, shape[:2])

    def scoring():
      self.asked += 1
      failed = {'own': np.zeros(total.size, bool)}
      return Scores(total, valid, {'own': rewards.reshape(-1)}, failed)

    self.batches.append(batch)
    self.calls.append(
      rollouts.Responses(
        prompts=policy.Prompts(tokens=batch.tokens, lengths=batch.lengths),
        rows=batch.rows,
        samples=sampling.Samples(
          tokens=rng.integers(3, 12, shape),
          mask=np.arange(LENGTH) < lengths[..., None],
          log_probs=rng.random(shape, np.float32),
          finished=lengths[..., None] < LENGTH,
        ),
        completions=[f'{rng.random()}' for _ in range(shape[0] * GROUP)],
        scoring=scoring,
      )
    )
    return self.calls[-1]


class Collection:
  """Draws the groups of a configuration's steps from recorded responses."""

  def __init__(self, rows=ROWS, **rollout):
    config = base.get_config()
    config.prompts.max_tokens = 8
    config.rollout.update(prompts=PROMPTS, samples=GROUP, **rollout)
    self.encoded = prompts_lib.encode_prompts(rows, TOKENIZER, 8)
    self.source = online.prompt_source(config, self.encoded, config.seed)
    self._groups = online.group_tools(config, self.encoded, TOKENIZER)

  def draw(self, respond, step):
    fold = jax.random.fold_in
    keys = online.Keys(*(fold(fold(KEY, use), step) for use in online._USES))
    return self._groups(step)(respond, self.source.batch(step), keys, None)


def often_equal(rng, texts):
  """Rewards of 0 and 1, about half of the groups of one kind; some of none."""
  chance = rng.choice([0.0, 0.0, 0.5, 0.5, 1.0], (len(texts), 1))
  rewards = (rng.random((len(texts), GROUP)) < chance).astype(float)
  return np.where(rng.random(rewards.shape) < 0.1, np.nan, rewards)


def varies(call, group):
  own = call.scores.parts['own'][group * GROUP : (group + 1) * GROUP]
  known = [x for x in own if x == x]
  return any(x != known[0] for x in known)


def oracle(recorder, encoded, most, step):
  """Chosen groups as (call, group), and places left without variance."""
  seed = sources.derive_seed(base.get_config().seed, 'refill')
  further = sources.PromptSource(encoded, PROMPTS, seed)
  first, *rounds = recorder.calls
  chosen = [(0, group) for group in range(PROMPTS)]
  missing = [group for group in range(PROMPTS) if not varies(first, group)]
  good, drawn = PROMPTS - len(missing), PROMPTS
  for number, call in enumerate(rounds):
    # As many as are missing if the rate so far holds, in powers of two.
    size = 1
    while size * max(good, 1) < len(missing) * drawn and size < PROMPTS:
      size *= 2
    size = min(size, PROMPTS)
    expected = further.indices(step * most + number)[:size]
    assert call.rows == [encoded.rows[i] for i in expected]
    found = [group for group in range(size) if varies(call, group)]
    good, drawn = good + len(found), drawn + size
    assert missing, 'a round without need'
    for group in found:
      if missing:
        chosen[missing.pop(0)] = number + 1, group
  assert not missing or len(rounds) == most
  return chosen, missing


@pytest.mark.parametrize('most', [1, 4])
def test_refilling_is_what_plain_python_does(most):
  made = Collection(refill=most)
  seen = set()
  for step in range(12):
    recorder = Recorder(often_equal)
    drawn = made.draw(recorder, step)
    chosen, missing = oracle(recorder, made.encoded, most, step)
    calls, found, record = recorder.calls, drawn.responses, drawn.record
    assert calls[0].rows == [
      made.encoded.rows[i] for i in made.source.indices(step)
    ]
    for place, (call, group) in enumerate(chosen):
      part = calls[call]
      assert found.rows[place] == drawn.batch.rows[place] == part.rows[group]
      for name in ('tokens', 'mask', 'log_probs', 'finished'):
        np.testing.assert_array_equal(
          found.samples[name][place], part.samples[name][group]
        )
      for i in range(GROUP):
        row, own = place * GROUP + i, group * GROUP + i
        assert found.completions[row] == part.completions[own]
        assert found.scores.total[row] == part.scores.total[own]
        assert found.scores.valid[row] == part.scores.valid[own]
    # What was written and is thrown away was generated all the same.
    every = sum(int(call.samples.mask.sum()) for call in calls)
    assert drawn.tokens == every - int(np.asarray(found.samples.mask).sum())
    first = calls[0].scores
    equal = [
      not varies(calls[0], g)
      for g in range(PROMPTS)
      if first.valid.reshape(PROMPTS, GROUP)[g].any()
    ]
    valid = np.concatenate([call.scores.valid for call in calls])
    total = np.concatenate([call.scores.total for call in calls])
    assert record == {
      'refill/rounds': len(calls) - 1,
      'refill/replaced': sum(call > 0 for call, _ in chosen),
      'refill/unfilled': len(missing),
      'refill/discarded': sum(len(call.rows) for call in calls) - PROMPTS,
      'sampled/reward': pytest.approx(first.total[first.valid].mean()),
      'sampled/frac_reward_zero_std': pytest.approx(np.mean(equal)),
      'sampled/all_reward': pytest.approx(total[valid].mean()),
      'sampled/discarded_tokens': drawn.tokens,
    }
    seen.add((len(calls), bool(missing)))
  assert {full for _, full in seen} == {True, False} or most == 4
  assert len(seen) > 1


def needing(shares):
  """One response succeeds with at least so many of '012+'; 9 is never."""

  def reward(rng, texts):
    rewards = np.zeros((len(texts), GROUP))
    for i, text in enumerate(texts):
      prompt, _, hint = text.partition('=')
      rewards[i, 1] = len(hint) >= shares[int(prompt) % len(shares)]
    return rewards

  return reward


def test_hints_escalate_until_a_response_succeeds():
  needs = [0, 1, 2, 3, 9]
  made = Collection(hints=[0.25, 0.5, 0.75])
  for step in range(6):
    recorder = Recorder(needing(needs))
    drawn = made.draw(recorder, step)
    rows = [made.encoded.rows[i] for i in made.source.indices(step)]
    wanted = [needs[int(row['prompt'][:-1]) % 5] for row in rows]
    failed = [i for i in range(PROMPTS) if wanted[i] > 0]
    sampled = [[i for i in failed if wanted[i] > k] for k in range(3)]
    batches = recorder.batches[1:]
    for k, (places, batch) in enumerate(zip(sampled, batches, strict=False)):
      # Repeated up to a power of two, or all prompts.
      assert len(batch.rows) in (1, 2, 4, PROMPTS)
      assert len(places) <= len(batch.rows) < max(2 * len(places), 2)
      for i in range(len(batch.rows)):
        row = rows[places[i % len(places)]]
        ids = batch.tokens[i, : batch.lengths[i]]
        text = row['prompt'] + row['solution'][: k + 1]
        assert TOKENIZER.decode(ids) == text and batch.rows[i] is row
    assert len(batches) == sum(map(bool, sampled))
    for i, need in enumerate(wanted):
      hint = rows[i]['solution'][: need if need < 9 else 0]
      length = int(drawn.responses.prompts.lengths[i])
      ids = np.asarray(drawn.responses.prompts.tokens)[i, :length]
      text = rows[i]['prompt'] + hint
      assert TOKENIZER.decode(ids) == drawn.responses.rows[i]['prompt'] == text
      assert drawn.batch.rows[i] is rows[i]
      group = drawn.responses.scores.total.reshape(PROMPTS, GROUP)[i]
      assert group.tolist() == [0.0, float(need < 9), 0.0, 0.0]
    record = drawn.record
    assert record['hints/failed'] == len(failed)
    assert record['hints/saved'] == sum(0 < need < 9 for need in wanted)
    assert record['hints/no_solution'] == record['hints/over_budget'] == 0
    for share, places in zip(('0.25', '0.5', '0.75'), sampled, strict=True):
      assert record[f'hints/groups_{share}'] == len(places)
    assert record['sampled/reward'] == np.mean([n == 0 for n in wanted]) / GROUP
    every = sum(int(call.samples.mask.sum()) for call in recorder.calls)
    kept = int(np.asarray(drawn.responses.samples.mask).sum())
    assert drawn.tokens == every - kept == record['sampled/discarded_tokens']


def test_hints_that_do_not_fit_and_rows_without_a_solution():
  rows = [
    {'prompt': '000=' if i % 2 else '00000=', 'solution': '12+345'}
    for i in range(PROMPTS)
  ]
  rows[0]['solution'] = None
  # Of six tokens: 2, 3, 6; prompts have 4 and 6, and 8 is the budget.
  made = Collection(rows, hints=(0.34, 0.5, 1.0))
  recorder = Recorder(lambda rng, texts: np.zeros((len(texts), GROUP)))
  record = made.draw(recorder, 0).record
  assert record['hints/failed'] == 6 and record['hints/no_solution'] == 1
  groups = [record[f'hints/groups_{s}'] for s in ('0.34', '0.5', '1')]
  # Of prompts with 6 tokens those with a hint of 3 do not fit, of 4 with 6.
  assert groups == [5, 3, 0] and record['hints/over_budget'] == 2 + 3
  assert record['hints/saved'] == 0
  with mistakes.refused('no training prompt has a solution'):
    Collection([{'prompt': '1'}], hints=(0.5,))
