"""A run's checkpoint as a folder that `transformers` opens."""

import json
import os

import jax
import mistakes
import numpy as np
import pytest
import safetensors.numpy
import scripts

from experiments import stored_runs
from jaxrl_llm.models.huggingface import folders


def export(output, *flags):
  flags = f'--workdir={scripts.undisturbed()}', f'--output={output}', *flags
  return scripts.call('export', *flags)


def test_newest_step_is_what_the_run_wrote(tmp_path):
  run, output = scripts.undisturbed(), tmp_path / 'out'
  ended = export(output)
  assert ended.code == 0, ended.err
  assert f'step {scripts.TOTAL} of' in ended.out
  assert sorted(os.listdir(output)) == sorted(os.listdir(run / 'hf'))
  for path in output.iterdir():
    assert path.read_bytes() == (run / 'hf' / path.name).read_bytes(), path
  # Once more: what it wrote itself may be replaced, by another step.
  step = min(int(path.name) for path in (run / 'checkpoints').iterdir())
  assert export(output, f'--step={step}').code == 0
  _, params = folders.load(output)
  stored = stored_runs.load(run, str(step)).model.params
  jax.tree.map(np.testing.assert_array_equal, params, stored)


def test_transformers_generates_the_samples_of_the_run():
  torch = pytest.importorskip('torch')
  import transformers

  run = scripts.undisturbed()
  model = transformers.AutoModelForCausalLM.from_pretrained(run / 'hf')
  tokenizer = transformers.AutoTokenizer.from_pretrained(run / 'hf')
  greedy = [
    sample
    for sample in scripts.records(run, 'samples.jsonl')
    if sample['step'] == scripts.TOTAL and sample['advantage'] is None
  ]
  assert len(greedy) >= 5
  for sample in greedy:
    ids = tokenizer(sample['prompt'], return_tensors='pt')['input_ids']
    with torch.no_grad():
      found = model.generate(ids, do_sample=False, max_new_tokens=6)
    text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == sample['response']


def test_refusals(tmp_path):
  (tmp_path / 'mine.txt').write_text('keep me')
  mistakes.assert_refused(export(tmp_path), 'mine.txt')
  assert os.listdir(tmp_path) == ['mine.txt']
  for flags, text in (
    (('--output=somewhere',), '--workdir is missing'),
    ((f'--workdir={tmp_path}',), '--output is missing'),
    (('--workdir=/no/run', f'--output={tmp_path}/x'), '/no/run holds no run'),
  ):
    mistakes.assert_refused(scripts.call('export', *flags), text)


def test_export_that_does_not_read_back_is_refused(tmp_path, monkeypatch):
  model = stored_runs.load(scripts.undisturbed()).model
  write, save = safetensors.numpy.save_file, folders.save

  def damaged(arrays, path, **kwargs):
    write({name: array + 1 for name, array in arrays.items()}, path, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(safetensors.numpy, 'save_file', damaged)
    with mistakes.refused('does not hold what was written'):
      stored_runs.export(model, tmp_path / 'out')
  assert not os.listdir(tmp_path)

  def other_tokenizer(path, *args, **kwargs):
    save(path, *args, **kwargs)
    file = path / 'tokenizer.json'
    text = json.dumps(json.loads(file.read_text()), separators=(',', ':'))
    assert '"7":' in text
    file.write_text(text.replace('"7":', '"seven":'))

  monkeypatch.setattr(folders, 'save', other_tokenizer)
  with mistakes.refused('the tokenizer differs'):
    stored_runs.export(model, tmp_path / 'out')
