"""Towers and common spaces: the model of VATT, MMV, SeLaVi and CLIP.

Either one transformer for each modality, or one for all of them, over raw video, waveform and words
(VATT, Akbari et al. 2021); or networks that take a modality whole (MMV, Alayrac et al. 2020); or
transformers over pictures and sentences (CLIP, Radford et al. 2021).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vatt_jax.config import LARGEST_COUNT, ConfigError, choose, with_defaults
from vatt_jax.inputs import spectrogram
from vatt_jax.inputs.batch import modality_of
from vatt_jax.inputs.modalities import PICTURES, kind_of
from vatt_jax.models import adapters, fusion
from vatt_jax.models.attention import IMPLEMENTATIONS
from vatt_jax.models.common_space import CommonSpaces
from vatt_jax.models.embeddings import LinearWords, Patches, Tokens, Words
from vatt_jax.models.language.tower import LanguageTower
from vatt_jax.models.layers import ACTIVATIONS, INITS, NORMS, Dense
from vatt_jax.models.towers.audio_resnet import ResNet2D, ResNet2DV2, ResNet9
from vatt_jax.models.towers.avid import AVIDAudio, AVIDVideo
from vatt_jax.models.towers.clip_resnet import CLIPResNet
from vatt_jax.models.towers.clip_transformers import (
    PICTURE_POOLS,
    TEXT_POOLS,
    AttentionPooling,
    FrameMixing,
    PictureTokens,
    SentenceTokens,
)
from vatt_jax.models.towers.i3d import I3D
from vatt_jax.models.towers.mixed_convolutions import MixedConvolutions
from vatt_jax.models.towers.r2plus1d import R2Plus1D
from vatt_jax.models.towers.r3d import R3D
from vatt_jax.models.towers.resnet_2d3d import ResNet2D3D
from vatt_jax.models.towers.s3d import S3D
from vatt_jax.models.towers.stages import sown_stages
from vatt_jax.models.towers.tsm_resnet import TSMResNet
from vatt_jax.models.towers.vggish import VGGish
from vatt_jax.models.transformer import BLOCK_INITS, REMAT, Encoder, pack, take_token, unpack
from vatt_jax.rng import Packed, Rng

# The fields stay `Any`: JAX rebuilds these dataclasses with specs, None or booleans as leaves.


@flax.struct.dataclass
class Encoded:
    """One stream after its tower.

    Attributes:
        pooled: [B D], for text [B K D]: a transformer's output at the aggregate token, or what a
            network pools.
        tokens: [B N D] without the aggregate token, for text [B K L D]. None unless features were
            asked for. CLIP's words include the marks of begin and end.
        mask: bool [B N], which tokens are words, for text only.
        grid: number of tokens along each axis.
        kept: int [N'] or [B N'], the tokens that DropToken left, or None.
        stages: {number: [B grid… D]}, features after each stage of a convolutional tower; empty
            unless the pass lets them be sown (towers/stages.py).
    """

    pooled: Any
    tokens: Any = None
    mask: Any = None
    grid: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    kept: Any = None
    stages: Any = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Outputs:
    """What the whole model returns.

    Attributes:
        encoded: {stream: Encoded}.
        spaces: {space: {stream: float32 [B E], for text [B K E]}}, un-normalised.
    """

    encoded: dict[str, Encoded]
    spaces: dict[str, dict[str, Any]]


# Fields of every transformer.
SIZE = {
    'layers': 12,
    'width': 768,
    'mlp': 3072,  # hidden width of the feed-forward part
    'heads': 12,
    'head_width': 64,  # of queries, keys and values; heads · head_width need not be width
    'dropout': 0.1,
    'attention_dropout': 0.1,
}
# Fields of a tower over patches of video, waveform or spectrogram.
PATCHES = {
    'drop_token': 0.5,  # share of the tokens dropped in training
    'per_example': False,  # each clip drops tokens of its own, else one choice for the batch
    'replicas': 1,  # parts of the batch that each make that choice
    'positions': (),  # rows of the position tables; (): those of the inputs' grid
    'position_dropout': 0.1,
    'patch_init': 1.0,  # factor on the patch matrix's initial values
    'pool': 'aggregate',  # entry of POOLS
    'pre': False,  # a further Dense + GELU for each token before the positions
    'post': 0,  # width of a Dense + GELU after the encoder; 0: none
}
# What the vector of a clip is: the output at the aggregate token, or the mean of all others, for
# objectives that train these alone (docs/jepa.md).
POOLS = ('aggregate', 'mean')
# Fields of a transformer tower over words.
WORDS = {
    'vocab': 1 << 16,  # rows of the word table
    'word_width': 300,  # of word2vec's vectors
    'frozen_words': True,  # the word table is not trained
    'position_dropout': 0.1,
    'post': 0,
}
# Fields of CLIP's transformers. They have no dropout.
CLIP = {
    'layers': 12,
    'width': 768,
    'mlp': 3072,
    'heads': 12,
    'head_width': 64,
    'activation': 'quick_gelu',  # entry of layers.ACTIVATIONS
    'eps': 1e-5,  # of all norms, added to the variance
}
# Towers that are one network: name -> (modality, module).
# module(data, valid [B], train) -> (pooled, map); its attributes are the tower's config fields.
NETS: dict[str, tuple[str, Any]] = {
    'linear': ('text', LinearWords),
    'language': ('text', LanguageTower),
    'i3d': ('video', I3D),
    's3d': ('video', S3D),
    'tsm_resnet': ('video', TSMResNet),
    'r2plus1d': ('video', R2Plus1D),
    'r3d': ('video', R3D),
    'resnet_2d3d': ('video', ResNet2D3D),
    'mixed_convolutions': ('video', MixedConvolutions),
    'resnet2d': ('audio', ResNet2D),
    'resnet2d_v2': ('audio', ResNet2DV2),
    'resnet9': ('audio', ResNet9),
    'vggish': ('audio', VGGish),
    'clip_resnet': ('video', CLIPResNet),
    'avid_video': ('video', AVIDVideo),
    'avid_audio': ('audio', AVIDAudio),
}


def net_fields(module: Any) -> dict[str, Any]:
    """Attributes of a net's class that a config may set, with their defaults."""
    not_configurable = ('parent', 'name', 'dtype')
    return {
        field.name: field.default
        for field in dataclasses.fields(module)
        if field.name not in not_configurable
    }


# tower name -> (modality, fields with their defaults). Sizes of published models: presets.py.
# patch: frames, rows and columns (vit); samples (wat); spectrogram steps and bands (spt).
# positions of bert: rows of its position table.
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    'vit': ('video', {'name': 'vit', **SIZE, **PATCHES, 'patch': (4, 16, 16)}),
    'wat': ('audio', {'name': 'wat', **SIZE, **PATCHES, 'patch': 128}),
    'spt': (
        'audio',
        {
            'name': 'spt',
            **SIZE,
            **PATCHES,
            'patch': (16, 5),
            'drop_token': 0.0,
            # Whether rows of the position tables are taken as if the grid were turned, as released
            # weights want it (docs/vatt.md).
            'transposed': True,
        },
    ),
    't5': ('text', {'name': 't5', **SIZE, **WORDS, 'buckets': 32, 'max_distance': 64}),
    'bert': (
        'text',
        {'name': 'bert', **SIZE, **WORDS, 'positions': 16, 'pre_norm': True, 'extra': False},
    ),
    'clip_vit': (
        'video',
        {
            'name': 'clip_vit',
            **CLIP,
            'patch': 32,  # side in pixels
            'positions': (),  # rows and columns of the position table; (): those of the inputs
            'pool': 'class',  # entry of PICTURE_POOLS
            'token_norm': True,  # of tokens before the layers
            'patch_bias': False,
            'drop_token': 0.0,
            'per_example': True,
            'init': 'torch',  # entry of transformer.BLOCK_INITS
            # Over the vectors of a clip's frames, before their mean (FrameMixing); 0: the mean.
            'time_layers': 0,
        },
    ),
    'clip_text': (
        'text',
        {
            'name': 'clip_text',
            **CLIP,
            'vocab': 49408,
            'positions': 0,  # rows of the position table; 0: the words of a sentence
            'pool': 'end',  # entry of TEXT_POOLS
            'causal': True,
            'spreads': (0.02, 0.01),  # deviation of initial words and of initial positions
            'init': 'clip',
        },
    ),
}
# Towers of CLIP's kind: what reads their vector off is a field.
CLIP_TOWERS = {'clip_vit': PICTURE_POOLS, 'clip_text': TEXT_POOLS}


def register_net(name: str, modality: str, module: Any) -> None:
    """Makes a network of one's own a tower that a config may name (CONTRIBUTING.md)."""
    NETS[name] = (modality, module)
    TOWERS[name] = (modality, {'name': name, **net_fields(module)})


# A copy, since registering writes to the dict that is iterated.
for _name, (_modality, _module) in tuple(NETS.items()):
    register_net(_name, _modality, _module)

# Names of the patched axes, which are those of the position tables.
AXES = {
    'vit': ('temporal', 'vertical', 'horizontal'),
    'wat': ('temporal',),
    'spt': ('temporal', 'spectral'),
}

# Fields that must be at least 1, and fields that must lie in [0, 1).
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


class MultimodalEncoder(nn.Module):
    """A tower for each modality and the common spaces that they project into.

    Streams named `modality.view` go through the tower of their modality. A tower is a front (stream
    to tokens), an encoder (one for this tower, or the shared one) and maybe a post-projection; or
    one net that does it all.

    Attributes:
        config: `config.model` as a plain (frozen) dict.
        dtype: of activations; parameters are float32.
        frozen: whether towers and common spaces compute in training as in evaluation: no dropout,
            no DropToken, no statistics of the batch. Adapters do not.
    """

    config: Mapping[str, Any]
    dtype: str = 'float32'
    frozen: bool = False

    def setup(self) -> None:
        config = self.config
        is_shared = config['shared']
        if is_shared:
            shared_sizes = with_defaults(config['encoder'], SIZE, 'config.model.encoder')
            check_sizes(shared_sizes, 'config.model.encoder')
            self.shared_encoder = self._make_encoder(shared_sizes)

        # Collected in local dicts: Flax freezes a dict when it becomes an attribute of a module.
        fronts: dict[str, nn.Module] = {}
        encoders: dict[str, nn.Module] = {}
        posts: dict[str, nn.Module] = {}
        pools: dict[str, nn.Module] = {}
        times: dict[str, nn.Module] = {}
        nets: dict[str, nn.Module] = {}
        for modality, given in config['towers'].items():
            where = f'config.model.towers.{modality}'
            tower = resolve_tower(modality, given, where)
            if tower['name'] in NETS:
                nets[modality] = self._make_net(tower, where)
                continue
            check_sizes(tower, where)
            if tower['name'] in CLIP_TOWERS:
                fronts[modality] = self._make_clip_front(modality, tower, where)
                encoders[modality] = self._make_encoder(tower, **encoder_options(tower))
                if tower['pool'] == 'map':
                    pools[modality] = self._make_pool(tower)
                if tower.get('time_layers', 0):
                    times[modality] = self._make_frame_mixing(modality, tower, where)
                continue
            # Tokens must have the width of the encoder that reads them.
            width = shared_sizes['width'] if is_shared else tower['width']
            if modality == 'text':
                fronts[modality] = self._make_words(tower, width)
            else:
                fronts[modality] = self._make_patches(modality, tower, width, where)
            if not is_shared:
                encoders[modality] = self._make_encoder(tower, **encoder_options(tower))
            if tower['post']:
                posts[modality] = Dense(tower['post'], ('embed', None), dtype=self.dtype)

        # Flax names submodules after these attributes, and so the parameters: `fronts_video`, …
        self.fronts = fronts
        self.encoders = encoders
        self.posts = posts
        self.pools = pools
        self.times = times
        self.nets = nets
        self.head = CommonSpaces(config['head'])
        self.adapters = self._make_adapters()
        self.fusion = fusion.build(config, self.dtype)

    def _make_encoder(self, sizes: ConfigDict, **options: Any) -> Encoder:
        """A transformer of the given sizes."""
        config = self.config
        choose(config['attention'], IMPLEMENTATIONS, 'config.model.attention')
        choose(config['remat'], REMAT, 'config.model.remat')
        return Encoder(
            layers=sizes['layers'],
            width=sizes['width'],
            mlp=sizes['mlp'],
            heads=sizes['heads'],
            head_width=sizes['head_width'],
            dropout=sizes.get('dropout', 0.0),
            attention_dropout=sizes.get('attention_dropout', 0.0),
            scan=config['scan'],
            remat=config['remat'],
            implementation=config['attention'],
            dtype=self.dtype,
            **options,
        )

    def _make_adapters(self) -> dict[str, adapters.Adapter]:
        """The adapter of each tower that has one."""
        config = self.config
        if not config.get('adapter'):
            return {}
        if config['shared'] and config['packed']:
            raise ConfigError(
                'config.model.packed=True: adapters are of one modality, and the shared encoder '
                'takes all in one pass; set config.model.packed=False'
            )
        towers = {}
        for modality, given in config['towers'].items():
            tower = resolve_tower(modality, given, f'config.model.towers.{modality}')
            sizes = config['encoder'] if config['shared'] else tower
            sizes = {**SIZE, **sizes}
            towers[modality] = describe_tower(modality, tower, sizes, config['inputs'])
        return adapters.build(config['adapter'], towers, self.dtype)

    def _make_net(self, tower: ConfigDict, where: str) -> nn.Module:
        """A tower that is one network."""
        name = tower['name']
        if self.config['shared']:
            raise ConfigError(
                f'{where}.name={name!r} has no tokens to share an encoder with; choose vit, wat, '
                'spt, t5 or bert, or set config.model.shared=False'
            )
        if 'norm' in tower:
            choose(tower['norm'], NORMS, f'{where}.norm')
        if 'init' in tower:
            choose(tower['init'], INITS, f'{where}.init')
        _, module = NETS[name]
        fields = {field: value for field, value in tower.items() if field != 'name'}
        return module(**fields, dtype=self.dtype)

    def _make_words(self, tower: ConfigDict, width: int) -> Words:
        """The front of a transformer over words; see `Words` for the three kinds."""
        options: dict[str, Any]
        if self.config['shared']:
            # The modality-agnostic encoder has no relative positions, so words need absolute ones.
            options = {'positions': self.config['inputs']['text']['words'], 'bias': True}
        elif tower['name'] == 'bert':
            options = {'positions': tower['positions'], 'extra': tower['extra']}
        else:
            options = {'dropout': tower['dropout']}
        return Words(
            vocab=tower['vocab'],
            word_width=tower['word_width'],
            width=width,
            frozen=tower['frozen_words'],
            position_dropout=tower['position_dropout'],
            dtype=self.dtype,
            **options,
        )

    def _make_patches(self, modality: str, tower: ConfigDict, width: int, where: str) -> Patches:
        """The front of a transformer over patches of video, waveform or spectrogram."""
        choose(tower['pool'], POOLS, f'{where}.pool')
        patch = patch_of(tower)
        input_size = extent(modality, self.config['inputs'])
        fits = len(patch) == len(input_size) and all(
            1 <= length <= limit for length, limit in zip(patch, input_size)
        )
        if not fits:
            raise ConfigError(
                f'{where}.patch: expected {len(input_size)} numbers from 1 to {input_size}, '
                f'the size of the inputs, got {tower["patch"]}.'
            )
        # Published models fix the size of their position tables; others follow their inputs.
        tables = tuple(tower['positions'])
        if not tables:
            tables = tuple(limit // length for limit, length in zip(input_size, patch))
        # `Patches` counts in the same way; no token at all would leave only the aggregate one.
        num_tokens = math.prod(tables)
        if int((1 - tower['drop_token']) * num_tokens) < 1:
            raise ConfigError(
                f'{where}.drop_token={tower["drop_token"]:g} leaves none of {num_tokens} tokens; '
                'lower it'
            )
        return Patches(
            patch=patch,
            tables=tables,
            names=AXES[tower['name']],
            width=width,
            drop_token=tower['drop_token'],
            per_example=tower['per_example'],
            replicas=tower['replicas'],
            projection=self.config['shared'] or tower['pre'],
            position_dropout=tower['position_dropout'],
            transposed=tower.get('transposed', False),
            patch_init=tower['patch_init'],
            dtype=self.dtype,
        )

    def _make_clip_front(self, modality: str, tower: ConfigDict, where: str) -> nn.Module:
        """The front of CLIP's transformer over pictures, or over sentences."""
        if self.config['shared']:
            raise ConfigError(
                f'{where}.name={tower["name"]!r} has layers of its own kind; set '
                'config.model.shared=False'
            )
        check_clip(tower, where)
        if modality == 'text':
            context = tower['positions'] or self.config['inputs']['text']['words']
            if context < self.config['inputs']['text']['words']:
                raise ConfigError(
                    f'{where}.positions={context}: expected at least config.model.inputs.text.words'
                    f'={self.config["inputs"]["text"]["words"]}, or 0 for that number'
                )
            return SentenceTokens(
                vocab=tower['vocab'],
                context=context,
                width=tower['width'],
                pool=tower['pool'],
                spreads=tuple(tower['spreads']),
                dtype=self.dtype,
            )
        size = self.config['inputs'][modality]['size']
        if not 1 <= tower['patch'] <= size:
            raise ConfigError(
                f'{where}.patch: expected a number from 1 to {size}, the size of the inputs, got '
                f'{tower["patch"]}.'
            )
        side = size // tower['patch']
        table = tuple(tower['positions']) or (side, side)
        if int((1 - tower['drop_token']) * side * side) < 1:
            raise ConfigError(
                f'{where}.drop_token={tower["drop_token"]:g} leaves none of {side * side} tokens; '
                'lower it'
            )
        return PictureTokens(
            patch=tower['patch'],
            table=table,
            width=tower['width'],
            class_token=tower['pool'] == 'class',
            norm=tower['token_norm'],
            eps=tower['eps'],
            bias=tower['patch_bias'],
            drop_token=tower['drop_token'],
            per_example=tower['per_example'],
            dtype=self.dtype,
        )

    def _make_pool(self, tower: ConfigDict) -> AttentionPooling:
        """What reads a picture off its tokens where no class token does."""
        return AttentionPooling(
            width=tower['width'],
            mlp=tower['mlp'],
            heads=tower['heads'],
            eps=tower['eps'],
            activation=tower['activation'],
            dtype=self.dtype,
        )

    def _make_frame_mixing(self, modality: str, tower: ConfigDict, where: str) -> FrameMixing:
        """Layers over the frames of a clip."""
        frames = self.config['inputs'][modality]['frames']
        if tower['time_layers'] < 0 or frames < 2:
            raise ConfigError(
                f'{where}.time_layers={tower["time_layers"]}: expected a positive number for clips '
                f'of several frames (config.model.inputs.{modality}.frames={frames}), or 0'
            )
        return FrameMixing(
            layers=tower['time_layers'],
            width=tower['width'],
            mlp=tower['mlp'],
            heads=tower['heads'],
            head_width=tower['head_width'],
            frames=frames,
            eps=tower['eps'],
            activation=tower['activation'],
            dtype=self.dtype,
        )

    def has_tower(self, params: Mapping[str, Any], modality: str) -> bool:
        """Return whether these parameters hold the tower of a modality.

        Flax makes a tower's parameters at its first use, so a tower that the objective never read
        in training has none.
        """
        return f'fronts_{modality}' in params or f'nets_{modality}' in params

    def batch_normed(self, batch_stats: Mapping[str, Any]) -> list[str]:
        """Return the modalities whose tower takes statistics of the batch in training."""
        modalities = set()
        for name in batch_stats:
            kind, _, modality = name.partition('_')
            # Those of a frozen tower stay; an adapter's own do not.
            if kind == 'adapters' or (kind == 'nets' and not self.frozen):
                modalities.add(modality)
        return sorted(modalities)

    def encode(
        self, name: str, stream: Mapping[str, Any], *, train: bool, rng: Rng, features: bool = False
    ) -> Encoded:
        """Encode one device stream.

        Args:
            name: of the stream, `modality` or `modality.view`.
            stream: its arrays; `data` is read. A tower that takes batch statistics (NETS but
                linear) reads `valid` as well, and only in training. A tower over patches sees the
                tokens `keep`, int32 [B N'], alone, where the stream has that entry.
            train: whether dropout, DropToken and batch statistics are on.
            rng: of the whole batch.
            features: whether to return every token as well as the pooled vector.
        """
        modality = modality_of(name)
        rows, leading, row_rng = flatten_sentences(name, stream, rng)
        adapter = self.adapters.get(modality)
        if adapter is not None:
            rows = adapter.pixels(rows, row_rng.at('adapter'))
        # Of adapters' own layers; those of the tower may be frozen.
        adapter_trains, train = train, train and not self.frozen
        if modality in self.nets:
            # [R D], [R grid… D]
            pooled, feature_map = self.nets[modality](rows, stream.get('valid'), train)
            grid = feature_map.shape[1:-1]
            tokens = None
            if features:
                tokens = feature_map.reshape(len(feature_map), -1, feature_map.shape[-1])
                tokens = restore_leading(tokens, leading)  # [B N D]
            mask = None
            if modality == 'text':
                mask = restore_leading(rows != 0, leading)  # [B K L]; id 0 is padding
            stages = sown_stages(self.nets[modality].variables)
            return Encoded(restore_leading(pooled, leading), tokens, mask, grid, stages=stages)

        inserted: dict[str, Any] = {}
        if adapter is not None:
            inserted = self._inserted(adapter, rows, adapter_trains)
        if 'keep' in stream:
            if not isinstance(self.fronts[modality], Patches):
                raise ConfigError(
                    f'config.model.towers.{modality}: expected a tower over patches, such as vit '
                    'or spt, of which some tokens alone can be seen'
                )
            inserted['keep'] = stream['keep']
        # x [R N D], R = B or B·K
        front_tokens = self.fronts[modality](rows, row_rng, train, **inserted)
        encoder = self.shared_encoder if self.config['shared'] else self.encoders[modality]
        needs_all = features or modality in self.pools or self._takes_mean(modality)
        encoded = encoder(
            front_tokens.x,
            front_tokens.mask,
            row_rng.at('encoder'),
            train,
            needs_all,
            read=front_tokens.read,
            adapter=None if adapter is None else adapter.layers(),
        )
        if 'extra' in inserted and needs_all:
            # They are not of the input.
            encoded = encoded[:, : -inserted['extra'].shape[1]]
        return self._finish(modality, front_tokens, encoded, leading, features)

    def _inserted(self, adapter: Any, rows: jax.Array, train: bool) -> dict[str, Any]:
        """What the front of a tower is given beside its input, by an adapter."""
        if adapter.tower.context:
            return {'arrange': adapter.words}
        extra = adapter.tokens(rows, train)
        return {} if extra is None else {'extra': extra}

    def _takes_mean(self, modality: str) -> bool:
        """Whether the vector of a clip is the mean of its tokens."""
        return self.config['towers'][modality].get('pool') == 'mean'

    def _joined_frames(self, modality: str, vectors: jax.Array) -> jax.Array:
        """The vector [B D] of clips whose frames are pictures by themselves: [B T D]."""
        if modality in self.times:
            return self.times[modality](vectors)
        if modality in self.adapters:
            return self.adapters[modality].frames(vectors)
        return vectors.mean(1)

    def _finish(
        self,
        modality: str,
        front_tokens: Tokens,
        x: jax.Array,
        leading: tuple[int, ...],
        features: bool,
    ) -> Encoded:
        """Post-project a transformer's output x [R N D] and split off the pooled vector."""
        if modality in self.posts:
            # The exact GELU is TensorFlow's default; JAX's is the tanh approximation.
            x = jax.nn.gelu(self.posts[modality](x), approximate=False)
        vector, tokens, mask = self._read(modality, front_tokens, x, features)
        if front_tokens.frames > 1:
            # Pictures of one clip: their tokens one after the other, one of their vectors.
            vectors = vector.reshape(*leading, -1, vector.shape[-1])  # [B T D]
            vector = self._joined_frames(modality, vectors)
            tokens = tokens.reshape(*leading, -1, tokens.shape[-1])
        pooled = restore_leading(vector, leading)  # [B D] or [B K D]
        if mask is not None:
            mask = restore_leading(mask, leading)
        return Encoded(
            pooled,
            restore_leading(tokens, leading) if features else None,
            mask,
            front_tokens.grid,
            front_tokens.kept,
        )

    def _read(
        self, modality: str, front_tokens: Tokens, x: jax.Array, features: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The vector [R D] of each row, its tokens [R N D] and which of them are words [R N]."""
        if modality in self.pools:
            return self.pools[modality](x), x, None
        if self._takes_mean(modality):
            return x[:, 1:].mean(1), x[:, 1:], None
        if front_tokens.read is not None:
            # Without features the encoder returns that token alone.
            vector = take_token(x, front_tokens.read) if features else x
            return vector[:, 0], x, front_tokens.words
        # The first token is the aggregate one.
        mask = None if front_tokens.mask is None else front_tokens.mask[:, 1:]
        return x[:, 0], x[:, 1:], mask

    def encode_all(
        self, batch: Mapping[str, Any], *, train: bool, rng: Rng, features: bool = False
    ) -> dict[str, Encoded]:
        """Encode every stream of the batch.

        A shared encoder takes all streams in one pass if config.model.packed; the result is what
        `encode` makes of each. Where streams meet (config.model.fusion), all tokens are made.

        Returns:
            {stream: Encoded}.
        """
        features = features or self.fusion is not None
        streams = {
            name: value
            for name, value in batch.items()
            if isinstance(value, Mapping) and 'data' in value
        }
        if self.config['shared'] and self.config.get('packed'):
            return self._encode_packed(streams, train, rng, features)
        return {
            name: self.encode(name, stream, train=train, rng=rng, features=features)
            for name, stream in streams.items()
        }

    def _encode_packed(
        self, streams: Mapping[str, Mapping[str, Any]], train: bool, rng: Rng, features: bool
    ) -> dict[str, Encoded]:
        """Encode all streams in one pass of the shared encoder, end to end along the token axis."""
        front_tokens: dict[str, Tokens] = {}
        leading: dict[str, tuple[int, ...]] = {}
        encoder_rngs = []
        for name, stream in streams.items():
            rows, leading[name], row_rng = flatten_sentences(name, stream, rng)
            kept = {'keep': stream['keep']} if 'keep' in stream else {}
            front_tokens[name] = self.fronts[modality_of(name)](rows, row_rng, train, **kept)
            # The site that `encode` uses, so packing does not change what is dropped.
            encoder_rngs.append(row_rng.at('encoder'))

        batch_size = len(rng.examples)
        # (K, n) of each stream: K rows of n tokens for every example
        layout = tuple(
            (tokens.x.shape[0] // batch_size, tokens.x.shape[1]) for tokens in front_tokens.values()
        )
        needs_all = features or any(self._takes_mean(modality_of(name)) for name in streams)
        x = self.shared_encoder(
            # [B ΣK·n D]
            pack([tokens.x for tokens in front_tokens.values()], batch_size),
            tuple(tokens.mask for tokens in front_tokens.values()),
            Packed.pack(encoder_rngs, layout),
            train,
            needs_all,
            layout,
        )
        # Otherwise only the first token of each row comes back.
        output_layout = layout if needs_all else tuple((rows, 1) for rows, _ in layout)
        outputs = unpack(x, output_layout)
        return {
            name: self._finish(
                modality_of(name), front_tokens[name], output, leading[name], features
            )
            for name, output in zip(streams, outputs)
        }

    def interact(
        self,
        encoded: Mapping[str, Encoded],
        *,
        valid: Mapping[str, Any] | None = None,
        train: bool = False,
        rng: Rng | None = None,
    ) -> dict[str, Encoded]:
        """Let streams attend to each other, by config.model.fusion.

        Where that is empty they stay as they are, and modalities meet in the loss alone.

        Args:
            encoded: {stream: Encoded}, with tokens where streams meet.
            valid: {stream: bool [B]}, the clips that have it; None: all.
            train: whether dropout is on.
            rng: of the whole batch, needed in training.

        Returns:
            {stream: Encoded}, of the same streams.
        """
        if self.fusion is None:
            return dict(encoded)
        return self.fusion(encoded, valid, rng, train and not self.frozen)

    def project(
        self,
        encoded: Mapping[str, Encoded],
        *,
        valid: Mapping[str, Any] | None = None,
        train: bool = False,
    ) -> dict[str, dict[str, jax.Array]]:
        """Project encoded streams into the common spaces.

        Args:
            encoded: {stream: Encoded}.
            valid: {stream: bool [B]}, the rows that count in batch statistics; None: all.
            train: whether batch norms take statistics of the batch.

        Returns:
            {space: {stream: float32 [B E], for text [B K E]}}, un-normalised.
        """
        pooled = {name: stream.pooled for name, stream in encoded.items()}
        if valid is None:
            valid = {name: jnp.ones(x.shape[0], bool) for name, x in pooled.items()}
        return self.head(pooled, valid, train and not self.frozen)

    def __call__(
        self, batch: Mapping[str, Any], *, train: bool, rng: Rng, features: bool = False
    ) -> Outputs:
        """Encode a device batch and project it into the common spaces."""
        encoded = self.encode_all(batch, train=train, rng=rng, features=features)
        valid = {name: batch[name]['valid'] for name in encoded}
        encoded = self.interact(encoded, valid=valid, train=train, rng=rng)
        return Outputs(encoded, self.project(encoded, valid=valid, train=train))


def flatten_sentences(
    name: str, stream: Mapping[str, Any], rng: Rng
) -> tuple[jax.Array, tuple[int, ...], Rng]:
    """Turn a stream into rows; each sentence of a clip is one row.

    Returns:
        The rows [R …]; the stream's leading axes, (B,) or for text (B, K); the rng of the rows.
    """
    data = jnp.asarray(stream['data'])
    rng = rng.at(name)
    if modality_of(name) != 'text':
        return data, data.shape[:1], rng
    batch_size, num_sentences, num_words = data.shape
    rows = data.reshape(-1, num_words)  # [B·K L]
    # Each sentence draws random bits of its own.
    return rows, (batch_size, num_sentences), rng.repeat(num_sentences)


def restore_leading(x: jax.Array, leading: tuple[int, ...]) -> jax.Array:
    """[R …] -> [*leading …], the inverse of `flatten_sentences`."""
    if len(leading) == 1:
        return x
    return x.reshape(*leading, *x.shape[1:])


def resolve_tower(modality: str, given: Mapping[str, Any], where: str) -> ConfigDict:
    """Fields of a tower with their defaults.

    Raises:
        ConfigError: for an unknown tower or field, or a tower of another modality.
    """
    name = choose(given['name'], TOWERS, f'{where}.name')
    tower_modality, defaults = TOWERS[name]
    # Towers for video read whatever consists of pictures.
    if tower_modality != modality and kind_of(tower_modality) != kind_of(modality):
        raise ConfigError(f'{where}.name={given["name"]!r} is a tower for {tower_modality}')
    return with_defaults(given, defaults, where)


def describe_tower(
    modality: str, tower: ConfigDict, sizes: Mapping[str, Any], inputs: Any
) -> adapters.Tower:
    """A tower as adapters see it.

    Args:
        modality: of the tower.
        tower: its fields.
        sizes: of its encoder, which may be shared.
        inputs: `config.model.inputs`.
    """
    size, frames, channels = 0, 1, 1
    if kind_of(modality) == PICTURES:
        size, frames = inputs[modality]['size'], inputs[modality]['frames']
        channels = inputs[modality].get('channels', 3)
    if tower['name'] in NETS:
        return adapters.Tower(modality, size=size, frames=frames)
    context, marks = 0, 0
    if tower['name'] == 'clip_text':
        context = inputs['text']['words']
        # Tokenizers without marks go with `last_word`.
        marks = 0 if tower['pool'] == 'last_word' else 1
    patch_values = 0
    if modality != 'text':
        patch = patch_of(tower)
        # CLIP's is the side of a square.
        is_square = tower['name'] in CLIP_TOWERS
        patch_values = math.prod(patch) ** (2 if is_square else 1) * channels
    return adapters.Tower(
        modality,
        layers=sizes['layers'],
        width=sizes['width'],
        mlp=sizes['mlp'],
        heads=sizes['heads'],
        head_width=sizes['head_width'],
        patch_values=patch_values,
        size=size,
        context=context,
        marks=marks,
        frames=frames,
        by_frame=tower['name'] == 'clip_vit',
        mixes_frames=tower.get('time_layers', 0) > 0,
    )


def encoder_options(tower: ConfigDict) -> dict[str, Any]:
    """What the encoder of this kind of tower sets differently from the default."""
    name = tower['name']
    if name == 't5':
        return {
            'bias': False,
            'rms': True,
            # T5 does not divide logits by sqrt(head_width).
            'scaled': False,
            'buckets': tower['buckets'],
            'max_distance': tower['max_distance'],
        }
    if name == 'spt':
        return {'bias': False}
    if name == 'bert':
        return {'pre_norm': tower['pre_norm']}
    if name in CLIP_TOWERS:
        return {
            'eps': tower['eps'],
            'activation': tower['activation'],
            'kernel_init': tower['init'],
            'causal': tower.get('causal', False),
        }
    return {}


def check_clip(tower: ConfigDict, where: str) -> None:
    """Check the names that a tower of CLIP's kind has.

    Raises:
        ConfigError: one of them is not known.
    """
    choose(tower['pool'], CLIP_TOWERS[tower['name']], f'{where}.pool')
    choose(tower['activation'], ACTIVATIONS, f'{where}.activation')
    choose(tower['init'], BLOCK_INITS, f'{where}.init')
    if tower['pool'] == 'map' and tower['width'] % tower['heads']:
        raise ConfigError(
            f'{where}.heads: expected a divisor of width={tower["width"]} for pool="map", got '
            f'{tower["heads"]}.'
        )


def check_sizes(fields: ConfigDict, where: str) -> None:
    """Check counts and rates of a tower or encoder.

    Raises:
        ConfigError: for counts below 1 and for rates outside [0, 1).
    """
    for name, value in fields.items():
        if name in COUNTS and value < 1:
            raise ConfigError(f'{where}.{name}: expected a positive number, got {value}.')
        # Sizes are int32 in XLA; of layers each is built by itself.
        largest = 10_000 if name == 'layers' else LARGEST_COUNT
        if name in COUNTS and value > largest:
            raise ConfigError(
                f'{where}.{name}: expected a number of at most {largest}, got {value}.'
            )
        if name in RATES and not 0 <= value < 1:
            raise ConfigError(
                f'{where}.{name}: expected a number of at least 0 and below 1, got {value:g}.'
            )


def patch_of(tower: Any) -> tuple[int, ...]:
    """Size of a patch along each axis."""
    patch = tower['patch']
    if isinstance(patch, (tuple, list)):
        return tuple(patch)
    return (patch,)


def extent(modality: str, inputs: Any) -> tuple[int, ...]:
    """Length of each patched axis of the inputs that a model is made for.

    Args:
        modality: one of pictures or sound.
        inputs: `config.model.inputs`, a dict or a ConfigDict.
    """
    spec = inputs[modality]
    if kind_of(modality) == PICTURES:
        # Clips are square: `size` is both height and width.
        return spec['frames'], spec['size'], spec['size']
    if spec.get('mel'):
        return spectrogram.shape(spec)
    return (spec['samples'],)  # waveform
