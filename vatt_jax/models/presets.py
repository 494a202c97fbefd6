"""Named sizes: towers and models of VATT, MMV, CLIP and SigLIP, as fields of `config.model`.

    m.towers.video = presets.tower('vit_base')        # a dict; change what you like
    m.update(presets.model('mbs'))                    # a published model: its towers, shared,
                                                      # encoder, head and inputs
    fields, pairs = presets.mmv('s3d', 'fac', 'vat')  # of MMV: the same, and the objective's pairs
    fields = presets.clip('clip_b32')                 # of CLIP or SigLIP: the same as model()

Parameter counts (in millions, backbone alone, without the frozen 19.66 M word table) stand beside
the names; tests/test_presets.py checks them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose

BASE = {'layers': 12, 'width': 768, 'mlp': 3072, 'heads': 12}
MEDIUM = {'layers': 12, 'width': 1024, 'mlp': 4096, 'heads': 16}
LARGE = {'layers': 24, 'width': 1024, 'mlp': 4096, 'heads': 16}
SMALL = {'layers': 6, 'width': 512, 'mlp': 2048, 'heads': 8}  # text only

TOWERS: dict[str, dict[str, Any]] = {
    'vit_base': {'name': 'vit', **BASE},  # 87.446
    'vit_medium': {'name': 'vit', **MEDIUM},  # 154.343
    'vit_large': {'name': 'vit', **LARGE},  # 305.498
    'vit_xlarge': {'name': 'vit', 'layers': 24, 'width': 1536, 'mlp': 4096, 'heads': 24},  # 533.695
    'wat_base': {'name': 'wat', **BASE},  # 86.079
    'wat_medium': {'name': 'wat', **MEDIUM},  # 152.521
    'wat_large': {'name': 'wat', **LARGE},  # 303.675
    'spt_base': {'name': 'spt', **BASE},  # 85.057
    'spt_medium': {'name': 'spt', **MEDIUM},  # 151.158
    'spt_large': {'name': 'spt', **LARGE},  # 302.202
    't5_small': {'name': 't5', **SMALL},  # 19.038
    't5_base': {'name': 't5', **BASE},  # 85.194
    # Official `bert_small` inherits T5's settings: post-LN, and a second learnt token in word
    # space. 19.078: the released code makes no final norm for it; counts that include one (1024
    # parameters) say 19.079.
    'bert_small': {'name': 'bert', **SMALL, 'pre_norm': False, 'extra': True},
    'bert_base': {'name': 'bert', **BASE},  # 85.301
    'linear': {'name': 'linear', 'width': 2048},  # 0.616
    'i3d': {'name': 'i3d'},  # 12.302 with batch statistics
    'resnet2d_50': {'name': 'resnet2d', 'blocks': (3, 4, 6, 3)},  # 23.555 with batch statistics
    'resnet2d_101': {'name': 'resnet2d', 'blocks': (3, 4, 23, 3)},
    # MMV and what it is compared with. Trained parameters alone, without batch statistics:
    's3d': {'name': 's3d', 'space_to_depth': True},  # 9.146 (released)
    's3d_pixels': {'name': 's3d', 'space_to_depth': False},  # 9.163
    'tsm50': {'name': 'tsm_resnet', 'depth': 50},  # 23.500
    'tsm50x2': {'name': 'tsm_resnet', 'depth': 50, 'multiplier': 2.0},  # 93.892
    'r2plus1d': {'name': 'r2plus1d', 'mid': 'conv'},  # 33.166: XDC, MMV's table
    # 31.300: torchvision, GDT, SeLaVi
    'r2plus1d_torchvision': {'name': 'r2plus1d', 'mid': 'block'},
    'r3d_50': {'name': 'r3d'},  # 31.672: CVRL
    # AVTS. MC3 with a classifier of 400 classes: torchvision's 11,695,440.
    'mc2': {'name': 'mixed_convolutions', 'first_2d': 2},  # 11.195
    'mc3': {'name': 'mixed_convolutions', 'first_2d': 3},  # 11.490
    'r3d_18': {'name': 'mixed_convolutions', 'first_2d': 6},  # 33.166
    'vggish': {'name': 'vggish'},  # 72.141 on 96 frames of 64 bands, as released
    'resnet2d_v2_18': {'name': 'resnet2d_v2', 'depth': 18},
    'resnet2d_v2_34': {'name': 'resnet2d_v2', 'depth': 34},
    'resnet2d_v2_50': {'name': 'resnet2d_v2', 'depth': 50},  # 23.494
    'resnet9': {'name': 'resnet9'},  # 4.900: SeLaVi and GDT
    'avid_video': {'name': 'avid_video'},  # 15.379
    'avid_audio': {'name': 'avid_audio'},  # 4.726
    'mmv_words': {'name': 'linear', 'width': 2048, 'init': 'fan_in'},  # 0.616
}
# Inputs and position tables of every published model: 32 frames at 10 fps, 3.2 s at 48 kHz, five
# sentences of 16 words.
POSITIONS: dict[str, tuple[int, ...]] = {'vit': (8, 14, 14), 'wat': (1200,), 'spt': (9, 16)}
MEL = {
    'bins': 80,
    'window': 2048,
    'hop': 1024,
    'low': 80.0,
    'high': 7600.0,
    'offset': 1.0,
    'scale': 1e4,
    'stretch': True,
}
INPUTS: dict[str, dict[str, Any]] = {
    'video': {'frames': 32, 'size': 224, 'fps': 10.0, 'range': (-1.0, 1.0)},
    'audio': {'samples': 153600, 'rate': 48000, 'mel': {}},
    'text': {'candidates': 5, 'words': 16, 'tokenizer': 'words'},
}
FAC = {'name': 'fac', 'va': 512, 'vat': 256}
MMV_MEL = {**MEL, 'offset': 1e-6, 'scale': 1.0, 'stretch': False}
# SeLaVi: one second at 24 kHz, 257 bands
FILTERBANK = {
    'form': 'filterbank',
    'bins': 257,
    'window': 480,
    'hop': 240,
    'transform': 1024,
    'low': 0.0,
    'high': 12000.0,
}
# AVID: two seconds at 24 kHz, 200 frames of 257 bands
DECIBELS = {
    'form': 'decibels',
    'bins': 257,
    'window': 1024,
    'hop': 240,
    'low': 0.0,
    'high': 12000.0,
}
POST = 1024  # width of the modality-agnostic models' post-projection


def _specific(video: str, audio: str, text: str) -> dict[str, Any]:
    """A model with a tower of its own for each modality."""
    towers = {'video': tower(video), 'audio': tower(audio), 'text': tower(text)}
    return {'shared': False, 'encoder': {}, 'towers': towers, 'head': FAC}


def _agnostic(size: dict[str, int]) -> dict[str, Any]:
    """A model with one encoder of `size` for all modalities.

    Each has its own patches, projections, positions and aggregate token.
    """
    towers = {
        'video': {'name': 'vit', 'positions': POSITIONS['vit'], 'post': POST},
        'audio': {'name': 'wat', 'positions': POSITIONS['wat'], 'post': POST},
        'text': {'name': 't5', 'post': POST},
    }
    return {'shared': True, 'encoder': dict(size), 'towers': towers, 'head': FAC}


# Functions, so that every caller gets dicts of its own.
MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    # tx_fac, the release's default; head 1.317 M
    'bbs': functools.partial(_specific, 'vit_base', 'wat_base', 't5_small'),
    # head 1.448 M
    'mbs': functools.partial(_specific, 'vit_medium', 'wat_base', 't5_small'),
    'lbs': functools.partial(_specific, 'vit_large', 'wat_base', 't5_small'),
    # ut_base 92.258
    'agnostic_base': functools.partial(_agnostic, BASE),
    # ut_fac, ut_medium 161.283; head 1.710 M
    'agnostic_medium': functools.partial(_agnostic, MEDIUM),
    # ut_large 312.438
    'agnostic_large': functools.partial(_agnostic, LARGE),
    # mmv_fac
    'mmv': functools.partial(_specific, 'i3d', 'resnet2d_50', 'linear'),
}
# The release's names -> ours.
OFFICIAL = {
    'tx_fac': 'bbs',
    'ut_fac': 'agnostic_medium',
    'mmv_fac': 'mmv',
    'ut_base': 'agnostic_base',
    'ut_medium': 'agnostic_medium',
    'ut_large': 'agnostic_large',
}


def tower(name: str, **changes: Any) -> dict[str, Any]:
    """Fields of `config.model.towers.<modality>` of a named tower.

    Args:
        name: key of TOWERS.
        **changes: fields to set otherwise.

    Raises:
        ConfigError: for an unknown name.
    """
    fields = dict(TOWERS[choose(name, TOWERS, 'presets.tower')])
    positions = POSITIONS.get(fields['name'])
    if positions:
        fields['positions'] = positions
    return {**fields, **changes}


def model(name: str) -> ConfigDict:
    """Fields of `config.model` of a published model.

    Args:
        name: ours (key of MODELS) or the release's (key of OFFICIAL).

    Returns:
        `towers`, `encoder`, `shared`, `head` and `inputs`.

    Raises:
        ConfigError: for an unknown name.
    """
    name = OFFICIAL.get(name, name)
    make_fields = MODELS[choose(name, [*MODELS, *OFFICIAL], 'presets.model')]
    fields = make_fields()
    reads_spectrogram = fields['towers']['audio']['name'] in ('spt', 'resnet2d')
    mel = MEL if reads_spectrogram else {}
    inputs = {**INPUTS, 'audio': {**INPUTS['audio'], 'mel': mel}}
    return ConfigDict({**fields, 'inputs': inputs})


# MMV's graphs by the paper's names
# -> (entry of common_space.GRAPHS, {pair: (space, further spaces on the way)})
MMV_GRAPHS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    'fac': ('mmv_fac_relu', {'va': ('va',), 'vt': ('vat', 'va')}),  # the released one
    'fac_plain': ('mmv_fac', {'va': ('va',), 'vt': ('vat', 'va')}),
    'fac_bnrelu': ('mmv_fac_bnrelu', {'va': ('va',), 'vt': ('vat', 'va')}),
    'shared': ('mmv_shared', {'va': ('joint',), 'vt': ('joint',)}),
    'disjoint': ('mmv_disjoint', {'va': ('va',), 'vt': ('vt',)}),
}
MMV_SUBSETS: dict[str, tuple[str, ...]] = {'va': ('va',), 'vt': ('vt',), 'vat': ('va', 'vt')}
MMV_BACKBONES = ('s3d', 's3d_pixels', 'tsm50', 'tsm50x2', 'r2plus1d')
MMV_PARTNERS = {'va': 'audio', 'vt': 'text'}  # pair -> what video is paired with


def mmv(
    backbone: str, graph: str, modalities: str, widths: tuple[int, int] = (512, 256)
) -> tuple[ConfigDict, tuple]:
    """Fields of an MMV network.

    Replace `config.model.head` by that of the result, rather than update: other graphs have other
    spaces.

    Args:
        backbone: of video, one of MMV_BACKBONES.
        graph: key of MMV_GRAPHS.
        modalities: the pairs of modalities that it learns from, key of MMV_SUBSETS.
        widths: of all spaces, and of FAC's coarse one.

    Returns:
        `towers`, `encoder`, `shared`, `head` and `inputs` of `config.model`; and the pairs of the
        objective, (modality, modality, space, weight) each.

    Raises:
        ConfigError: for an unknown name.
    """
    choose(backbone, MMV_BACKBONES, 'presets.mmv backbone')
    graph_name, spaces = MMV_GRAPHS[choose(graph, MMV_GRAPHS, 'presets.mmv graph')]
    subset = MMV_SUBSETS[choose(modalities, MMV_SUBSETS, 'presets.mmv modalities')]

    towers = {'video': tower(backbone)}
    if 'va' in subset:
        towers['audio'] = tower('resnet2d_v2_50')
    if 'vt' in subset:
        towers['text'] = tower('mmv_words')

    width, coarse_width = widths
    head: dict[str, Any] = {'name': graph_name}
    pairs = []
    for pair in subset:
        for space in spaces[pair]:
            head[space] = coarse_width if space == 'vat' else width
        pairs.append(('video', MMV_PARTNERS[pair], spaces[pair][0], 1.0))

    inputs = {
        'video': {'frames': 32, 'size': 200, 'fps': 10.0, 'range': (0.0, 1.0)},
        'audio': {**INPUTS['audio'], 'mel': MMV_MEL},
        'text': INPUTS['text'],
    }
    fields = {'shared': False, 'encoder': {}, 'towers': towers, 'head': head, 'inputs': inputs}
    return ConfigDict(fields), tuple(pairs)


# CLIP and SigLIP, by name -> (towers, size of the pictures, width of the common space).
CLIP_B = {'layers': 12, 'width': 768, 'mlp': 3072, 'heads': 12}
CLIP_L = {'layers': 24, 'width': 1024, 'mlp': 4096, 'heads': 16}
SO400M = {'layers': 27, 'width': 1152, 'mlp': 4304, 'heads': 16, 'head_width': 72}
CLIP_PIXELS = {
    'mean': (0.48145466, 0.4578275, 0.40821073),
    'deviation': (0.26862954, 0.26130258, 0.27577711),
}
# What SigLIP's transformers have in common (big_vision).
SIGLIP = {'activation': 'gelu_tanh', 'eps': 1e-6, 'init': 'glorot'}


def clip_text(width: int) -> dict[str, Any]:
    """CLIP's text transformer: all have 12 layers, and heads of 64."""
    size = {'layers': 12, 'width': width, 'mlp': 4 * width, 'heads': width // 64}
    return {'name': 'clip_text', **size, 'vocab': 49_408, 'positions': 77}


def _clip_vit(
    size: dict[str, int], patch: int, pixels: int, text: int, space: int
) -> dict[str, Any]:
    """A CLIP with a transformer over pictures."""
    side = pixels // patch
    video = {'name': 'clip_vit', **size, 'patch': patch, 'positions': (side, side)}
    return _clip_model(video, clip_text(text), pixels, {'name': 'clip', 'vt': space})


def _clip_resnet(
    blocks: tuple[int, ...], features: int, pixels: int, text: int, space: int
) -> dict[str, Any]:
    """A CLIP with a ResNet over pictures."""
    video = {'name': 'clip_resnet', 'blocks': blocks, 'features': features, 'size': pixels}
    return _clip_model(video, clip_text(text), pixels, {'name': 'clip_resnet', 'vt': space})


def _clip_model(
    video: dict[str, Any], text: dict[str, Any], pixels: int, head: dict[str, Any]
) -> dict[str, Any]:
    """Fields of `config.model` of a CLIP, pictures and sentences as it was trained with."""
    pictures = {
        'frames': 1,
        'size': pixels,
        'fps': 1.0,
        'range': (0.0, 1.0),
        'resize': 'bicubic',
        **CLIP_PIXELS,
    }
    inputs = {
        'video': pictures,
        'text': {'candidates': 1, 'words': 77, 'tokenizer': 'clip'},
    }
    towers = {'video': video, 'text': text}
    return {'shared': False, 'encoder': {}, 'towers': towers, 'head': head, 'inputs': inputs}


def _siglip(size: dict[str, int], patch: int, pixels: int, words: int = 64) -> dict[str, Any]:
    """A SigLIP: both transformers of one size, the text's without its causal mask."""
    side = pixels // patch
    video = {
        'name': 'clip_vit',
        **size,
        **SIGLIP,
        'patch': patch,
        'positions': (side, side),
        'pool': 'map',
        'token_norm': False,
        'patch_bias': True,
    }
    spread = size['width'] ** -0.5
    text = {
        'name': 'clip_text',
        **size,
        **SIGLIP,
        'vocab': 32_000,
        'positions': words,
        'pool': 'last',
        'causal': False,
        'spreads': (spread, spread),
    }
    fields = _clip_model(video, text, pixels, {'name': 'siglip', 'vt': size['width']})
    fields['inputs']['video'].update(
        {'range': (-1.0, 1.0), 'mean': (), 'deviation': (), 'resize': 'bilinear'}
    )
    fields['inputs']['text'].update({'words': words, 'tokenizer': 'siglip'})
    return fields


CLIPS: dict[str, Callable[[], dict[str, Any]]] = {
    'clip_b32': functools.partial(_clip_vit, CLIP_B, 32, 224, 512, 512),  # 151.277
    'clip_b16': functools.partial(_clip_vit, CLIP_B, 16, 224, 512, 512),  # 149.621
    'clip_l14': functools.partial(_clip_vit, CLIP_L, 14, 224, 768, 768),  # 427.617
    'clip_l14_336': functools.partial(_clip_vit, CLIP_L, 14, 336, 768, 768),
    'clip_rn50': functools.partial(_clip_resnet, (3, 4, 6, 3), 64, 224, 512, 1024),
    'clip_rn101': functools.partial(_clip_resnet, (3, 4, 23, 3), 64, 224, 512, 512),
    'clip_rn50x4': functools.partial(_clip_resnet, (4, 6, 10, 6), 80, 288, 640, 640),
    'clip_rn50x16': functools.partial(_clip_resnet, (6, 8, 18, 8), 96, 384, 768, 768),
    'clip_rn50x64': functools.partial(_clip_resnet, (3, 15, 36, 10), 128, 448, 1024, 1024),
    'siglip_b16': functools.partial(_siglip, CLIP_B, 16, 224),
    'siglip_b16_256': functools.partial(_siglip, CLIP_B, 16, 256),
    'siglip_l16_256': functools.partial(_siglip, CLIP_L, 16, 256),
    'siglip_so400m_224': functools.partial(_siglip, SO400M, 14, 224, 16),
    'siglip_so400m_384': functools.partial(_siglip, SO400M, 14, 384),
}
# The objective that learns from pictures and sentences in CLIP's common space.
CLIP_PAIRS = (('video', 'text', 'vt', 1.0),)
CLIP_OBJECTIVES: dict[str, dict[str, Any]] = {
    'clip': {
        'name': 'contrastive',
        'pairs': CLIP_PAIRS,
        'form': 'clip',
        'learn_temperature': True,
        'scales': (1.0, 100.0),
    },
    'siglip': {
        'name': 'contrastive',
        'pairs': CLIP_PAIRS,
        'form': 'siglip',
        'learn_temperature': True,
        # Its released models are beyond CLIP's bound of 100.
        'scales': (0.0, 1e6),
    },
}


def clip(name: str) -> ConfigDict:
    """Fields of `config.model` of a CLIP or SigLIP.

    Replace `config.model.inputs` by those of the result rather than update it: there is no sound.

    Args:
        name: key of CLIPS.

    Returns:
        `towers`, `encoder`, `shared`, `head` and `inputs`.

    Raises:
        ConfigError: for an unknown name.
    """
    return ConfigDict(CLIPS[choose(name, CLIPS, 'presets.clip')]())
