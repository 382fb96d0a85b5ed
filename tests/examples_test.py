"""The example trains a Hugging Face folder on a JSONL file."""

import pathlib
import subprocess
import sys

import jax
import scripts

from jaxrl_llm.models import transformer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.huggingface import folders
from jaxrl_llm.tasks import vocabulary

ROOT = pathlib.Path(__file__).parents[1]


def test_train(tmp_path):
  source = (ROOT / 'examples' / 'train.py').read_text()
  assert source.count('\n') <= 60
  (tmp_path / 'train.py').write_text(
    source.replace('= 60, 16, 8, 12', '= 3, 4, 4, 5')
  )
  tokenizer = vocabulary.character_tokenizer('0123456789+=')
  shape = ModelConfig(len(tokenizer), 16, 32, 1, 2, max_length=128, tied=True)
  params = transformer.init(shape, jax.random.key(0))
  folders.save(tmp_path / 'model', shape, params, tokenizer=tokenizer)
  rows = [{'prompt': f'{a}+1=', 'answer': str(a + 1)} for a in range(9)]
  scripts.write_rows(tmp_path / 'rows.jsonl', rows)
  command = [sys.executable, 'train.py', 'model', 'rows.jsonl']
  done = subprocess.run(
    command, cwd=tmp_path, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  printed = done.stdout.splitlines()
  assert [line.split()[0] for line in printed[:3]] == ['0', '1', '2']
  trained = folders.load(tmp_path / 'trained')[1]
  assert jax.tree.structure(trained) == jax.tree.structure(params)
