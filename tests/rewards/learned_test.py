"""Scores of reward models as rewards; transformers reads the same texts."""

import json
import string

import mistakes
import numpy as np
import pytest
import tiny_models
import toys

from jaxrl_llm.models import value_head
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.models.huggingface import reward_model as folder_rm
from jaxrl_llm.rewards import RewardPart, Workers, calling, learned, score
from jaxrl_llm.sampling import policy
from jaxrl_llm.tasks import pairs, vocabulary
from jaxrl_llm.training import critic

CHATML = (
  '{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}'
  '{% if add_generation_prompt %}<assistant>{% endif %}'
)
PROMPTS = ['1+1=', '1+1=', 'Say a word: ', '']
ANSWERS = ['2', 'two, I think', 'word', ' x']
FINISHED = [True, False, True, True]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A random reward model that reads characters."""
  tokenizer = vocabulary.character_tokenizer(string.printable)
  config, params = toys.make_policy(
    num_layers=1, vocab_size=len(tokenizer), max_length=48
  )
  random = np.random.default_rng(5)
  head = random.normal(size=(1, config.hidden_size)).astype(np.float32)
  params = critic.separate(config).init(params, head)
  path = tmp_path_factory.mktemp('learned') / 'rm'
  folders.save_trunk(path, config, params['trunk'], params['value'], tokenizer)
  return path


def torch_scores(folder, texts):
  """What transformers makes of texts, one at a time, special tokens spelt."""
  torch = pytest.importorskip('torch')
  import transformers

  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  opened = transformers.AutoModelForSequenceClassification
  with tiny_models.quiet(), torch.no_grad():
    model = opened.from_pretrained(folder).eval()
    return [
      model(**tokenizer(text, return_tensors='pt')).logits.item()
      for text in texts
    ]


def close(found, expected):
  assert np.ptp(expected) > 0.1
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def call(function, **columns):
  given = {'finished': FINISHED} | columns
  return score([RewardPart('proxy', function)], PROMPTS, ANSWERS, given)


def test_it_is_the_score_that_transformers_gives_the_text(folder):
  function = calling.load_reward(
    'reward_model', {'path': str(folder)}, 'rewards'
  )
  texts = [
    prompt + answer + '<eos>' * ended
    for prompt, answer, ended in zip(PROMPTS, ANSWERS, FINISHED, strict=True)
  ]
  close(call(function).total, torch_scores(folder, texts))
  texts = [text.removesuffix('<eos>') for text in texts]
  plain = learned.reward_model(folder, end_token=False, batch_size=3)
  close(call(plain).total, torch_scores(folder, texts))
  given = dict(prompts=PROMPTS, completions=ANSWERS)
  np.testing.assert_allclose(plain(**given), call(plain).total, rtol=1e-6)


def test_it_is_the_score_that_training_reads(folder):
  """Of pairs, whose ids are cut where the two texts part."""
  config, params = folder_rm.load_reward_model(folder)
  tokenizer = folders.load_tokenizer(folder)
  rows = [
    {'prompt': 'A: ', 'chosen': 'yes', 'rejected': 'yonder'},
    {'prompt': 'Why?', 'chosen': ' So.', 'rejected': ''},
  ]
  encoded = pairs.encode_pairs(rows, tokenizer, 48)
  shape = 2, 2, 8
  tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
  prompts = np.zeros((2, 8), np.int32)
  for p, pair in enumerate(encoded):
    prompts[p, : len(pair.prompt)] = pair.prompt
    for g, ids in enumerate((pair.chosen, pair.rejected)):
      tokens[p, g, : len(ids)], lengths[p, g] = ids, len(ids)
  starts = np.array([len(pair.prompt) for pair in encoded], np.int32)
  given = policy.Prompts(tokens=prompts, lengths=starts)
  expected = value_head.score(config, params, given, tokens, lengths, 2)
  function = learned.reward_model(folder)
  for g, name in enumerate(('chosen', 'rejected')):
    found = function(
      prompts=[row['prompt'] for row in rows],
      completions=[row[name] for row in rows],
    )
    np.testing.assert_allclose(found, expected[:, g], rtol=1e-5, atol=1e-5)


def test_a_template_gives_the_response_its_turn(folder):
  """And its end, unless the response was cut off."""
  function = learned.reward_model(
    folder, chat_template=CHATML, suffix='!', max_tokens=41, overlong='none'
  )
  texts = [
    f'<user>{prompt}!</>\n<assistant>{answer}' + '</>\n' * ended
    for prompt, answer, ended in zip(PROMPTS, ANSWERS, FINISHED, strict=True)
  ]
  assert [len(text) for text in texts] == [31, 38, 42, 28]
  found = call(function)
  assert found.valid.tolist() == [True, True, False, True]
  texts.pop(2)
  close(found.total[found.valid], torch_scores(folder, texts))


def test_nothing_is_cut_to_fit(folder):
  """48 tokens can be read: without the system prompt all texts fit."""
  plain = learned.reward_model(folder, chat_template=CHATML)
  assert call(plain).valid.all()
  long = learned.reward_model(folder, chat_template=CHATML, system_prompt='Sys')
  with mistakes.refused('2 of 4 texts exceed 48 tokens', 'longest has 56'):
    call(long)


def test_where_padding_ends_a_text_it_is_not_read(folder, tmp_path):
  """As of published models that pad with their end token."""
  path = tmp_path / 'rm'
  path.mkdir()
  for file in folder.iterdir():
    (path / file.name).write_bytes(file.read_bytes())
  raw = json.loads((path / 'config.json').read_text())
  raw['pad_token_id'] = raw['eos_token_id'] = 1
  (path / 'config.json').write_text(json.dumps(raw))
  texts = [f'{p}{a}<eos>' for p, a in zip(PROMPTS, ANSWERS, strict=True)]
  found = learned.reward_model(path)(prompts=PROMPTS, completions=ANSWERS)
  close(found, torch_scores(path, texts))
  bare = learned.reward_model(path, end_token=False)
  assert found == bare(prompts=PROMPTS, completions=ANSWERS)


def test_scores_are_centred_and_scaled(folder):
  raw = call(learned.reward_model(folder)).total
  scaled = call(learned.reward_model(folder, mean=raw.mean(), std=raw.std()))
  np.testing.assert_allclose(scaled.total.mean(), 0.0, atol=1e-6)
  np.testing.assert_allclose(scaled.total.std(), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(np.argsort(scaled.total), np.argsort(raw))
  half = call(learned.reward_model(folder, dtype='bfloat16')).total
  assert 0 < np.abs(half - raw).max() < 0.1 * np.ptp(raw)


def test_worker_processes_are_no_place_for_it(folder):
  with mistakes.refused('config.r: reward_model', 'leave out workers'):
    Workers('reward_model', {'path': str(folder)}, field='config.r')


@pytest.mark.parametrize(
  'settings, words',
  [
    (dict(overlong='drop'), "'error' or 'none'"),
    (dict(batch_size=0), 'batch_size is 0'),
    (dict(std=0.0), 'std must be above 0'),
    (dict(mean=float('nan')), 'mean=nan'),
    (dict(max_tokens=49), 'reads 1 to 48 tokens'),
    (dict(system_prompt='S'), 'needs a chat template'),
    (dict(chat_template='', system_prompt='S'), 'needs a chat template'),
    (dict(path='/no/model'), 'no model folder /no/model'),
    (dict(pathh='x'), "no parameter 'pathh'"),
  ],
)
def test_settings_that_make_no_sense_are_refused(folder, settings, words):
  with mistakes.refused(words):
    calling.load_reward(
      'reward_model', {'path': str(folder)} | settings, 'rewards'
    )
