"""MMV: video, sound and words in common spaces (Alayrac et al., 2020).

    python run.py --config=configs/mmv.py:demo_fac_vat --workdir=runs/mmv_fac_vat
        on the playground: graph fac | shared | disjoint, modalities va | vt | vat
    python run.py --config=configs/mmv.py:demo_fac_vat,s3d --workdir=runs/mmv_demo_s3d
        another backbone than TSM-ResNet18; here S3D for small clips
    python run.py --config=configs/mmv.py:demo_fac_vat,synthetic --workdir=runs/try
        no files, no TensorFlow
    python run.py --config=configs/mmv.py:s3d_fac_vat --workdir=runs/mmv_s3d
        published: HowTo100M and AudioSet, on a pod

Names are BACKBONE_GRAPH_MODALITIES:

    s3d | s3d_pixels | tsm50 | tsm50x2 | r2plus1d
    fac (fine and coarse space, ReLU between: the released one) | fac_plain | fac_bnrelu | shared |
        disjoint
    va | vt | vat

Option howto100m: that set alone, video-text ten times as heavy. Published: 500 k steps of 4096
clips of 32 frames, three days on 32 TPU v3 devices for S3D. What differs from the official code,
and why: docs/mmv.md.
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose
from vatt_jax.models import presets

from . import default, demo

OPTIONS = ('synthetic', 'howto100m')
S3D = ('s3d', 's3d_pixels')
# (stream, stream, common space, weight) of each contrastive loss.
Pairs = tuple[tuple[str, str, str, float], ...]


def get_config(arg: str = 'demo_fac_vat') -> ConfigDict:
    name, *options = (arg or 'demo_fac_vat').split(',')
    backbone, graph, modalities = split_name(name)
    is_demo = backbone == 'demo'
    known = ('synthetic', *presets.MMV_BACKBONES) if is_demo else OPTIONS
    for option in options:
        choose(option, known, f'configs/mmv.py:{name} option')
    if is_demo:
        c = demo_config(graph, modalities, options)
    else:
        c = published_config(backbone, graph, modalities, options)
    c.name = f'MMV {" ".join([name, *options])}'
    return c


def split_name(name: str) -> tuple[str, str, str]:
    """'s3d_pixels_fac_plain_va' -> ('s3d_pixels', 'fac_plain', 'va').

    Raises:
        ConfigError: one of the three parts is not known.
    """
    backbone, _, rest = name.partition('_')
    if backbone == 's3d' and rest.startswith('pixels_'):
        backbone, rest = 's3d_pixels', rest.removeprefix('pixels_')
    graph, _, modalities = rest.rpartition('_')
    choose(backbone, ('demo', *presets.MMV_BACKBONES), f'configs/mmv.py:{name} backbone')
    choose(graph, presets.MMV_GRAPHS, f'configs/mmv.py:{name} graph')
    choose(modalities, presets.MMV_SUBSETS, f'configs/mmv.py:{name} modalities')
    return backbone, graph, modalities


def published_config(backbone: str, graph: str, modalities: str, options: list[str]) -> ConfigDict:
    """The published run, of any backbone, graph and subset of modalities."""
    c = default.get_config()
    c.steps, c.batch_size, c.compute_dtype = 500_000, 4096, 'bfloat16'
    pairs = set_model(c, backbone, graph, modalities)
    if 'howto100m' in options:
        # Equal weights are those of both sets. That the larger weight is that of video-text is from
        # memory of the paper.
        pairs = tuple((x, y, space, 10.0 if y == 'text' else 1.0) for x, y, space, _ in pairs)
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

    if 'synthetic' in options:
        c.data.source = 'synthetic'
    else:
        # Half of each batch comes from either set. AudioSet has no words, so video-text needs
        # HowTo100M alone.
        shares = {'howto100m': 0.5, 'audioset': 0.5}
        if modalities == 'vt' or 'howto100m' in options:
            shares = {'howto100m': 0.0}
        for source, share in shares.items():
            c.data.train[source] = default.records(f'data/{source}/records')
            c.data.train[source].share = share
    a = c.augment
    a.color, a.brightness, a.contrast = 0.8, 32 / 255, 0.4
    a.saturation, a.hue = 0.4, 0.2
    a.audio_noise = 0.0
    c.mesh.update({'replica': -1, 'fsdp': 1})
    c.checkpoint.every, c.log_every = 10_000, 50
    return c


def set_model(
    c: ConfigDict,
    backbone: str,
    graph: str,
    modalities: str,
    widths: tuple[int, int] = (512, 256),
) -> Pairs:
    """Sets towers, common spaces and inputs of `config.model` in place.

    Args:
        widths: of the fine and of the coarse space.

    Returns:
        The pairs that the contrastive objective compares.
    """
    fields, pairs = presets.mmv(backbone, graph, modalities, widths)
    c.model.towers, c.model.head = fields.towers, fields.head
    c.model.inputs.update(fields.inputs)
    return pairs


def demo_config(graph: str, modalities: str, options: list[str]) -> ConfigDict:
    """MMV at the size of the playground."""
    c = demo.get_config('synthetic' if 'synthetic' in options else '')
    chosen = [option for option in options if option in presets.MMV_BACKBONES]
    backbone = chosen[0] if chosen else None
    # The demo's inputs stay; the preset's are for large clips.
    inputs = c.model.inputs.copy_and_resolve_references()
    pairs = set_model(c, backbone or 'tsm50', graph, modalities, (128, 64))
    c.model.inputs = inputs
    shrink_towers(c.model, backbone)
    c.steps = 600
    if backbone in S3D:
        # XLA's older code generator, which the other demos take, runs S3D's pooling slowly.
        c.compiler_options = {'xla_llvm_disable_expensive_passes': True}
    c.objective = {'name': 'contrastive', 'pairs': pairs, 'temperature': 0.07, 'form': 'asymmetric'}
    o = c.optimizer
    o.name, o.weight_decay, o.clip = 'adam', 0.0, 0.0
    o.schedule.update({'peak': 2e-3, 'warmup': 60, 'end': 0.0})
    c.augment.audio_noise = 0.0
    c.checkpoint.every = 200
    set_evaluations(c.evals, pairs, graph, modalities)
    return c


def shrink_towers(m: ConfigDict, backbone: str | None) -> None:
    """Towers for clips of the demo's size, in place. backbone: None for TSM-ResNet18."""
    m.inputs.video.range = (0.0, 1.0)
    m.inputs.audio.mel = {
        **presets.MMV_MEL,
        'bins': 40,
        'window': 512,
        'hop': 256,
        'low': 60.0,
        'high': 3800.0,
    }
    m.towers.video.multiplier = 0.25
    if backbone is None:
        m.towers.video.depth = 18
    if backbone in S3D:
        # Maps of 4×4×4 to the end, and four blocks. All pools would leave maps of one position,
        # which learn next to nothing.
        m.towers.video.update({'pools': 2, 'blocks': (1, 2, 1)})
    if 'audio' in m.towers:
        m.towers.audio.update({'depth': 18, 'multiplier': 0.25})
    if 'text' in m.towers:
        # No word2vec here: the table is learnt.
        m.towers.text.update({'vocab': 0, 'word_width': 64, 'width': 256, 'frozen_words': False})


def set_evaluations(evals: ConfigDict, pairs: Pairs, graph: str, modalities: str) -> None:
    """Fits the demo's evaluations to the spaces that are there, in place."""
    spaces = {stream: space for _, stream, space, _ in pairs}
    compared: list[tuple[str, str, str]] = []
    for stream in ('text', 'audio'):
        if stream in spaces:
            compared.append((stream, 'video', spaces[stream]))
            compared.append(('video', stream, spaces[stream]))
    if modalities == 'vat' and graph != 'disjoint':
        # Never trained: words and sound are compared where the graph brings both.
        compared.append(('text', 'audio', spaces['text']))
    evals.retrieval.pairs = tuple(compared)
    if 'audio' in spaces:
        evals.sync.space = spaces['audio']
    else:
        del evals.sync, evals.probe_audio
