"""Models of CLIP's kinds of a few thousand parameters, for tests."""

import numpy as np

from vatt_jax.models import presets

SIZE = {'layers': 2, 'width': 16, 'mlp': 24, 'heads': 2, 'head_width': 8}
VOCAB, WORDS = 30, 6


def model(kind):
    """`config.model` of a tiny clip, resnet or siglip, with pictures of 16 pixels."""
    name = {'clip': 'clip_b32', 'resnet': 'clip_rn50', 'siglip': 'siglip_b16'}[kind]
    m = presets.clip(name)
    m.update({'name': 'vatt', 'attention': 'dense', 'scan': False, 'packed': False})
    m.remat = 'none'
    m.inputs.video.size = 16
    m.inputs.text.words = WORDS
    m.towers.text.update({**SIZE, 'vocab': VOCAB, 'positions': WORDS})
    m.head.vt = 16 if kind == 'siglip' else 12
    if kind == 'resnet':
        m.towers.video.update({'blocks': (1, 2, 1, 1), 'features': 2, 'heads': 4})
        m.towers.video.size = 64
        m.inputs.video.size = 64
    else:
        m.towers.video.update({**SIZE, 'patch': 8, 'positions': (2, 2)})
    return m


def batch(m, rows):
    """Device streams of noise; sentences end in the largest number, and zeros follow."""
    noise = np.random.default_rng(1)
    size, words = m.inputs.video.size, m.inputs.text.words
    pictures = noise.normal(size=(rows, 1, size, size, 3)).astype(np.float32)
    vocab = m.towers.text.vocab
    ids = noise.integers(1, vocab - 1, (rows, 1, words)).astype(np.int32)
    for row in range(rows):
        ids[row, 0, words - 2 - row] = vocab - 1
        ids[row, 0, words - 1 - row :] = 0
    valid = np.ones(rows, bool)
    return {
        'video': {'data': pictures, 'valid': valid},
        'text': {'data': ids, 'valid': valid, 'mask': np.ones((rows, 1), bool)},
    }
