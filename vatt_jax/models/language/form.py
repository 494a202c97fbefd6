"""What a decoder's architecture is, apart from how it is computed; the published ones."""

from __future__ import annotations

import dataclasses
import math

from vatt_jax.config import ConfigError, check_range, choose
from vatt_jax.models.language.rotary import SCALINGS, Scaling
from vatt_jax.models.layers import ACTIVATIONS

POSITIONS = ('learned', 'rotary')
# The matrices of a layer, `mlp_gate` only where it is gated.
ATTENTION = ('query', 'key', 'value', 'out')
PROJECTIONS = (*ATTENTION, 'mlp_in', 'mlp_gate', 'mlp_out')
COUNTS = ('vocab', 'layers', 'width', 'mlp', 'heads', 'key_heads', 'head_width', 'context')


@dataclasses.dataclass(frozen=True)
class Form:
    """The architecture of a decoder; the defaults are those of the smallest GPT-2.

    Attributes:
        vocab: rows of the word table.
        layers: of the decoder.
        width: D.
        mlp: hidden width of the feed-forward part.
        heads: of queries.
        key_heads: of keys and values. It divides `heads`: so many queries share one (grouped-query
            attention, Ainslie et al. 2023).
        head_width: of each head.
        context: most tokens of a text: rows of the table of learned positions, or (rotary) what
            the model was made for.
        positions: entry of POSITIONS.
        rope_base: of rotary positions.
        rope_scaling: of rotary positions; None: none.
        rms: whether norms are RMS norms, without a mean and a bias.
        eps: of all norms, added to the variance.
        activation: entry of layers.ACTIVATIONS.
        gated: whether the feed-forward part is W2 (act(Wg x) · W1 x) (SwiGLU with `silu`; Shazeer
            2020), else W2 act(W1 x).
        biased: entries of PROJECTIONS that have a bias.
        tied: whether the output is the word table.
    """

    vocab: int
    layers: int = 12
    width: int = 768
    mlp: int = 3072
    heads: int = 12
    key_heads: int = 12
    head_width: int = 64
    context: int = 1024
    positions: str = 'learned'
    rope_base: float = 10_000.0
    rope_scaling: Scaling | None = None
    rms: bool = False
    eps: float = 1e-5
    activation: str = 'gelu_tanh'
    gated: bool = False
    biased: tuple[str, ...] = PROJECTIONS
    tied: bool = True

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f'Form.{name}: expected at least 1, got {getattr(self, name)}')
        choose(self.positions, POSITIONS, 'Form.positions')
        choose(self.activation, ACTIVATIONS, 'Form.activation')
        for name in self.biased:
            choose(name, PROJECTIONS, 'Form.biased')
        if self.heads % self.key_heads:
            raise ConfigError(
                f'Form.key_heads: expected a divisor of heads={self.heads}, got {self.key_heads}'
            )
        if self.positions == 'rotary' and self.head_width % 2:
            raise ConfigError(
                'Form.head_width: expected an even number, since rotary positions turn pairs, got '
                f'{self.head_width}'
            )
        check_range(self.eps, 0, math.inf, 'Form.eps')
        check_range(self.rope_base, 1, math.inf, 'Form.rope_base')
        if self.rope_scaling is not None:
            _check_scaling(self.rope_scaling)


def _check_scaling(scaling: Scaling) -> None:
    choose(scaling.kind, SCALINGS, 'Form.rope_scaling.kind')
    check_range(scaling.factor, 1, math.inf, 'Form.rope_scaling.factor')
    check_range(scaling.original, 1, math.inf, 'Form.rope_scaling.original')
    check_range(scaling.low, 0, math.inf, 'Form.rope_scaling.low')
    if not scaling.low < scaling.high < math.inf:
        raise ConfigError(
            f'Form.rope_scaling.high: expected more than low={scaling.low}, got {scaling.high}'
        )


# Llama's parts: no bias, RMS norms, rotary positions, SwiGLU.
LLAMA = Form(
    vocab=32_000,
    layers=32,
    width=4096,
    mlp=11_008,
    heads=32,
    key_heads=32,
    head_width=128,
    context=4096,
    positions='rotary',
    rms=True,
    activation='silu',
    gated=True,
    biased=(),
    tied=False,
)
GPT2 = Form(vocab=50_257)
# Radford et al. 2019; Touvron et al. 2023; Llama 3.2's config.json.
PUBLISHED: dict[str, Form] = {
    'gpt2': GPT2,
    'gpt2_medium': dataclasses.replace(
        GPT2, layers=24, width=1024, mlp=4096, heads=16, key_heads=16
    ),
    'gpt2_large': dataclasses.replace(
        GPT2, layers=36, width=1280, mlp=5120, heads=20, key_heads=20
    ),
    'gpt2_xl': dataclasses.replace(GPT2, layers=48, width=1600, mlp=6400, heads=25, key_heads=25),
    'llama2_7b': LLAMA,
    'llama3_2_1b': dataclasses.replace(
        LLAMA,
        vocab=128_256,
        layers=16,
        width=2048,
        mlp=8192,
        key_heads=8,
        head_width=64,
        context=131_072,
        rope_base=500_000.0,
        rope_scaling=Scaling('llama3', factor=32.0),
        tied=True,
    ),
}
