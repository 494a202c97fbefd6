"""VATT's published pretraining (Akbari et al., 2021): HowTo100M and AudioSet, on a pod.

    python run.py --config=configs/vatt.py:mbs --workdir=runs/vatt_mbs
        the released code's values, the paper's batch
    python run.py --config=configs/vatt.py:mbs,paper --workdir=runs/vatt_mbs
        the paper's values wherever the two differ
    python run.py --config=configs/vatt.py:mbs,code --workdir=runs/vatt_mbs
        the code's values wherever the two differ
    python run.py --config=configs/vatt.py:mbs,fused --workdir=runs/vatt_mbs
        attention by the machine's kernel, without its dropout
    python run.py --config=configs/vatt.py:bbs,synthetic --workdir=runs/try \\
            --config.batch_size=4 --config.steps=3
        no data

Sizes: bbs, mbs, lbs (one tower for each modality: Base/Medium/Large video, Base audio, Small text),
agnostic_base, agnostic_medium, agnostic_large (one shared encoder), mmv (the release's `mmv_fac`:
I3D, ResNet-50 on log-mel, linear text).

Paper and code differ in the batch (2048; 8, which is for trying it out), in the warm-up (10 k
steps; 5 k) and in the cosine after it (a quarter of a period; half of one).

Published: 500 k steps of 2048 clips on 256 TPU v3, under three days. How to prepare the data:
docs/data.md. What differs from the official code, and why: docs/vatt.md.
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose
from vatt_jax.models import presets
from vatt_jax.models.multimodal import NETS

from . import default

OPTIONS = ('paper', 'code', 'synthetic', 'fused')
STEPS = 500_000


def get_config(arg: str = 'mbs') -> ConfigDict:
    name, *options = (arg or 'mbs').split(',')
    choose(name, [*presets.MODELS, *presets.OFFICIAL], 'configs/vatt.py: size')
    for option in options:
        choose(option, OPTIONS, 'configs/vatt.py: option')
    if {'paper', 'code'} <= set(options):
        raise ValueError('configs/vatt.py: the options paper and code exclude each other; name one')
    c = default.get_config()
    c.name = f'VATT {" ".join([name, *options])}'
    c.steps = STEPS
    c.batch_size = 8 if 'code' in options else 2048
    c.compute_dtype = 'bfloat16'
    c.model.update(presets.model(name))
    c.model.scan, c.model.remat = True, 'full'
    if 'fused' in options:
        use_fused_attention(c.model)
    c.objective = {
        'name': 'contrastive',
        'pairs': (('video', 'audio', 'va', 1.0), ('video', 'text', 'vat', 1.0)),
        'temperature': 0.07,
        'form': 'asymmetric',
        'padded': True,
    }

    o = c.optimizer
    o.name, o.b1, o.b2, o.eps = 'keras_adam', 0.9, 0.999, 1e-7
    o.clip, o.weight_decay, o.ema = 0.0, 0.0, 0.0
    s = o.schedule
    if 'paper' in options:
        # A quarter of a cosine period after 10 k steps of warm-up.
        s.name, s.peak, s.end, s.warmup = 'warmup_quarter_cosine', 1e-4, 5e-5, 10_000
    else:
        # Half a period after 5 k steps.
        s.name, s.levels = 'vatt', ((5_000, 1e-4), (STEPS, 5e-5))

    if 'synthetic' in options:
        c.data.source = 'synthetic'
    else:
        # Each example comes from either set with equal probability.
        for source in ('howto100m', 'audioset'):
            c.data.train[source] = default.records(f'data/{source}/records')
    a = c.augment
    a.color, a.brightness, a.contrast = 0.8, 32 / 255, 0.4
    a.saturation, a.hue = 0.4, 0.2
    a.audio_noise = 0.01
    c.mesh.update({'replica': -1, 'fsdp': 1})
    c.checkpoint.every, c.log_every = 10_000, 50
    return c


def use_fused_attention(m: ConfigDict) -> None:
    """Lets the machine choose its attention kernel, in place.

    No fused kernel drops attention probabilities, so that dropout goes; all other dropout stays.
    """
    m.attention = 'auto'
    transformers = [tower for tower in m.towers.values() if tower.get('name', 'vit') not in NETS]
    if m.shared:
        transformers.append(m.encoder)
    for transformer in transformers:
        transformer.attention_dropout = 0.0
