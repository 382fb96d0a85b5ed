"""A peer's task, and the line with its results."""

import importlib.metadata
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple


class Work(NamedTuple):
  """The job, as JSON in the file that is a script's one argument.

  Attributes:
    folder: a Hugging Face folder.
    texts: prompts; for training, as many as all steps need.
    prompts: P, per call or step.
    samples: G, responses per prompt.
    prompt_tokens: tokens per prompt.
    new_tokens: tokens per response.
    end_id: id of the end token, which no response contains.
    learning_rate: AdamW's.
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
  """Reads the work from the file that the command line names."""
  with open(sys.argv[1], encoding='utf-8') as file:
    return Work(**json.load(file))


def repeat(call: Callable[[], list[str]], work: Work) -> list[float]:
  """Returns the seconds of each round that counts.

  Args:
    call: returns the responses' texts.
    work: contains the number of rounds.
  """
  times = []
  for _ in range(work.warmup + work.rounds):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return times[work.warmup :]


def with_end(tokenizer, work: Work):
  """Adds an end token to the tokenizer: an id that the model does not have."""
  tokenizer.add_special_tokens({'eos_token': '<|end|>'})
  if tokenizer.eos_token_id != work.end_id:
    raise ValueError(f'the end token is {tokenizer.eos_token_id}')
  return tokenizer


def show(seconds: list[float], *packages: str) -> None:
  """Prints one line of JSON.

  Args:
    seconds: time of each round that counts.
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
