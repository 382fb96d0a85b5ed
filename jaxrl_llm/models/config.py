"""Configuration of a decoder, as a hashable value."""

import dataclasses
import math

from jaxrl_llm.errors import UserError

FAMILIES = (
  'llama',
  'mistral',
  'qwen2',
  'qwen3',
  'gemma2',
  'gemma3_text',
  'gpt2',
)
DTYPES = ('float32', 'bfloat16')
ATTENTION = ('auto', 'xla', 'splash', 'cudnn')
ROPE_KINDS = ('default', 'linear', 'llama3', 'yarn', 'longrope')


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary position embedding and the stretching of its frequencies.

  Attributes:
    theta: base of the wavelengths.
    kind: one of `ROPE_KINDS`.
    factor: ratio of the largest position to that of pre-training.
    original_length: positions of the pre-training, in tokens (llama3, yarn,
      longrope).
    low_frequency, high_frequency: llama3's two limits, in periods per
      `original_length`.
    beta_fast, beta_slow, truncate: yarn's two limits, in rotations per
      `original_length`, and whether they are rounded to whole dimensions.
    attention_factor: multiplies cosine and sine (yarn, longrope).
    short_factor: longrope's divisor of each frequency, [head_dim / 2].
  """

  theta: float = 10_000.0
  kind: str = 'default'
  factor: float = 1.0
  original_length: int | None = None
  low_frequency: float = 1.0
  high_frequency: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float = 1.0
  short_factor: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture and precision of one decoder; static under `jax.jit`.

  Attributes:
    vocab_size: V, rows of the embedding (may exceed the tokenizer's size).
    hidden_size: D.
    intermediate_size: width of the feed-forward layer.
    num_layers, num_heads, num_kv_heads: L, query heads, key and value heads.
    head_dim: d, width of a head; None is hidden_size / num_heads.
    max_length: tokens that the positions cover.
    tied: the head is the embedding.
    dtype: of matrix products and the residual stream, 'float32' or
      'bfloat16'.  Norms, softmax and logits are float32 in any case.
    remat: recompute each layer in the backward pass instead of storing it.
    unroll: layers per step of the scan in training and scoring, as in
      `jax.lax.scan`.  Unrolling all of them avoids stacking and slicing, but
      compiles every layer, and `remat` then saves little on CPU, where XLA
      computes as early as it can.
    attention: kernel of training and scoring, one of `ATTENTION`; 'auto' is
      that of the platform (`kernels.choose`).
    family: the checkpoint format, one of `FAMILIES`.
    rope: rotary positions; None is a learned table of `max_length` positions.
    local_rope: rotary positions of the sliding layers, where they differ.
    window: tokens that a sliding layer sees, itself included; None is all.
    sliding: whether each layer has the window, [L].
    norm: 'rms' or 'layer' (which has a bias and subtracts the mean).
    norm_epsilon: added to the variance.
    norm_offset: added to the scale parameter (Gemma stores w − 1).
    post_norms: a norm also after attention and after the feed-forward layer.
    query_key_norm: a norm on each head's queries and keys.
    query_bias, output_bias, mlp_bias: biases of query/key/value, of the
      attention's output, and of the feed-forward layer.
    activation: 'silu', 'gelu' or 'gelu_tanh'.
    gated: the feed-forward layer is act(gate(x)) · up(x), else act(up(x)).
    embedding_scale: multiplies the embedding (Gemma: √D).
    query_scale: multiplies q·k; None is 1/√d.
    attention_softcap, logit_softcap: c of c·tanh(x/c) on q·k and on the
      logits; None is off.

  Raises:
    UserError: fields contradict each other.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  max_length: int = 2048
  tied: bool = False
  dtype: str = 'float32'
  remat: bool = False
  unroll: int = 1
  attention: str = 'auto'
  family: str = 'llama'
  rope: Rope | None = Rope()
  local_rope: Rope | None = None
  window: int | None = None
  sliding: tuple[bool, ...] = ()
  norm: str = 'rms'
  norm_epsilon: float = 1e-6
  norm_offset: float = 0.0
  post_norms: bool = False
  query_key_norm: bool = False
  query_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  activation: str = 'silu'
  gated: bool = True
  embedding_scale: float = 1.0
  query_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None

  def __post_init__(self):
    _validate_sizes(self)
    fill = lambda name, value: object.__setattr__(self, name, value)
    if self.num_kv_heads is None:
      fill('num_kv_heads', self.num_heads)
    if self.head_dim is None:
      if self.hidden_size % self.num_heads:
        raise UserError(
          f'hidden_size {self.hidden_size} is not a multiple of num_heads '
          f'{self.num_heads}; change one of them or set head_dim.'
        )
      fill('head_dim', self.hidden_size // self.num_heads)
    if self.query_scale is None:
      fill('query_scale', self.head_dim**-0.5)
    if not self.sliding:
      fill('sliding', (self.window is not None,) * self.num_layers)
    _validate(self)


def _validate_sizes(config: ModelConfig):
  """Validates sizes before others are derived from them."""
  derived = 'num_kv_heads', 'head_dim'
  for name in (
    *('vocab_size', 'hidden_size', 'intermediate_size', 'num_layers'),
    *('num_heads', 'max_length', 'unroll'),
    *(name for name in derived if getattr(config, name) is not None),
  ):
    value = getattr(config, name)
    if type(value) is not int or not 0 < value < 2**31:
      raise UserError(f'{name} must be a positive integer, got {value!r:.100}.')


def _validate(config: ModelConfig):
  for name, choices in {
    'dtype': DTYPES,
    'attention': ATTENTION,
    'family': FAMILIES,
    'norm': ('rms', 'layer'),
    'activation': ('silu', 'gelu', 'gelu_tanh'),
  }.items():
    if getattr(config, name) not in choices:
      raise UserError(
        f'{name} must be one of {", ".join(choices)}; '
        f'got {getattr(config, name)!r}.'
      )
  for name in ('norm_epsilon', 'norm_offset', 'embedding_scale'):
    _check_number(name, getattr(config, name))
  for name in ('query_scale', 'attention_softcap', 'logit_softcap'):
    if getattr(config, name) is not None:
      _check_number(name, getattr(config, name))
  window = config.window
  if window is not None and (type(window) is not int or window < 1):
    raise UserError(f'window must be a positive integer, got {window!r:.100}.')
  if config.num_heads % config.num_kv_heads:
    raise UserError(
      f'num_heads {config.num_heads} is not a multiple of num_kv_heads '
      f'{config.num_kv_heads}.'
    )
  if len(config.sliding) != config.num_layers:
    raise UserError(
      f'sliding names {len(config.sliding)} layers, '
      f'num_layers is {config.num_layers}.'
    )
  if any(config.sliding) and config.window is None:
    raise UserError('Sliding layers need a window; set window or sliding=().')
  for rope in (config.rope, config.local_rope):
    if not isinstance(rope, Rope | None):
      raise UserError(f'rope must be a Rope or None, got {rope!r:.100}.')
    if rope is not None:
      _validate_rope(config, rope)


def _check_number(name: str, value):
  if type(value) not in (int, float) or not math.isfinite(value):
    raise UserError(f'{name} must be a finite number, got {value!r:.100}.')


def _validate_rope(config: ModelConfig, rope: Rope):
  if rope.kind not in ROPE_KINDS:
    raise UserError(
      f'RoPE type {rope.kind!r} is not known; '
      f'known are {", ".join(ROPE_KINDS)}.'
    )
  for name in ('theta', 'factor'):
    value = getattr(rope, name)
    if not 0 < value < math.inf:
      raise UserError(f'RoPE needs a positive {name}, got {value!r}.')
  if config.head_dim % 2:
    raise UserError(f'RoPE needs an even head_dim, got {config.head_dim}.')
  if rope.kind in ('llama3', 'yarn', 'longrope'):
    if not rope.original_length:
      raise UserError(f'RoPE type {rope.kind!r} needs original_length.')
    # Beyond it, longrope's frequencies depend on the current length, so keys
    # already in a cache would be wrong.
    if rope.kind == 'longrope' and config.max_length > rope.original_length:
      raise UserError(
        f'RoPE type {rope.kind!r} is supported up to its original '
        f'{rope.original_length} tokens, max_length is {config.max_length}.\n'
        f'Pass max_length={rope.original_length}.'
      )
  if rope.kind == 'longrope' and len(rope.short_factor) != config.head_dim // 2:
    raise UserError(
      f'longrope needs {config.head_dim // 2} short factors, '
      f'got {len(rope.short_factor)}.'
    )


def check_length(config: ModelConfig, length: int) -> None:
  """Raises UserError if `length` tokens exceed the positions of the model.

  The model itself cannot check: true lengths are known at run time only, and
  positions past the end would silently repeat the last learned one.
  """
  if length > config.max_length:
    raise UserError(
      f'{length} tokens exceed the {config.max_length} positions of the '
      f'model (max_length); use shorter prompts or fewer new tokens.'
    )
