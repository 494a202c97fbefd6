"""Towers and common spaces: one transformer per modality, or one for all, over raw video, waveform and words (VATT, Akbari et al. 2021), or
networks that take a modality whole (MMV, Alayrac et al. 2020)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.inputs import spectrogram
from vatt_jax.models.attention import IMPLEMENTATIONS
from vatt_jax.models.common_space import CommonSpaces
from vatt_jax.models.embeddings import LinearWords, Patches, Words
from vatt_jax.models.layers import INITS, NORMS, Dense
from vatt_jax.models.towers.audio_resnet import ResNet2D, ResNet2DV2, ResNet9
from vatt_jax.models.towers.i3d import I3D
from vatt_jax.models.towers.r2plus1d import R2Plus1D
from vatt_jax.models.towers.s3d import S3D
from vatt_jax.models.towers.tsm_resnet import TSMResNet
from vatt_jax.models.transformer import REMAT, Encoder, pack, unpack
from vatt_jax.rng import Packed, Rng


@flax.struct.dataclass
class Encoded:
    """One stream after its tower. pooled [B D] (text [B K D]). tokens [B N D] without the aggregate token (text [B K L D]) and
    mask bool [B N], both None unless features were asked for. grid: token counts per axis. kept: tokens DropToken left, or None."""

    pooled: Any
    tokens: Any = None
    mask: Any = None
    grid: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    kept: Any = None


@flax.struct.dataclass
class Outputs:
    """encoded: {stream: Encoded}. spaces: {space: {stream: float32 [B(,K) E]}}, un-normalised."""

    encoded: dict[str, Encoded]
    spaces: dict[str, dict[str, Any]]


SIZE = {
    'layers': 12,
    'width': 768,
    'mlp': 3072,
    'heads': 12,
    'head_width': 64,
    'dropout': 0.1,
    'attention_dropout': 0.1,
}
PATCHES = {
    'drop_token': 0.5,
    'per_example': False,
    'replicas': 1,
    'positions': (),
    'position_dropout': 0.1,
    'patch_init': 1.0,
    'pre': False,
    'post': 0,
}
WORDS = {
    'vocab': 1 << 16,
    'word_width': 300,
    'frozen_words': True,
    'position_dropout': 0.1,
    'post': 0,
}
# Towers that are one network: name -> (modality, module). module(data, valid [B], train) -> (pooled, map); its attributes are the tower's fields.
NETS = {
    'linear': ('text', LinearWords),
    'i3d': ('video', I3D),
    's3d': ('video', S3D),
    'tsm_resnet': ('video', TSMResNet),
    'r2plus1d': ('video', R2Plus1D),
    'resnet2d': ('audio', ResNet2D),
    'resnet2d_v2': ('audio', ResNet2DV2),
    'resnet9': ('audio', ResNet9),
}


def fields(module) -> dict[str, Any]:
    """Attributes of a net that a config may set, with their defaults."""
    return {
        f.name: f.default
        for f in dataclasses.fields(module)
        if f.name not in ('parent', 'name', 'dtype')
    }


# tower name -> (modality, fields with their defaults). Sizes of published models: presets.py
TOWERS = {
    'vit': ('video', {'name': 'vit', **SIZE, **PATCHES, 'patch': (4, 16, 16)}),
    'wat': ('audio', {'name': 'wat', **SIZE, **PATCHES, 'patch': 128}),
    'spt': ('audio', {'name': 'spt', **SIZE, **PATCHES, 'patch': (16, 5), 'drop_token': 0.0}),
    't5': ('text', {'name': 't5', **SIZE, **WORDS, 'buckets': 32, 'max_distance': 64}),
    'bert': (
        'text',
        {'name': 'bert', **SIZE, **WORDS, 'positions': 16, 'pre_norm': True, 'extra': False},
    ),
    **{
        name: (modality, {'name': name, **fields(module)})
        for name, (modality, module) in NETS.items()
    },
}
AXES = {
    'vit': ('temporal', 'vertical', 'horizontal'),
    'wat': ('temporal',),
    'spt': ('temporal', 'spectral'),
}
# What an encoder of each kind of tower differs in from the default.
ENCODERS = {
    't5': lambda t: {
        'bias': False,
        'rms': True,
        'scaled': False,
        'buckets': t['buckets'],
        'max_distance': t['max_distance'],
    },
    'spt': lambda t: {'bias': False},
    'bert': lambda t: {'pre_norm': t['pre_norm']},
}


COUNTS = {
    'layers',
    'width',
    'mlp',
    'heads',
    'head_width',
    'vocab',
    'word_width',
    'replicas',
    'buckets',
    'max_distance',
}
RATES = {'dropout', 'attention_dropout', 'position_dropout', 'drop_token'}


class VATT(nn.Module):
    """config: `config.model` as a plain (frozen) dict. Streams named `modality.view` go through the tower of their modality.

    A tower is a front (stream -> tokens), an encoder (of its own, or the shared one) and maybe a post-projection; or one net that does it all.
    """

    config: Mapping[str, Any]
    dtype: str = 'float32'

    def setup(self):
        c = self.config
        fronts, encoders, posts, nets = {}, {}, {}, {}
        if c['shared']:
            shared = with_defaults(c['encoder'], SIZE, 'config.model.encoder')
            check_sizes(shared, 'config.model.encoder')
            self.shared_encoder = self._encoder(shared)
        for modality, given in c['towers'].items():
            where = f'config.model.towers.{modality}'
            of, defaults = TOWERS[choose(given['name'], TOWERS, f'{where}.name')]
            if of != modality:
                raise ConfigError(f'{where}.name={given["name"]!r} is a tower for {of}')
            t = with_defaults(given, defaults, where)
            if t['name'] in NETS:
                if c['shared']:
                    raise ConfigError(
                        f'{where}.name={t["name"]!r} has no tokens to share an encoder with; choose vit, wat, spt, t5 or bert, '
                        'or set config.model.shared=False'
                    )
                for field, options in (('norm', NORMS), ('init', INITS)):
                    if field in t:
                        choose(t[field], options, f'{where}.{field}')
                nets[modality] = NETS[t['name']][1](
                    **{k: v for k, v in t.items() if k != 'name'}, dtype=self.dtype
                )
                continue
            check_sizes(t, where)
            width = shared['width'] if c['shared'] else t['width']
            if modality == 'text':
                words = {
                    'vocab': t['vocab'],
                    'word_width': t['word_width'],
                    'width': width,
                    'frozen': t['frozen_words'],
                    'position_dropout': t['position_dropout'],
                    'dtype': self.dtype,
                }
                if c['shared']:
                    words |= {'positions': c['inputs']['text']['words'], 'bias': True}
                elif t['name'] == 'bert':
                    words |= {'positions': t['positions'], 'extra': t['extra']}
                else:
                    words |= {'dropout': t['dropout']}
                fronts[modality] = Words(**words)
            else:
                patch, size = patch_of(t), extent(modality, c['inputs'])
                if len(patch) != len(size) or not all(1 <= p <= n for p, n in zip(patch, size)):
                    raise ConfigError(
                        f'{where}.patch={t["patch"]} does not fit inputs of {size}; {len(size)} numbers from 1 to these are wanted'
                    )
                tables = tuple(t['positions']) or tuple(n // p for n, p in zip(size, patch))
                if int((1 - t['drop_token']) * math.prod(tables)) < 1:
                    raise ConfigError(
                        f'{where}.drop_token={t["drop_token"]:g} leaves none of {math.prod(tables)} tokens; lower it'
                    )
                fronts[modality] = Patches(
                    patch,
                    tables,
                    AXES[t['name']],
                    width,
                    t['drop_token'],
                    t['per_example'],
                    t['replicas'],
                    c['shared'] or t['pre'],
                    t['position_dropout'],
                    t['name'] == 'spt',
                    t['patch_init'],
                    self.dtype,
                )
            if not c['shared']:
                encoders[modality] = self._encoder(t, **ENCODERS.get(t['name'], lambda t: {})(t))
            if t['post']:
                posts[modality] = Dense(t['post'], ('embed', None), dtype=self.dtype)
        self.fronts, self.encoders, self.posts, self.nets = fronts, encoders, posts, nets
        self.head = CommonSpaces(c['head'])

    def _encoder(self, size, **options):
        c = self.config
        choose(c['attention'], IMPLEMENTATIONS, 'config.model.attention')
        choose(c['remat'], REMAT, 'config.model.remat')
        return Encoder(
            size['layers'],
            size['width'],
            size['mlp'],
            size['heads'],
            size['head_width'],
            size['dropout'],
            size['attention_dropout'],
            scan=c['scan'],
            remat=c['remat'],
            implementation=c['attention'],
            dtype=self.dtype,
            **options,
        )

    def has_tower(self, params: Mapping[str, Any], modality: str) -> bool:
        """Whether these parameters hold the tower: one that an objective never read in training was not made."""
        return any(f'{kind}_{modality}' in params for kind in ('fronts', 'nets'))

    def batch_normed(self, batch_stats: Mapping[str, Any]) -> list[str]:
        """Modalities whose tower takes statistics of the batch in training."""
        return sorted(
            name.removeprefix('nets_') for name in batch_stats if name.startswith('nets_')
        )

    def encode(
        self, name: str, stream: Mapping[str, Any], *, train: bool, rng: Rng, features: bool = False
    ) -> Encoded:
        """One device stream -> Encoded. Only a stream that meets batch statistics (NETS but linear) needs its `valid`, and only in training."""
        modality = name.split('.')[0]
        rows, shape, rng = rows_of(name, stream, rng)
        if modality in self.nets:
            pooled, tokens = self.nets[modality](rows, stream.get('valid'), train)
            grid = tokens.shape[1:-1]
            tokens = shape(tokens.reshape(len(tokens), -1, tokens.shape[-1])) if features else None
            return Encoded(
                shape(pooled), tokens, shape(rows != 0) if modality == 'text' else None, grid
            )
        tokens = self.fronts[modality](rows, rng, train)
        encoder = self.shared_encoder if self.config['shared'] else self.encoders[modality]
        return self._after(
            modality,
            tokens,
            encoder(tokens.x, tokens.mask, rng.at('encoder'), train, features),
            shape,
            features,
        )

    def _after(self, modality: str, tokens, x, shape, features: bool) -> Encoded:
        """What the encoder made of a stream's tokens -> Encoded."""
        if modality in self.posts:
            x = jax.nn.gelu(self.posts[modality](x), approximate=False)
        mask = None if tokens.mask is None else shape(tokens.mask[:, 1:])
        return Encoded(
            shape(x[:, 0]), shape(x[:, 1:]) if features else None, mask, tokens.grid, tokens.kept
        )

    def encode_all(
        self, batch: Mapping[str, Any], *, train: bool, rng: Rng, features: bool = False
    ) -> dict[str, Encoded]:
        """Every stream of the batch -> {stream: Encoded}: what `encode` makes of each, a shared encoder in one pass if config.model.packed."""
        streams = {name: s for name, s in batch.items() if isinstance(s, Mapping) and 'data' in s}
        if not (self.config['shared'] and self.config.get('packed')):
            return {
                name: self.encode(name, s, train=train, rng=rng, features=features)
                for name, s in streams.items()
            }
        rows, shapes, rngs = zip(*(rows_of(name, s, rng) for name, s in streams.items()))
        tokens = [
            self.fronts[name.split('.')[0]](x, r, train) for name, x, r in zip(streams, rows, rngs)
        ]
        examples = len(rng.examples)
        layout = tuple((t.x.shape[0] // examples, t.x.shape[1]) for t in tokens)
        x = self.shared_encoder(
            pack([t.x for t in tokens], examples),
            tuple(t.mask for t in tokens),
            Packed.of([r.at('encoder') for r in rngs], layout),
            train,
            features,
            layout,
        )
        parts = unpack(x, layout if features else tuple((k, 1) for k, _ in layout))
        return {
            name: self._after(name.split('.')[0], t, part, shape, features)
            for name, t, part, shape in zip(streams, tokens, parts, shapes)
        }

    def interact(self, encoded: dict[str, Encoded]) -> dict[str, Encoded]:
        """VATT's modalities meet only in the loss."""
        return encoded

    def project(
        self,
        encoded: Mapping[str, Encoded],
        *,
        valid: Mapping[str, Any] | None = None,
        train: bool = False,
    ):
        """{stream: Encoded} -> {space: {stream: [B(,K) E]}}. valid: {stream: bool [B]}, rows that batch statistics count (all)."""
        pooled = {name: e.pooled for name, e in encoded.items()}
        valid = (
            {name: jnp.ones(x.shape[0], bool) for name, x in pooled.items()}
            if valid is None
            else valid
        )
        return self.head(pooled, valid, train)

    def __call__(
        self, batch: Mapping[str, Any], *, train: bool, rng: Rng, features: bool = False
    ) -> Outputs:
        encoded = self.interact(self.encode_all(batch, train=train, rng=rng, features=features))
        return Outputs(
            encoded,
            self.project(encoded, valid={s: batch[s]['valid'] for s in encoded}, train=train),
        )


def rows_of(name: str, stream: Mapping[str, Any], rng: Rng):
    """(rows of a stream [R …], what gives an array of rows the stream's leading axes, rng of the rows): a sentence of a clip is a row of its own."""
    data, rng = jnp.asarray(stream['data']), rng.at(name)
    if name.split('.')[0] != 'text':
        return data, lambda y: y, rng
    lead = data.shape[:2]
    return (
        data.reshape(-1, data.shape[-1]),
        lambda y: y.reshape(*lead, *y.shape[1:]),
        rng.repeat(lead[1]),
    )


def check_sizes(fields: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for counts below 1 and for rates outside [0, 1)."""
    for name, value in fields.items():
        if name in COUNTS and value < 1:
            raise ConfigError(f'{where}.{name}={value}: a positive number is wanted')
        if name in RATES and not 0 <= value < 1:
            raise ConfigError(
                f'{where}.{name}={value:g}: a number of at least 0 and below 1 is wanted'
            )


def patch_of(tower: Mapping[str, Any]) -> tuple[int, ...]:
    """Size of a patch along each axis."""
    return tuple(tower['patch']) if isinstance(tower['patch'], (tuple, list)) else (tower['patch'],)


def extent(modality: str, inputs) -> tuple[int, ...]:
    """Length of each patched axis of the inputs a model is made for."""
    i = inputs[modality]
    if modality == 'video':
        return i['frames'], i['size'], i['size']
    if i.get('mel'):
        return spectrogram.shape(i)
    return (i['samples'],)


def tokens_of(config, modality: str) -> int:
    """Tokens of a patched modality at the model's own input size, before DropToken."""
    return math.prod(
        n // p
        for n, p in zip(
            extent(modality, config['inputs']), patch_of(config['towers'][modality]), strict=True
        )
    )
