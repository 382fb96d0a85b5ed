"""Monte Carlo values that outlive their step, kept by prompt and prefix.

A state that was valued a few steps ago is not sampled from again: its value
serves as a baseline, for which any number that the prefix determines will do.
As a first term, what a token led to, a stale value would bias.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from jaxrl_llm import sharding
from jaxrl_llm.policy import Prompts

_SLOTS = 2**16

Place = tuple[int, int, int]


class Found(NamedTuple):
  """Kept values of places.

  Attributes:
    values: [P, G, M] float32, in units of the reward; 0 where not kept.
    ages: [P, G, M] int32, in steps; −1 where not kept.
  """

  values: np.ndarray
  ages: np.ndarray


class KeptValues:
  """The values of the states that were branched from last.

  Args:
    longest: how many steps a value may be old.
    slots: how many are kept at most; the ones kept longest ago make room.
  """

  def __init__(self, longest: int, slots: int = _SLOTS):
    self._longest = longest
    self._tree = {
      # Digests as pairs of words: not every backend has 64-bit integers.
      'keys': np.zeros((slots, 2), np.uint32),
      'values': np.zeros(slots, np.float32),
      'steps': np.full(slots, -1, np.int32),
      'next': np.zeros((), np.int32),
    }
    self._places: dict[bytes, int] = {}

  def find(
    self, keys: list[tuple[Place, bytes]], shape: tuple[int, ...], step: int
  ) -> Found:
    """The values of places that are at most `longest` steps old.

    Args:
      keys: (place, digest) pairs of `digests`.
      shape: [P, G, M].
      step: the present one.
    """
    found = none_kept(shape)
    for place, key in keys:
      slot = self._places.get(key)
      if slot is None:
        continue
      age = step - int(self._tree['steps'][slot])
      if 0 <= age <= self._longest:
        found.values[place] = self._tree['values'][slot]
        found.ages[place] = age
    return found

  def keep(
    self, keys: list[tuple[Place, bytes]], values: np.ndarray, step: int
  ) -> None:
    """Keeps values, [P, G, M], of the places that `keys` names."""
    for place, key in keys:
      if key in self._places:  # it moves to the end of the queue
        self._tree['steps'][self._places.pop(key)] = -1
      slot = self._places[key] = self._free()
      self._tree['keys'][slot] = np.frombuffer(key, np.uint32)
      self._tree['values'][slot] = values[place]
      self._tree['steps'][slot] = step

  def _free(self) -> int:
    tree = self._tree
    slot = int(tree['next'])
    tree['next'][...] = (slot + 1) % len(tree['steps'])
    if tree['steps'][slot] >= 0:
      del self._places[tree['keys'][slot].tobytes()]
    return slot

  @property
  def tree(self) -> dict[str, np.ndarray]:
    """Everything that a checkpoint has to hold; shapes are constant."""
    return {name: value.copy() for name, value in self._tree.items()}

  def load(self, tree: dict[str, np.ndarray]) -> None:
    """Takes up what a checkpoint held."""
    # Arrays of JAX cannot be written to.
    self._tree = {name: np.array(value) for name, value in tree.items()}
    used = np.flatnonzero(self._tree['steps'] >= 0)
    self._places = {self._tree['keys'][i].tobytes(): int(i) for i in used}


def none_kept(shape: tuple[int, ...]) -> Found:
  """What is found of places, [P, G, M], where nothing is kept."""
  return Found(np.zeros(shape, np.float32), np.full(shape, -1, np.int32))


def digests(
  prompts: Prompts, tokens: np.ndarray, places: np.ndarray
) -> list[tuple[Place, bytes]]:
  """(place, 8-byte digest of the state) of every place above 0.

  Args:
    prompts: P prompts.
    tokens: [P, G, T] int32 of the responses.
    places: [P, G, M] int32, how many of a response's tokens the state has.
  """
  prompts = sharding.to_host(prompts)
  lengths, prompts = prompts.lengths, prompts.tokens
  found = []
  for p, g, m in zip(*(i.tolist() for i in np.nonzero(places)), strict=True):
    digest = hashlib.blake2b(digest_size=8)
    digest.update(np.int32(lengths[p]).tobytes())
    digest.update(prompts[p, : lengths[p]].astype(np.int32).tobytes())
    digest.update(tokens[p, g, : places[p, g, m]].astype(np.int32).tobytes())
    found.append(((p, g, m), digest.digest()))
  return found
