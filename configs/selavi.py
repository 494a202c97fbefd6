"""Self-labelling: classes of scenes found without labels.

Method and results: docs/self_labelling.md.

On the playground, by towers of the demo's size:

    python run.py --config=configs/selavi.py:demo --workdir=runs/selavi
        SeLaVi: alignment, Gaussian sizes, 4 heads in 2 groups
    python run.py --config=configs/selavi.py:demo,one_head --workdir=runs/one_head
        one ingredient less: one_head | unaligned | uniform
    python run.py --config=configs/selavi.py:demo,sela --workdir=runs/sela
        video alone
    python run.py --config=configs/selavi.py:demo,xdc --workdir=runs/xdc
        k-means labels of the other modality; sdc: its own, mdc: both, cdc: of both together
    python run.py --config=configs/selavi.py:demo,swav --workdir=runs/swav
        online codes of two views of a video
    python run.py --config=configs/selavi.py:demo,vatt --workdir=runs/selavi_vatt
        VATT's transformers instead of MMV's convolutions
    python run.py --config=configs/selavi.py:demo,synthetic --workdir=runs/synthetic
        no files, no TensorFlow

Videos there hold one scene each, because a record has one label. The table of results compares with
k-means of the features, and with both at random initialisation.

    python run.py --config=configs/selavi.py:vggsound --workdir=runs/selavi_vggsound
        the published setting (64 GPUs)

vggsound, kinetics, kinetics_sound, ave: R(2+1)D-18 on 30 frames of 112 x 112 and ResNet-9 on
log-filterbanks of one second, 10 heads, 200 passes in batches of 1024, over data prepared as
docs/data.md says (--fps=30 --size=128 --rate=24000 --require_audio). Option `code`: as the public
code has it where it departs from the paper.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.models import presets

from . import default, demo, mmv

NUM_CLASSES = 16
# Option -> whose clusters are the labels of a modality (XDC's names).
KMEANS_TARGETS = {'xdc': 'other', 'sdc': 'own', 'mdc': 'both', 'cdc': 'joint'}
INGREDIENTS = ('one_head', 'unaligned', 'uniform')
METHODS = ('sela', 'swav', *KMEANS_TARGETS)
NUM_GPUS = 64
NO_LIMIT = 1 << 20


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Numbers of clusters and of training videos, as published."""

    clusters: int
    videos: int


DATASETS = {
    'vggsound': Dataset(309, 170_752),
    'kinetics': Dataset(400, 230_976),
    'kinetics_sound': Dataset(32, 22_408),
    'ave': Dataset(28, 3_328),
}


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    check_options(name, options)
    is_demo = name == 'demo'
    c = demo_config(options) if is_demo else published_config(name, options)
    c.name = f'selavi {" ".join([name, *options])}'

    objective = c.objective
    if 'one_head' in options:
        objective.heads = objective.groups = 1
    if 'unaligned' in options:
        objective.align = False
    if 'uniform' in options:
        objective.prior = 'uniform'
    if 'sela' in options:
        objective.views = ('video',)
        del c.model.towers['audio']
    for method, targets in KMEANS_TARGETS.items():
        if method in options:
            use_kmeans_labels(c, targets)
    if 'swav' in options:
        use_online_codes(c, is_demo)
    set_evaluations(c, windows=1 if is_demo else 10)
    return c


def check_options(name: str, options: list[str]) -> None:
    """Raises ValueError for a setting or an option that there is not, and for two methods."""
    names = ('demo', *DATASETS)
    if name not in names:
        raise ValueError(f'configs/selavi.py: expected one of {", ".join(names)}, got {name!r}')
    extra = ('vatt', 'synthetic') if name == 'demo' else ('code',)
    known = (*INGREDIENTS, *METHODS, *extra)
    for option in options:
        if option not in known:
            raise ValueError(
                f'configs/selavi.py:{name}: expected an option of {", ".join(known)}, '
                f'got {option!r}'
            )
    methods = [option for option in options if option in METHODS]
    if len(methods) > 1:
        raise ValueError(
            f'configs/selavi.py:{name}: expected at most one method, got {", ".join(methods)}'
        )


def use_kmeans_labels(c: ConfigDict, targets: str) -> None:
    """XDC and its relatives: labels from k-means of features, ten times in a run."""
    c.objective = ConfigDict(
        {
            'name': 'kmeans_labels',
            'views': ('video', 'audio'),
            'targets': targets,
            'clusters': c.objective.clusters,
            'every': max(1, c.steps // 10),
        }
    )


def use_online_codes(c: ConfigDict, is_demo: bool) -> None:
    """SwAV: prototypes and codes of two views of the video.

    Two views of the video, as in the paper: a code of the sound tells an untrained video network
    nothing, and then both collapse.
    """
    clusters, hidden = c.objective.clusters, c.objective.hidden
    c.objective = ConfigDict(
        {
            'name': 'online_codes',
            'views': ('video', 'video.second'),
            'clusters': 4 * clusters,
            'width': 64,
            'hidden': hidden,
        }
    )
    c.data.views = (('video.second', {'kind': 'clip'}),)
    del c.model.towers['audio']
    if is_demo:
        # Small batches: fewer prototypes, sharper codes.
        c.objective.update({'clusters': 2 * clusters, 'epsilon': 0.01, 'freeze': 40})
        c.optimizer.schedule.peak = 5e-4


def set_evaluations(c: ConfigDict, windows: int) -> None:
    """Agreement of clusters with classes, of k-means beside it, probes and neighbours."""
    evals = c.evals = ConfigDict()
    if c.objective.name != 'kmeans_labels':
        evals.clusters = {'type': 'clustering'}
        evals.clusters_test = {'type': 'clustering', 'split': 'test'}
    kmeans = {'type': 'clustering', 'of': 'features'}
    streams = tuple(c.model.towers)
    for stream in streams:
        evals[f'kmeans_{stream}'] = {**kmeans, 'streams': (stream,)}
        evals[f'probe_{stream}'] = whole_probe(stream)
    if len(streams) > 1:
        evals.kmeans = {**kmeans, 'streams': ('video', 'audio')}
    evals.neighbours = {'type': 'neighbours', 'stream': 'video', 'windows': windows}


def whole_probe(stream: str, windows: int = 1) -> dict[str, Any]:
    """A linear probe of the class on all examples of both splits."""
    return {
        'type': 'linear_probe',
        'stream': stream,
        'label': 'class',
        'train_limit': NO_LIMIT,
        'test_limit': NO_LIMIT,
        'windows': windows,
    }


def demo_config(options: list[str]) -> ConfigDict:
    """SeLaVi at the size of the playground."""
    is_synthetic = 'synthetic' in options
    if 'vatt' in options:
        c = demo.get_config('synthetic' if is_synthetic else '')
        c.steps = 500
        del c.model.towers.text
        for tower in c.model.towers.values():
            tower.drop_token = 0.5
    else:
        c = mmv.get_config('demo_fac_va,synthetic' if is_synthetic else 'demo_fac_va')
        c.steps = 300
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict(
        {
            'name': 'self_labelling',
            'views': ('video', 'audio'),
            'clusters': NUM_CLASSES,
            'heads': 4,
            'groups': 2,
            'hidden': 128,
            'dropout': 0.1,
            'prior': 'gaussian',
            'refreshes': 11,
            'warmup': 10,
        }
    )
    c.optimizer.schedule.warmup = 50
    c.checkpoint.every = 100
    # Clusters are of whatever survives augmentation. With the demo's mild one they are colours: 8
    # easy classes that video alone can see.
    a = c.augment
    a.color, a.brightness, a.contrast = 1.0, 0.3, 0.4
    a.saturation, a.hue = 0.8, 0.5
    a.volume = 0.5
    c.data.crop = (0.4, 1.0)
    if not is_synthetic:
        c.data.make.update(
            {
                'path': 'runs/data/scenes',
                'train': 1200,
                'validation': 16,
                'test': 256,
                'seconds': 3.0,
                'episodes': 1,
            }
        )
        scenes = default.records('runs/data/scenes/records')
        c.data.train = ConfigDict({'scenes': scenes})
    return c


def published_config(name: str, options: list[str]) -> ConfigDict:
    """SeLaVi's published run on one of its datasets."""
    dataset = DATASETS[name]
    c = default.get_config()
    c.batch_size, c.compute_dtype = 1024, 'bfloat16'
    epoch = dataset.videos // c.batch_size
    c.steps = 200 * epoch
    m = c.model
    # The published normalisation: pixels in [0, 1], less 0.45, over 0.225.
    pixel_range = (-0.45 / 0.225, 0.55 / 0.225)
    m.inputs.video.update({'frames': 30, 'size': 112, 'fps': 30.0, 'range': pixel_range})
    m.inputs.audio.update({'samples': 24_000, 'rate': 24_000, 'mel': presets.FILTERBANK})
    m.towers = ConfigDict({'video': {'name': 'r2plus1d'}, 'audio': {'name': 'resnet9'}})
    m.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict(
        {
            'name': 'self_labelling',
            'views': ('video', 'audio'),
            'clusters': dataset.clusters,
            'heads': 10,
            'groups': 2,
            'hidden': 512,
            'dropout': 0.3,
            'strength': 20.0,
            'prior': 'gaussian',
            'spread': 0.1,
            'refreshes': 100,
            'power': 1.5,
            'warmup': 20,
            'published_prior': 'code' in options,
            'unit_logits': 'code' in options,
        }
    )

    o = c.optimizer
    # keras_sgd puts the decay into the velocity, as PyTorch's SGD does.
    o.name, o.momentum = 'keras_sgd', 0.9
    o.weight_decay, o.decay_skip, o.frozen = 1e-5, (), ()
    o.schedule.update({'name': 'constant', 'peak': 1e-2 * NUM_GPUS, 'warmup': 10 * epoch})
    c.data.train[name] = default.records(f'data/{name}/records')
    # A square of 112 out of frames whose short side is 128 to 160.
    c.data.crop, c.data.aspect = (0.49, 0.77), (1.0, 1.0)
    c.augment.color, c.augment.audio_noise, c.augment.volume = 0.0, 0.0, 0.1
    c.checkpoint.every, c.checkpoint.keep, c.log_every = 10 * epoch, 5, 50
    return c
