"""Prompts keep one BOS and stay within budget; their order needs no state."""

import datetime
import decimal
import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from mistakes import refused

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import prompts, sources
from jaxrl_llm.tasks.vocabulary import character_tokenizer

# The shape of Qwen's template, with a leading BOS as Llama's has.
TEMPLATE = (
  '{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n'
  '{{ m.content }}<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
# As Gemma's, which has no system role.
NO_SYSTEM = (
  "{% if messages[0].role == 'system' %}"
  "{{ raise_exception('System role not supported') }}{% endif %}"
  '{{ messages[0].content }}'
)


def digits():
  return character_tokenizer('0123456789')


@pytest.fixture(scope='module')
def stories(shared):
  return transformers.AutoTokenizer.from_pretrained(
    shared / 'models' / 'stories260k'
  )


@pytest.fixture(scope='module')
def gpt2(shared):
  return transformers.AutoTokenizer.from_pretrained(
    shared / 'models' / 'gpt2-tokenizer'
  )


def rows_of(*texts):
  return [{'prompt': text, 'answer': str(i)} for i, text in enumerate(texts)]


def source(count, size, seed=0, **kwargs):
  rows = rows_of(*(str(10**6 + i) for i in range(count)))
  encoded = prompts.encode_prompts(rows, digits(), 7)
  return sources.PromptSource(encoded, size, seed, **kwargs)


@pytest.mark.parametrize('at', ['prompt', 'suffix', 'template', 'solution'])
def test_half_a_surrogate_pair_is_refused(at):
  """JSON can write it, and no tokenizer takes it."""
  rows = [{'prompt': '1', 'solution': '1'}, {'prompt': '2', 'solution': '2'}]
  half = '3\ud800'
  if at in rows[1]:
    rows[1][at] = half
  with refused("'\\ud800', half of a"):
    if at == 'solution':
      prompts.encode_targets(rows, digits(), 7, 1)
    prompts.encode_prompts(
      rows,
      digits(),
      7,
      suffix=half if at == 'suffix' else '',
      chat_template=half if at == 'template' else None,
    )


def test_a_bos_that_the_tokenizer_prepends_occurs_once(stories):
  assert stories.bos_token_id == stories.eos_token_id == 1
  rows = rows_of('Once upon a time', '<s>Once upon a time', '')
  plain, spelled, empty = prompts.encode_prompts(rows, stories, 32).tokens
  assert plain.tolist() == stories('Once upon a time')['input_ids']
  assert plain.tolist().count(1) == spelled.tolist().count(1) == 1
  assert empty.tolist() == [1]
  assert plain.dtype == np.int32


def test_a_tokenizer_without_bos_gets_none_except_for_an_empty_prompt(gpt2):
  rows = rows_of('Once upon', '')
  plain, empty = prompts.encode_prompts(rows, gpt2, 32).tokens
  assert plain.tolist() == [7454, 2402]
  assert empty.tolist() == [gpt2.bos_token_id]


@pytest.mark.parametrize(
  'bos, template, whole, expected',
  [
    ('<bos>', '<bos> $A <eos>', [5, 3, 4, 1], [5, 3, 4]),
    ('<bos>', '$A <eos>', [3, 4, 1], [3, 4]),
    # One token for both, as in GPT-2: where it stands tells what it is.
    ('<eos>', '$A <eos>', [3, 4, 1], [3, 4]),
    ('<eos>', '<eos> $A', [1, 3, 4], [1, 3, 4]),
    ('<eos>', '<eos> $A <eos>', [1, 3, 4, 1], [1, 3, 4]),
  ],
)
def test_an_end_token_that_the_tokenizer_appends_is_left_out(
  bos, template, whole, expected
):
  from tokenizers import processors

  tokenizer = character_tokenizer('ab')
  tokenizer.add_special_tokens({'bos_token': bos})
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single=template,
    special_tokens=[(bos, tokenizer.bos_token_id), ('<eos>', 1)],
  )
  assert tokenizer('ab')['input_ids'] == whole
  texts, first = ['ab', f'{bos}ab', ''], tokenizer.bos_token_id
  encoded = prompts.encode_texts(texts, tokenizer)
  assert encoded == [expected, [first, 3, 4], [first]]


@pytest.mark.parametrize('template', ['<bos> $A', '<bos> $A <bos>'])
def test_a_template_that_writes_the_first_token_has_it_once(template):
  from tokenizers import processors

  tokenizer = character_tokenizer('ab')
  tokenizer.add_special_tokens({'bos_token': '<bos>'})
  bos = tokenizer.bos_token_id
  tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
    single=template, special_tokens=[('<bos>', bos)]
  )
  text = '{{ bos_token }}{{ messages[0].content }}'
  encoded = prompts.encode_prompts(
    rows_of('ab'), tokenizer, 9, chat_template=text
  )
  assert encoded.tokens[0].tolist() == [bos, 3, 4]


def test_a_chat_template_is_tokenised_as_it_stands(stories):
  import copy

  chat = copy.deepcopy(stories)
  chat.chat_template = TEMPLATE
  encoded = prompts.encode_prompts(
    rows_of('Hello.'), chat, 99, system_prompt='Be kind.', suffix=' Think.'
  )
  expected = (
    '<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n'
    'Hello. Think.<|im_end|>\n<|im_start|>assistant\n'
  )
  ids = encoded.tokens[0].tolist()
  assert ids == chat(expected, add_special_tokens=False)['input_ids']
  assert ids.count(1) == 1
  assert encoded.template_hash is not None
  assert encoded.rows[0]['prompt'] == 'Hello.'

  raw = prompts.encode_prompts(rows_of('Hello.'), chat, 99, chat_template=None)
  assert raw.tokens[0].tolist() == stories('Hello.')['input_ids']
  assert raw.template_hash is None
  given = prompts.encode_prompts(
    rows_of('Hello.'), stories, 99, chat_template=TEMPLATE
  )
  assert given.tokens[0][0] == 1 and len(given.tokens[0]) > 10
  assert given.template_hash != encoded.template_hash  # no system prompt


def test_a_system_prompt_is_never_ignored(stories):
  rows = rows_of('Hello.')
  for template, text in (
    ({}, 'needs a chat template'),
    ({'chat_template': NO_SYSTEM}, 'System role not supported'),
  ):
    with refused(text):
      settings = dict(template, system_prompt='Be kind.')
      prompts.encode_prompts(rows, stories, 99, **settings)


def test_over_budget_is_an_error_or_a_counted_drop():
  rows = rows_of('123', '12345', '1234', '1', '123456')
  with refused('2 of 5 prompts exceed 4', 'longest has 6', 'first is row 1'):
    prompts.encode_prompts(rows, digits(), 4)
  encoded = prompts.encode_prompts(rows, digits(), 4, overlong='drop')
  assert encoded.dropped == 2
  assert [r['prompt'] for r in encoded.rows] == ['123', '1234', '1']
  assert [len(t) for t in encoded.tokens] == [3, 4, 1]
  exact = prompts.encode_prompts(rows, digits(), 6)
  assert exact.dropped == 0 and len(exact.rows) == 5


def test_nothing_to_prompt_with_is_an_error():
  for rows, budget, overlong, *texts in (
    ([], 4, 'error', 'no rows'),
    (rows_of('12345'), 4, 'drop', 'none of 1 prompts fits'),
    (rows_of('1', ''), 4, 'error', 'row 1 is empty'),
    ([{'question': 'x'}], 4, 'error', 'row 0 has no text'),
    (rows_of('1'), 4, 'truncate', 'overlong'),
    (rows_of('1'), 0, 'error', 'positive'),
    # Characters outside the vocabulary.
    (rows_of('12', '1x2y'), 9, 'error', 'row 1 ', "'xy'"),
  ):
    with refused(*texts):
      prompts.encode_prompts(rows, digits(), budget, overlong=overlong)


def test_solutions_end_with_the_end_token(stories):
  rows = [{'solution': '12'}, {'solution': ''}]
  ids = prompts.encode_targets(rows, digits(), 3, eos_id=1)
  assert [i.tolist() for i in ids] == [[4, 5, 1], [1]]
  with pytest.raises(UserError, match='1 of 2 .* has 3, the first is row 0'):
    prompts.encode_targets(rows, digits(), 2, eos_id=1)
  with pytest.raises(UserError, match='row 0 .*solution'):
    prompts.encode_targets([{'prompt': ''}], digits(), 2, eos_id=1)
  with pytest.raises(UserError, match="'x'"):
    prompts.encode_targets([{'solution': 'x'}], digits(), 9, eos_id=1)
  [story] = prompts.encode_targets([{'solution': 'The end.'}], stories, 9, 1)
  assert story.tolist().count(1) == 1 and story[-1] == 1


def test_batches_are_padded_to_a_bucket_and_never_beyond_the_budget():
  rows = rows_of('1', '123', '1' * 33)
  encoded = prompts.encode_prompts(rows, digits(), 40)
  batch = prompts.gather(encoded, [1, 0])
  assert batch.tokens.tolist() == [[4, 5, 6] + [0] * 29, [4] + [0] * 31]
  assert batch.lengths.tolist() == [3, 1]
  assert [r['prompt'] for r in batch.rows] == ['123', '1']
  assert batch.tokens.dtype == batch.lengths.dtype == np.int32
  assert prompts.gather(encoded, [2]).tokens.shape == (1, 40)
  with pytest.raises(ValueError, match='could not broadcast'):
    prompts.padded([[1], [1, 2, 3]], 0, 2)


@pytest.mark.parametrize('count,size', [(7, 3), (6, 3), (5, 8), (1, 4), (9, 9)])
def test_every_epoch_is_a_fresh_permutation(count, size):
  order = source(count, size)
  steps = 4 * count
  flat = [i for s in range(steps) for i in order.indices(s)]
  epochs = np.reshape(flat, (-1, count))
  np.testing.assert_array_equal(
    np.sort(epochs, axis=1), np.tile(np.arange(count), (4 * size, 1))
  )
  if count > 4:
    assert len({tuple(e) for e in epochs.tolist()}) > 3 * size


def test_a_batch_is_a_function_of_seed_and_step():
  order, again = source(50, 7, seed=3), source(50, 7, seed=3)
  late = again.batch(1000)  # without having seen the batches before it
  for step in (0, 5, 1000):
    one, two = order.batch(step), again.batch(step)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert one.rows == two.rows
  assert late.rows == order.batch(1000).rows
  assert order.indices(0) != source(50, 7, seed=4).indices(0)
  # Fixed for ever: a resumed run must see the order it was promised.
  assert source(10, 10, seed=0).indices(0) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_permutations_are_uniform():
  counts = np.zeros((4, 4))
  order = source(4, 4)
  for step in range(4000):
    for place, row in enumerate(order.indices(step)):
      counts[place, row] += 1
  chi_square = ((counts - 1000) ** 2 / 1000).sum()
  assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_the_fingerprint_changes_with_whatever_changes_a_batch():
  def fingerprint(
    texts=('1', '23'), size=2, seed=0, alphabet='0123456789', **kwargs
  ):
    encoded = prompts.encode_prompts(
      rows_of(*texts), character_tokenizer(alphabet), 99, **kwargs
    )
    return json.dumps(sources.PromptSource(encoded, size, seed).fingerprint())

  base = fingerprint()
  assert base == fingerprint()
  others = {
    fingerprint(texts=('12', '3')),
    fingerprint(texts=('1', '23', '4')),
    fingerprint(size=1),
    fingerprint(seed=1),
    fingerprint(alphabet='0123456789a'),
    fingerprint(suffix='0'),
    fingerprint(chat_template='{{ messages[0].content }}'),
  }
  assert base not in others and len(others) == 7


def rows_digest(*values):
  rows = [{'prompt': '1', 'answer': value} for value in values]
  encoded = prompts.encode_prompts(rows, digits(), 7)
  return sources.PromptSource(encoded, 1, 0).fingerprint()['rows_sha256']


def test_the_fingerprint_of_plain_rows_is_that_of_their_json():
  values = ['é', 1, 0.1, None, True, [1, [2]], {'b': 1, 'a': [float('nan')]}]
  rows = [{'answer': value, 'prompt': '1'} for value in values]
  text = json.dumps(rows, sort_keys=True).encode()
  assert rows_digest(*values) == hashlib.sha256(text).hexdigest()


def test_values_with_one_form_are_those_of_the_form():
  pairs = [
    ((1, (2, 3)), [1, [2, 3]]),
    (np.arange(2000).reshape(2, -1), np.arange(2000).reshape(2, -1).tolist()),
    (np.float32(0.1), float(np.float32(0.1))),
    ({'a': np.int64(3)}, {'a': 3}),
    (jnp.ones(2), [1.0, 1.0]),
    (np.array(['a', None], object), ['a', None]),
  ]
  for value, form in pairs:
    assert rows_digest(value) == rows_digest(form), value
  # `repr` would leave out what is in the middle.
  long = np.zeros(2000)
  other = long.copy()
  other[1000] = 1
  assert rows_digest(long) != rows_digest(other)
  day = datetime.date(2024, 2, 29)
  for value in (b'1', decimal.Decimal('0.10'), day, [day]):
    assert rows_digest(value) == rows_digest(value)
  assert rows_digest(b'1') != rows_digest(b'2')


@pytest.mark.parametrize(
  'value',
  [{'a', 'b'}, object(), [{1}], {'a': len}, {(1, 2): 3}, {1: 2, 'a': 3}],
)
def test_what_is_another_thing_in_each_process_is_refused(value):
  with refused('row 1 ', "'answer'", 'cannot'):
    rows_digest('1', value)


def test_columns_have_an_entry_per_row():
  rows = [{'prompt': 'a', 'answer': '1'}, {'prompt': 'b', 'level': 2}]
  assert prompts.columns(rows) == {'answer': ['1', None], 'level': [None, 2]}
  with pytest.raises(UserError, match='completion_ids'):
    prompts.columns([{'prompt': 'a', 'completion_ids': 1}])


@pytest.mark.parametrize('wrong', [dict(size=0), dict(seed=-1)])
def test_a_source_needs_sensible_numbers(wrong):
  with pytest.raises(UserError, match='must be at least'):
    source(**{'count': 3, 'size': 2, **wrong})
