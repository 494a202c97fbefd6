"""MMV: video, sound and words in common spaces (Alayrac et al., 2020), as published and at the size of the playground.

    python run.py --config=configs/mmv.py:demo_fac_vat --workdir=runs/mmv_fac_vat         # graph fac | shared | disjoint, from va | vt | vat
    python run.py --config=configs/mmv.py:demo_fac_vat,s3d --workdir=runs/mmv_demo_s3d    # another backbone than TSM-ResNet18; S3D for small clips
    python run.py --config=configs/mmv.py:demo_fac_vat,synthetic --workdir=runs/try       # no files, no TensorFlow
    python run.py --config=configs/mmv.py:s3d_fac_vat --workdir=runs/mmv_s3d              # published: HowTo100M and AudioSet, on a pod

Names are backbone_graph_modalities: s3d | s3d_pixels | tsm50 | tsm50x2 | r2plus1d; fac (fine and coarse space, ReLU between: the released one) |
fac_plain | fac_bnrelu | shared | disjoint; va | vt | vat. Option howto100m: that set alone, video-text ten times as heavy. Published: 500 k steps of
4096 clips of 32 frames, three days on 32 TPU v3 devices for S3D. What differs from the official code, and why: docs/mmv.md.
"""

from configs import default, demo
from vatt_jax.config import choose
from vatt_jax.models import presets

OPTIONS = ('synthetic', 'howto100m')


def get_config(arg: str = 'demo_fac_vat'):
    name, *options = (arg or 'demo_fac_vat').split(',')
    first, _, rest = name.partition('_')
    if first == 's3d' and rest.startswith('pixels_'):
        first, rest = 's3d_pixels', rest.removeprefix('pixels_')
    graph, _, modalities = rest.rpartition('_')
    choose(first, ('demo', *presets.MMV_BACKBONES), f'configs/mmv.py:{name} backbone')
    choose(graph, presets.MMV_GRAPHS, f'configs/mmv.py:{name} graph')
    choose(modalities, presets.MMV_SUBSETS, f'configs/mmv.py:{name} modalities')
    for option in options:
        choose(
            option,
            ('synthetic', *presets.MMV_BACKBONES) if first == 'demo' else OPTIONS,
            f'configs/mmv.py:{name} option',
        )
    c = (
        _demo(graph, modalities, options)
        if first == 'demo'
        else _published(first, graph, modalities, options)
    )
    c.name = f'MMV {" ".join([name, *options])}'
    return c


def _published(backbone, graph, modalities, options):
    c = default.get_config()
    c.steps, c.batch_size, c.compute_dtype = 500_000, 4096, 'bfloat16'
    pairs = _model(c, backbone, graph, modalities)
    if (
        'howto100m' in options
    ):  # equal weights are those of both sets; that the larger one is video-text's is from memory of the paper
        pairs = tuple((*pair[:3], 10.0 if pair[1] == 'text' else 1.0) for pair in pairs)
    c.objective = {
        'name': 'contrastive',
        'pairs': pairs,
        'temperature': 0.07,
        'form': 'asymmetric',
        'padded': True,
    }

    o = c.optimizer
    o.name, o.b1, o.b2, o.eps = 'adam', 0.9, 0.999, 1e-8
    o.clip, o.weight_decay, o.ema = 0.0, 0.0, 0.0
    o.schedule.update({'name': 'warmup_cosine', 'peak': 2e-3, 'warmup': 5_000, 'end': 0.0})

    d = c.data
    if 'synthetic' in options:
        d.source = 'synthetic'
    else:  # half of each batch from either set; AudioSet has no words, so video-text needs HowTo100M alone
        sources = (
            {'howto100m': 0.0}
            if modalities == 'vt' or 'howto100m' in options
            else {'howto100m': 0.5, 'audioset': 0.5}
        )
        for source, share in sources.items():
            d.train[source] = {
                'path': f'data/{source}/records',
                'split': 'train',
                'weight': 1.0,
                'share': share,
            }
    a = c.augment
    a.color, a.brightness, a.contrast, a.saturation, a.hue, a.audio_noise = (
        0.8,
        32 / 255,
        0.4,
        0.4,
        0.2,
        0.0,
    )
    c.mesh.update({'replica': -1, 'fsdp': 1})
    c.checkpoint.every, c.log_every = 10_000, 50
    return c


def _model(c, backbone, graph, modalities, widths=(512, 256)):
    """Sets `config.model`'s towers, head and inputs; the objective's pairs."""
    fields, pairs = presets.mmv(backbone, graph, modalities, widths)
    c.model.towers, c.model.head = fields.towers, fields.head
    c.model.inputs.update(fields.inputs)
    return pairs


def _demo(graph, modalities, options):
    c = demo.get_config('synthetic' if 'synthetic' in options else '')
    backbone = next((o for o in options if o in presets.MMV_BACKBONES), None)
    inputs = c.model.inputs.copy_and_resolve_references()
    pairs = _model(c, backbone or 'tsm50', graph, modalities, (128, 64))
    c.steps = 600
    if backbone in (
        's3d',
        's3d_pixels',
    ):  # XLA's older code generator, which the other demos take, runs their pooling slowly
        c.compiler_options = {'xla_llvm_disable_expensive_passes': True}
    m = c.model
    m.inputs = inputs
    m.inputs.video.range = (0.0, 1.0)
    m.inputs.audio.mel = {
        **presets.MMV_MEL,
        'bins': 40,
        'window': 512,
        'hop': 256,
        'low': 60.0,
        'high': 3800.0,
    }
    m.towers.video.update({'multiplier': 0.25} if backbone else {'depth': 18, 'multiplier': 0.25})
    if (
        backbone in ('s3d', 's3d_pixels')
    ):  # 4×4×4 places to the end, and four blocks: all pools would leave one place, which learns next to nothing
        m.towers.video.update({'pools': 2, 'blocks': (1, 2, 1)})
    if 'audio' in m.towers:
        m.towers.audio.update({'depth': 18, 'multiplier': 0.25})
    if 'text' in m.towers:  # no word2vec here: the table is learnt
        m.towers.text.update({'vocab': 0, 'word_width': 64, 'width': 256, 'frozen_words': False})
    c.objective = {'name': 'contrastive', 'pairs': pairs, 'temperature': 0.07, 'form': 'asymmetric'}
    o = c.optimizer
    o.name, o.weight_decay, o.clip = 'adam', 0.0, 0.0
    o.schedule.update({'peak': 2e-3, 'warmup': 60, 'end': 0.0})
    c.augment.audio_noise = 0.0
    c.checkpoint.every = 200

    spaces = {second: space for _, second, space, _ in pairs}
    both = lambda other: ((other, 'video', spaces[other]), ('video', other, spaces[other]))
    e = c.evals
    e.retrieval.pairs = tuple(
        p for other in ('text', 'audio') if other in spaces for p in both(other)
    )
    if (
        modalities == 'vat' and graph != 'disjoint'
    ):  # never trained: words and sound meet where the graph brings both
        e.retrieval.pairs += (('text', 'audio', spaces['text']),)
    if 'audio' in spaces:
        e.sync.space = spaces['audio']
    else:
        del e.sync, e.probe_audio
    return c
