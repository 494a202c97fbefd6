"""Sizes of a VATT model: inferred from a checkpoint's shapes, filled in from a config, compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose, with_defaults
from vatt_jax.importers.messages import listed, shown
from vatt_jax.importers.vatt_tf_layout import (
    AXIS,
    BASE,
    FINETUNED_BASE,
    HEAD,
    I3D_STEM,
    I3D_UNITS,
    PATCH,
    RESNET_STEM,
    RESNET_UNITS,
    SHORT,
    UNIFIED,
)
from vatt_jax.models.multimodal import AXES, SIZE, TOWERS, extent, patch_of
from vatt_jax.models.towers.i3d import MIXED

HEAD_WIDTH = 64  # of every official model; the kernels' shapes do not say it

Shapes = Mapping[str, tuple[int, ...]]


def kind(shapes: Shapes) -> str:
    """Classify a checkpoint by the names of its variables.

    Returns:
        'ut_fac' (modality-agnostic), 'tx_fac' (modality-specific), 'mmv_fac' (the same with I3D as
        the tower of video) or 'finetuned'.

    Raises:
        ConfigError: it is no VATT checkpoint.
    """
    # From the narrowest to the widest: the first prefixes begin with the third.
    prefixes = (
        ('ut_fac', f'{BASE}/unified_backbone/'),
        ('mmv_fac', f'{BASE}/vid_backbone/_base/{I3D_STEM["conv_1a"]}/'),
        ('tx_fac', f'{BASE}/'),
        ('finetuned', f'{FINETUNED_BASE}/'),
    )
    for name, prefix in prefixes:
        if any(key.startswith(prefix) for key in shapes):
            return name
    first_keys = listed(sorted(shapes), 3)
    raise ConfigError(
        f'this is no VATT checkpoint: no variable starts with {BASE}/ or {FINETUNED_BASE}/; it has '
        f'{first_keys or "nothing"}'
    )


# ---- from a checkpoint
def infer(shapes: Shapes) -> dict[str, Any]:
    """Infer `config.model` as far as the shapes determine it.

    Dropout rates and inputs do not show in a checkpoint and are left out.

    Args:
        shapes: {variable: shape} of the checkpoint.

    Returns:
        The fields `towers`, `encoder`, `shared` and `head` of `config.model`.

    Raises:
        ConfigError: a variable whose shape is needed is missing.
    """
    reader = _SizeReader(shapes)
    checkpoint_kind = kind(shapes)
    if checkpoint_kind == 'finetuned':
        # The modality follows from the tower: no key of such a file names it.
        tower = reader.tower(FINETUNED_BASE)
        modality = TOWERS[tower['name']][0]
        return {
            'shared': False,
            'encoder': {},
            'towers': {modality: tower},
            'head': {'name': 'none'},
        }

    # A file may hold some of the towers alone.
    encoder: dict[str, Any] = {}
    if checkpoint_kind == 'ut_fac':
        towers = reader.shared_towers()
        encoder = reader.encoder(f'{UNIFIED}/tx')
    else:
        towers = reader.own_towers()
    if not towers:
        raise ConfigError(
            'the checkpoint has no tower of video, audio or text; it has '
            f'{listed(sorted(shapes), 3)}'
        )
    return {
        'shared': checkpoint_kind == 'ut_fac',
        'encoder': encoder,
        'towers': towers,
        'head': reader.head(towers),
    }


def encoders_without_heads(shapes: Shapes) -> dict[str, int]:
    """Encoders whose number of heads a checkpoint does not record, that is, all but T5's.

    Returns:
        {config field of the encoder: heads × head_width}.
    """
    inferred = infer(shapes)
    encoders = {f'model.towers.{name}': tower for name, tower in inferred['towers'].items()}
    encoders['model.encoder'] = inferred['encoder']
    return {
        field: size['heads'] * size['head_width']
        for field, size in encoders.items()
        # T5's relative bias has a column for each head. Convolutions have none, nor has the front
        # of a modality whose encoder is shared.
        if size.get('name') != 't5' and 'head_width' in size
    }


def unknown_heads(shapes: Shapes) -> dict[str, int]:
    """Those of `encoders_without_heads` that cannot be made of heads of the official width."""
    try:
        encoders = encoders_without_heads(shapes)
    except ConfigError:  # a variable is missing, which is listed with all else
        return {}
    return {field: width for field, width in encoders.items() if width % HEAD_WIDTH}


class _SizeReader:
    """Reads sizes of layers, encoders and towers off the shapes of their variables."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def shape(self, key: str, axes: int = 2) -> tuple[int, ...]:
        """Shape of a variable that must have so many axes."""
        if key not in self.shapes:
            raise ConfigError(
                f'the checkpoint has no variable {key}; without it its sizes are unknown'
            )
        shape = self.shapes[key]
        if len(shape) != axes or 0 in shape:
            raise ConfigError(
                f'{key} has shape {shown(list(shape))}, expected {axes} axes, none of length 0'
            )
        return shape

    def encoder(self, prefix: str, query: str = 'mha/q') -> dict[str, Any]:
        # Counted by their keys: TensorFlow has a variable for each layer, nothing is stacked.
        layers = set()
        for key in self.shapes:
            match = re.match(re.escape(prefix) + r'/layers/(\d+)/', key)
            if match:
                layers.add(int(match[1]))
        width, inner_width = self.shape(f'{prefix}/layers/0/{query}/kernel')
        # One wide head where the width is no multiple of 64; see `unknown_heads`.
        heads = inner_width // HEAD_WIDTH if inner_width % HEAD_WIDTH == 0 else 1
        return {
            'layers': len(layers),
            'width': width,
            'mlp': self.shape(f'{prefix}/layers/0/feed_forward/mlp/wi/kernel')[1],
            'heads': heads,
            'head_width': inner_width // heads,
        }

    def patch(self, prefix: str, tower_name: str) -> int | tuple[int, ...]:
        axes = len(AXES[tower_name]) + 2
        *patch, _, _ = self.shape(f'{prefix}/kernel', axes)  # [*patch C D]
        return tuple(patch) if len(patch) > 1 else patch[0]

    def position_rows(self, prefix: str, tower_name: str) -> tuple[int, ...]:
        """Lengths of the position tables of a tower, one for each axis."""
        tables = [
            f'{prefix}/{AXIS[axis]}_position_embeddings/embeddings' for axis in AXES[tower_name]
        ]
        return tuple(self.shape(table)[0] for table in tables)

    def tower(self, prefix: str) -> dict[str, Any]:
        """A video or audio tower with layers of its own."""
        if f'{prefix}/{I3D_STEM["conv_1a"]}/conv3d/kernel' in self.shapes:
            return {'name': 'i3d', 'blocks': self._i3d_blocks(prefix)}
        if f'{prefix}/{RESNET_STEM[0]}/conv2d/kernel' in self.shapes:
            return {'name': 'resnet2d', 'blocks': self._resnet_blocks(prefix)}
        names = [name for name in PATCH if f'{prefix}/{PATCH[name]}/kernel' in self.shapes]
        if names:
            return self._patch_tower(prefix, names[0])
        stems = [*PATCH.values(), I3D_STEM['conv_1a'], RESNET_STEM[0]]
        raise ConfigError(
            f'{prefix} has none of {", ".join(stems)}; expected a vit, wat, spt, i3d or resnet2d '
            'tower'
        )

    def _i3d_blocks(self, prefix: str) -> tuple[int, ...]:
        """How many Mixed blocks each of the three stages has."""
        unit = f'{I3D_UNITS["b0"]}/conv3d/kernel'
        there = [name for name in MIXED if f'{prefix}/{name}/{unit}' in self.shapes]
        return tuple(
            sum(name.startswith(f'mixed_{stage}') for name in there) for stage in (3, 4, 5)
        )

    def _resnet_blocks(self, prefix: str) -> tuple[int, ...]:
        """How many blocks each group has."""
        place = f'{RESNET_UNITS["conv_1"][0]}/conv2d/kernel'
        blocks: list[int] = []
        while f'{prefix}/block_groups/{len(blocks)}/layers/0/{place}' in self.shapes:
            group = f'{prefix}/block_groups/{len(blocks)}/layers'
            count = 0
            while f'{group}/{count}/{place}' in self.shapes:
                count += 1
            blocks.append(count)
        return tuple(blocks)

    def _patch_tower(self, prefix: str, name: str) -> dict[str, Any]:
        """A tower with a transformer of its own."""
        # Both projections are optional, around the encoder.
        post = 0
        if f'{prefix}/post_proj/kernel' in self.shapes:
            post = self.shape(f'{prefix}/post_proj/kernel')[1]
        return {
            'name': name,
            'patch': self.patch(f'{prefix}/{PATCH[name]}', name),
            **self.encoder(f'{prefix}/tx'),
            'positions': self.position_rows(f'{prefix}/pos_embedding_lookup', name),
            'pre': f'{prefix}/pre_proj/kernel' in self.shapes,
            'post': post,
        }

    def text_tower(self, prefix: str) -> dict[str, Any]:
        language_model = f'{prefix}/base_lm'
        vocab, word_width = self.shape(f'{prefix}/embedding/embeddings')
        words = {'vocab': vocab, 'word_width': word_width}
        # Each language model is recognised by a variable that one alone has.
        if f'{language_model}/conv1d/kernel' in self.shapes:
            width = self.shape(f'{language_model}/conv1d/kernel', 3)[-1]
            return {'name': 'linear', **words, 'width': width}
        positions = f'{language_model}/pos_embedding_lookup/temporal_position_embeddings/embeddings'
        if positions in self.shapes:
            return self._bert(prefix, positions, words)
        return self._t5(language_model, words)

    def _bert(self, prefix: str, positions: str, words: dict[str, int]) -> dict[str, Any]:
        encoder = f'{prefix}/base_lm/tx'
        # Official bert_small is recognised by its second token: it has norms after the sums,
        # whether or not its file holds a final norm.
        extra = f'{prefix}/agg_embedding' in self.shapes
        return {
            'name': 'bert',
            **words,
            **self.encoder(encoder),
            'positions': self.shape(positions)[0],
            'extra': extra,
            'pre_norm': not extra and f'{encoder}/final_layer_norm/gamma' in self.shapes,
        }

    def _t5(self, prefix: str, words: dict[str, int]) -> dict[str, Any]:
        attention = 'self_attention/attention'
        bias = f'{prefix}/layers/0/{attention}/relative_attention_bias/embeddings'
        buckets, heads = self.shape(bias)
        # `encoder` takes heads of 64; here only their total width is used of it.
        size = self.encoder(prefix, query=f'{attention}/q')
        inner_width = size['heads'] * size['head_width']
        # The relative bias has a column for each head, so here their number is known.
        size |= {'heads': heads, 'head_width': inner_width // heads}
        return {'name': 't5', **words, **size, 'buckets': buckets}

    def has(self, prefix: str) -> bool:
        return any(key.startswith(f'{prefix}/') for key in self.shapes)

    def own_towers(self) -> dict[str, Any]:
        """The towers of a modality-specific model."""
        towers: dict[str, Any] = {}
        for modality in ('video', 'audio'):
            backbone = f'{BASE}/{SHORT[modality]}_backbone'
            if self.has(backbone):
                towers[modality] = self.tower(f'{backbone}/_base')
        if self.has(f'{BASE}/txt_backbone'):
            towers['text'] = self.text_tower(f'{BASE}/txt_backbone')
        return towers

    def shared_towers(self) -> dict[str, Any]:
        """What the modalities of a modality-agnostic model have of their own."""
        raw = f'{UNIFIED}/raw_to_embeddings'
        towers: dict[str, Any] = {}
        # The official modality-agnostic model hears waveforms, never spectrograms.
        for modality, name in (('video', 'vit'), ('audio', 'wat')):
            if not self.has(f'{raw}/{modality}'):
                continue
            lookup = f'{UNIFIED}/pos_embedding_lookup/{modality}'
            towers[modality] = {
                'name': name,
                'patch': self.patch(f'{raw}/{modality}', name),
                'positions': self.position_rows(lookup, name),
                'post': self._post(modality),
            }
        if self.has(f'{raw}/text'):
            vocab, word_width = self.shape(f'{raw}/text/embeddings')
            towers['text'] = {
                'name': 't5',
                'vocab': vocab,
                'word_width': word_width,
                'post': self._post('text'),
            }
        return towers

    def _post(self, modality: str) -> int:
        return self.shape(f'{UNIFIED}/post_proj/{modality}/kernel')[1]

    def head(self, towers: Mapping[str, Any]) -> dict[str, Any]:
        """FAC with the spaces that layers of these towers lead to; every kernel is [D E]."""
        # The layer that makes each space -> what it leads from.
        layers = {
            'va': {'video': 'hid_to_va/dense', 'audio': 'aud_to_va'},
            'vat': {'video': 'va_to_vat/dense', 'text': 'txt_to_vat'},
        }
        widths: dict[str, int] = {}
        for space, of_space in layers.items():
            for modality, layer in of_space.items():
                if modality in towers and f'{HEAD}/{layer}/kernel' in self.shapes:
                    widths[space] = self.shape(f'{HEAD}/{layer}/kernel')[1]
        if not widths:
            return {'name': 'none'}
        # The graph wants a width of the fine space, of which words alone make no layer.
        return {'name': 'fac', 'va': widths.get('va', widths.get('vat')), **widths}


# ---- from a config
def filled(config: ConfigDict) -> dict[str, Any]:
    """Return `config.model` as a plain dict with every default written out.

    The defaults of its towers and of its encoder are included, and the lengths of position tables,
    which otherwise follow from the inputs and the patches.
    """
    model = config.model.to_dict()
    if model['shared']:
        model['encoder'] = with_defaults(model['encoder'], SIZE, 'config.model.encoder').to_dict()
    for modality, given in model['towers'].items():
        where = f'config.model.towers.{modality}'
        name = choose(given['name'], TOWERS, f'{where}.name')
        defaults = TOWERS[name][1]
        tower = with_defaults(given, defaults, where).to_dict()
        # Empty `positions`: as many rows along each axis as the inputs have patches.
        if tower['name'] in AXES and not tower['positions']:
            sizes = extent(modality, model['inputs'])
            patch = patch_of(tower)
            tower['positions'] = tuple(n // p for n, p in zip(sizes, patch, strict=True))
        model['towers'][modality] = tower
    return model


# ---- one against the other
def differences(
    inferred: Mapping[str, Any],
    model: Mapping[str, Any],
    objective: ConfigDict | Mapping[str, Any] | None = None,
) -> list[str]:
    """List where a config and a checkpoint have different sizes.

    Position tables are resized, so they do not count. Nor does how an encoder's heads share their
    width, save T5's, whose bias has a column for each head.

    Args:
        inferred: what `infer` read off the checkpoint.
        model: `config.model`, filled.
        objective: `config.objective` of a classifier.

    Returns:
        Sentences of the form 'config.field=ours (checkpoint: theirs)'.
    """
    found = []
    if objective is not None and objective['stream'].split('.')[0] not in inferred['towers']:
        found.append(
            f'config.objective.stream={objective["stream"]!r} '
            f'(checkpoint: {", ".join(inferred["towers"])})'
        )
    for modality, theirs in inferred['towers'].items():
        # A config may leave modalities of the checkpoint out.
        if modality in model['towers']:
            found += _tower_differences(modality, theirs, model, inferred['shared'])
    if inferred['shared'] and model['shared']:
        found += _field_differences('model.encoder', inferred['encoder'], model['encoder'])
    if model['head']['name'] != 'none' and inferred['head']['name'] != 'none':
        found += _field_differences('model.head', inferred['head'], model['head'])
    return found


def _tower_differences(
    modality: str, theirs: Mapping[str, Any], model: Mapping[str, Any], checkpoint_shared: bool
) -> list[str]:
    found = []
    if model['shared'] and not checkpoint_shared:
        # A fine-tuned checkpoint: its tower holds the encoder, and a projection before it where
        # the encoder was a shared one.
        encoder = {field: value for field, value in theirs.items() if field in SIZE}
        found += _field_differences('model.encoder', encoder, model['encoder'])
        if not theirs['pre']:
            found.append('config.model.shared=True (checkpoint: a tower without pre_proj)')
        theirs = {k: v for k, v in theirs.items() if k not in SIZE and k != 'pre'}
    ours = model['towers'][modality]
    return found + _field_differences(f'model.towers.{modality}', theirs, ours)


def _field_differences(where: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    if theirs.get('name') != ours.get('name'):
        # The fields of one kind of tower mean nothing for another kind.
        return [f'config.{where}.name={ours.get("name")!r} (checkpoint: {theirs.get("name")!r})']
    ignored = {'positions'}
    found = []
    # 8 heads of 64 and 4 of 128 have the same kernels: the config decides.
    if theirs.get('name') != 't5' and 'heads' in theirs and 'heads' in ours:
        ignored |= {'heads', 'head_width'}
        their_width = theirs['heads'] * theirs['head_width']
        our_width = ours['heads'] * ours['head_width']
        if their_width != our_width:
            found.append(
                f'config.{where}.heads × head_width={ours["heads"]} × {ours["head_width"]} '
                f'(checkpoint: {their_width} in all)'
            )
    for field, value in theirs.items():
        if field in ignored or field not in ours:
            continue
        if _as_tuple(ours[field]) != _as_tuple(value):
            found.append(
                f'config.{where}.{field}={ours[field]!r} (checkpoint: {_as_tuple(value)!r})'
            )
    return found


def _as_tuple(value: Any) -> Any:
    """A list as a tuple: configs hold both."""
    return tuple(value) if isinstance(value, list) else value
