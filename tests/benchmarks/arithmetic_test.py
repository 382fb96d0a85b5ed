"""What is counted as necessary, beside what torch counts in transformers."""

import pytest

from benchmarks import arithmetic
from jaxrl_llm.models.config import ModelConfig, Rope

CONFIG = ModelConfig(
  vocab_size=97,
  hidden_size=24,
  intermediate_size=40,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=10,
  tied=True,
  family='qwen3',
  query_key_norm=True,
  rope=Rope(),
)
READ, WRITTEN = 7, 5


def flops(phases):
  return sum(phase[0] for phase in phases)


def counted_by_torch(tokens, scored):
  """FLOPs of one text, whose last positions reach the head."""
  torch = pytest.importorskip('torch')
  from torch.utils.flop_counter import FlopCounterMode
  from transformers import Qwen3Config, Qwen3ForCausalLM

  model = Qwen3ForCausalLM(
    Qwen3Config(
      vocab_size=CONFIG.vocab_size,
      hidden_size=CONFIG.hidden_size,
      intermediate_size=CONFIG.intermediate_size,
      num_hidden_layers=CONFIG.num_layers,
      num_attention_heads=CONFIG.num_heads,
      num_key_value_heads=CONFIG.num_kv_heads,
      head_dim=CONFIG.head_dim,
      attn_implementation='eager',
    )
  )
  with torch.no_grad(), FlopCounterMode(display=False) as counter:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    model(ids, use_cache=False, logits_to_keep=scored)
  # It multiplies whole squares of scores; the mask leaves a triangle of them.
  masked = tokens * (tokens - 1) // 2
  width = CONFIG.num_heads * CONFIG.head_dim
  return counter.get_total_flops() - 4 * width * masked * CONFIG.num_layers


@pytest.mark.parametrize('what', [arithmetic.generation, arithmetic.scoring])
def test_flops_of_one_response_are_those_that_torch_counts(what):
  expected = counted_by_torch(READ + WRITTEN - 1, WRITTEN)
  assert flops(what(CONFIG, 1, 1, READ, WRITTEN)) == expected


def test_a_group_shares_its_prompt():
  one = flops(arithmetic.scoring(CONFIG, 1, 1, READ, 1))
  two = flops(arithmetic.scoring(CONFIG, 1, 2, READ, 1))
  assert two - one == 2 * CONFIG.hidden_size * CONFIG.vocab_size


def test_a_decode_step_reads_weights_and_cache_once():
  before = arithmetic.generation(CONFIG, 3, 2, READ, WRITTEN)
  after = arithmetic.generation(CONFIG, 3, 2, READ, WRITTEN + 1)
  layers, head, attention = after[len(before) :]
  matrices = (2 * 24 * 40 + 2 * 24 * 20 + 3 * 24 * 40) * 3
  assert layers[1] == 4 * matrices
  assert head[1] == 4 * 24 * 97
  # Keys and values of 3 prompts, and of 6 rows with their own tokens.
  assert attention[1] == 4 * 2 * (2 * 10) * 3 * (3 * READ + 6 * WRITTEN)


def test_an_update_is_three_passes_and_the_optimiser():
  job = CONFIG, 2, 3, READ, WRITTEN
  *passes, optimizer = arithmetic.update(*job)
  assert flops(passes) == 3 * flops(arithmetic.scoring(*job))
  matrices = (2 * 24 * 40 + 2 * 24 * 20 + 3 * 24 * 40) * 3
  assert optimizer == (0, 8 * 4 * (matrices + 24 * 97))
