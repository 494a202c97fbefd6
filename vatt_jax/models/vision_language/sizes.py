"""Sizes of ViLBERT and UNITER: the published ones, and those that a release's config says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vatt_jax.config import ConfigError, choose
from vatt_jax.models.fusion.blocks import BlockOptions
from vatt_jax.models.layers import ACTIVATIONS

# How ViLBERT joins the vectors of both streams.
PRODUCT, SUM = 'mul', 'sum'
JOINS = (PRODUCT, SUM)
# Of all layer norms, as released.
EPS = 1e-12


def check_heads(field: str, width: int, heads: int) -> None:
    """Check that heads divide a width.

    Raises:
        ConfigError: they do not.
    """
    if heads < 1 or width % heads:
        raise ConfigError(f'{field}: expected a multiple of {heads} heads, got {width}')


def check_stops(field: str, stops: Sequence[int], count: int) -> None:
    """Check before which layers co-attention comes.

    Raises:
        ConfigError: they are out of order, or there are no such layers.
    """
    is_sorted = all(a <= b for a, b in zip(stops, stops[1:]))
    if not is_sorted or any(not 0 <= stop <= count for stop in stops):
        raise ConfigError(
            f'{field}: expected numbers from 0 to {count}, each at least the one before, got '
            f'{tuple(stops)}'
        )


@dataclasses.dataclass(frozen=True)
class Layers:
    """Transformer layers of one stream.

    Attributes:
        count: how many.
        width: D.
        heads: of the attention; they divide the width.
        mlp: hidden width of the feed-forward part.
    """

    count: int
    width: int
    heads: int
    mlp: int

    def __post_init__(self) -> None:
        check_heads('width', self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class VilbertSizes:
    """Sizes of ViLBERT (Lu et al. 2019).

    Attributes:
        text: layers of the words.
        image: layers of the regions.
        co_width: width of queries, keys and values in co-attention, and of the pooled vectors.
        co_heads: heads there.
        text_stops: before which layer of the words each co-attention comes.
        image_stops: likewise of the regions.
        vocabulary: rows of the word table.
        positions: rows of the position table, the longest sentence.
        types: rows of the table of segments.
        feature_width: of a region's feature.
        targets: what is told of a masked region: classes of the detector, or width of a feature.
        join: entry of JOINS, how the pooled vectors of both streams are joined.
        activation: entry of layers.ACTIVATIONS.
        dropout: rate, after embeddings and before residual sums.
        attention_dropout: rate on attention probabilities.
    """

    text: Layers = Layers(12, 768, 12, 3072)
    image: Layers = Layers(6, 1024, 8, 1024)
    co_width: int = 1024
    co_heads: int = 8
    text_stops: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    image_stops: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    vocabulary: int = 30522
    positions: int = 512
    types: int = 2
    feature_width: int = 2048
    targets: int = 1601
    join: str = PRODUCT
    activation: str = 'gelu'
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_heads('co_width', self.co_width, self.co_heads)
        choose(self.join, JOINS, 'join')
        choose(self.activation, ACTIVATIONS, 'activation')
        if len(self.text_stops) != len(self.image_stops):
            raise ConfigError(
                'text_stops and image_stops: expected as many of either, one for each '
                f'co-attention, got {len(self.text_stops)} and {len(self.image_stops)}'
            )
        check_stops('text_stops', self.text_stops, self.text.count)
        check_stops('image_stops', self.image_stops, self.image.count)

    @classmethod
    def from_release(cls, config: Mapping[str, Any]) -> VilbertSizes:
        """Sizes of a release's config (.json of vilbert_beta and vilbert-multi-task).

        Raises:
            ConfigError: a field is missing, or asks for what is not built.
        """
        reader = _Reader(config)
        # Options of the released code that none of its ViLBERT configs turns on.
        for name, usual in VILBERT_FIXED.items():
            reader.check_fixed(name, usual)
        reader.check_same('hidden_act', 'v_hidden_act')
        reader.check_same('hidden_dropout_prob', 'v_hidden_dropout_prob')
        reader.check_same('attention_probs_dropout_prob', 'v_attention_probs_dropout_prob')
        return cls(
            text=reader.layers(''),
            image=reader.layers('v_'),
            co_width=reader['bi_hidden_size'],
            co_heads=reader['bi_num_attention_heads'],
            text_stops=tuple(reader['t_biattention_id']),
            image_stops=tuple(reader['v_biattention_id']),
            feature_width=reader['v_feature_size'],
            targets=reader['v_target_size'],
            join=config.get('fusion_method', PRODUCT),
            **reader.shared(),
        )


@dataclasses.dataclass(frozen=True)
class UniterSizes:
    """Sizes of UNITER (Chen et al. 2020).

    Attributes:
        layers: of words and regions.
        vocabulary: rows of the word table.
        positions: rows of the position table, the longest sentence.
        types: rows of the table of segments: 0 of words, 1 of regions.
        feature_width: of a region's feature.
        classes: of the detector.
        activation: entry of layers.ACTIVATIONS.
        dropout: rate, after embeddings and before residual sums.
        attention_dropout: rate on attention probabilities.
    """

    layers: Layers = Layers(12, 768, 12, 3072)
    vocabulary: int = 28996
    positions: int = 512
    types: int = 2
    feature_width: int = 2048
    classes: int = 1601
    activation: str = 'gelu'
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        choose(self.activation, ACTIVATIONS, 'activation')

    @classmethod
    def from_release(
        cls, config: Mapping[str, Any], feature_width: int = 2048, classes: int = 1601
    ) -> UniterSizes:
        """Sizes of a release's config (uniter-base.json).

        Args:
            config: what the file holds.
            feature_width: of a region's feature; the file does not say it.
            classes: of the detector; likewise.

        Raises:
            ConfigError: a field is missing.
        """
        reader = _Reader(config)
        return cls(
            layers=reader.layers(''),
            feature_width=feature_width,
            classes=classes,
            **reader.shared(),
        )


# Field of a release's config -> the only value that is built; it is also what a file means that
# does not have the field.
VILBERT_FIXED = {
    'model': 'bert',
    'with_coattention': True,
    'in_batch_pairs': False,
    'dynamic_attention': False,
    'task_specific_tokens': False,
}


class _Reader:
    """A release's config, whose missing fields are named."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __getitem__(self, name: str) -> Any:
        if name not in self.config:
            raise ConfigError(f'config of the release: expected a field {name!r}, got none')
        return self.config[name]

    def layers(self, prefix: str) -> Layers:
        """Layers of the stream whose fields begin with a prefix."""
        return Layers(
            count=self[f'{prefix}num_hidden_layers'],
            width=self[f'{prefix}hidden_size'],
            heads=self[f'{prefix}num_attention_heads'],
            mlp=self[f'{prefix}intermediate_size'],
        )

    def shared(self) -> dict[str, Any]:
        """Fields that both models have."""
        return {
            'vocabulary': self['vocab_size'],
            'positions': self['max_position_embeddings'],
            'types': self['type_vocab_size'],
            'activation': self['hidden_act'],
            'dropout': self['hidden_dropout_prob'],
            'attention_dropout': self['attention_probs_dropout_prob'],
        }

    def check_fixed(self, name: str, usual: Any) -> None:
        """Check that a field says what is built."""
        found = self.config.get(name, usual)
        if found != usual:
            raise ConfigError(
                f'config of the release: {name}: only {usual!r} is built, got {found!r}'
            )

    def check_same(self, text: str, image: str) -> None:
        """Check that a field of the regions is that of the words."""
        if self.config.get(image, self[text]) != self[text]:
            raise ConfigError(
                f'config of the release: {image}: expected that of {text}, {self[text]!r}, got '
                f'{self.config[image]!r}'
            )


def block_options(
    layers: Layers, sizes: VilbertSizes | UniterSizes, implementation: str, dtype: str
) -> BlockOptions:
    """Layers as BERT has them: norms after the sums, no dropout inside the feed-forward part."""
    return BlockOptions(
        mlp=layers.mlp,
        heads=layers.heads,
        head_width=layers.width // layers.heads,
        dropout=sizes.dropout,
        hidden_dropout=0.0,
        attention_dropout=sizes.attention_dropout,
        pre_norm=False,
        eps=EPS,
        activation=sizes.activation,
        kernel_init='bert',
        depth=layers.count,
        implementation=implementation,
        dtype=dtype,
    )


# Published and small ones. `small` learns on two CPU cores, `tiny` is for tests.
VILBERT: dict[str, VilbertSizes] = {
    'base': VilbertSizes(),
    # The words' layers of BERT-large (bert_large_6layer_6conect.json).
    'large': VilbertSizes(text=Layers(24, 1024, 16, 4096), text_stops=(18, 19, 20, 21, 22, 23)),
    'small': VilbertSizes(
        text=Layers(3, 96, 4, 192),
        image=Layers(2, 96, 4, 192),
        co_width=96,
        co_heads=4,
        text_stops=(1, 2),
        image_stops=(0, 1),
        dropout=0.0,
        attention_dropout=0.0,
    ),
    'tiny': VilbertSizes(
        text=Layers(4, 24, 3, 40),
        image=Layers(2, 32, 4, 36),
        co_width=16,
        co_heads=2,
        text_stops=(2, 3),
        image_stops=(0, 1),
        vocabulary=50,
        positions=16,
        feature_width=12,
        targets=11,
    ),
}
UNITER: dict[str, UniterSizes] = {
    'base': UniterSizes(),
    'large': UniterSizes(layers=Layers(24, 1024, 16, 4096)),
    'small': UniterSizes(layers=Layers(3, 96, 4, 192), dropout=0.0, attention_dropout=0.0),
    'tiny': UniterSizes(
        layers=Layers(3, 24, 3, 40), vocabulary=50, positions=16, feature_width=12, classes=11
    ),
}
