"""What a peer is asked to do, and the line that it answers with."""

import importlib.metadata
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple


class Work(NamedTuple):
  """The job, as the one argument of a script says it in JSON.

  Attributes:
    folder: a Hugging Face folder.
    texts: prompts; of training as many as all steps need.
    prompts: P, of each call or step.
    samples: G, responses per prompt.
    prompt_tokens: of each prompt, in tokens.
    new_tokens: of each response, in tokens.
    end_id: of the end token, which no response reaches.
    learning_rate: of AdamW.
    warmup, rounds: calls or steps that do not count, and that do.
  """

  folder: str
  texts: list[str]
  prompts: int
  samples: int
  prompt_tokens: int
  new_tokens: int
  end_id: int
  learning_rate: float
  warmup: int
  rounds: int


def read() -> Work:
  """The work that the file named by the command line describes."""
  with open(sys.argv[1], encoding='utf-8') as file:
    return Work(**json.load(file))


def repeat(call: Callable[[], list[str]], work: Work) -> list[float]:
  """Seconds of each round that counts.

  Args:
    call: gives the responses' texts.
    work: how many rounds.
  """
  times = []
  for _ in range(work.warmup + work.rounds):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return times[work.warmup :]


def with_end(tokenizer, work: Work):
  """The tokenizer with an end token: an id that the model does not have."""
  tokenizer.add_special_tokens({'eos_token': '<|end|>'})
  if tokenizer.eos_token_id != work.end_id:
    raise ValueError(f'the end token is {tokenizer.eos_token_id}')
  return tokenizer


def show(seconds: list[float], *packages: str) -> None:
  """Prints one line of JSON.

  Args:
    seconds: of each round that counts.
    *packages: whose versions matter.
  """
  versions = {name: importlib.metadata.version(name) for name in packages}
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  answer = {
    'seconds': {'median': statistics.median(seconds), 'rounds': len(seconds)},
    'peak_bytes': peak,
    'versions': versions,
  }
  print(json.dumps(answer), flush=True)
