"""Self-labelling. On the playground: classes of scenes found without labels, by towers of the demo's size. Method and results: docs/self_labelling.md

    python run.py --config=configs/selavi.py:demo --workdir=runs/selavi               # SeLaVi: alignment, Gaussian sizes, 4 heads in 2 groups
    python run.py --config=configs/selavi.py:demo,one_head --workdir=runs/one_head    # one ingredient less: one_head | unaligned | uniform
    python run.py --config=configs/selavi.py:demo,sela --workdir=runs/sela            # video alone
    python run.py --config=configs/selavi.py:demo,xdc --workdir=runs/xdc              # k-means labels of the other modality; sdc: its own,
                                                                                      # mdc: both, cdc: of both together
    python run.py --config=configs/selavi.py:demo,swav --workdir=runs/swav            # online codes of two views of a video
    python run.py --config=configs/selavi.py:demo,vatt --workdir=runs/selavi_vatt     # VATT's transformers instead of MMV's convolutions
    python run.py --config=configs/selavi.py:demo,synthetic --workdir=runs/synthetic  # no files, no TensorFlow

Videos there hold one scene each, because a record has one label. The results' table compares with k-means of the features, and with both at
random initialisation.

    python run.py --config=configs/selavi.py:vggsound --workdir=runs/selavi_vggsound  # the published setting (64 GPUs)

vggsound, kinetics, kinetics_sound, ave: R(2+1)D-18 on 30 frames of 112 x 112 and ResNet-9 on log-filterbanks of one second, 10 heads, 200 passes
in batches of 1024, over data prepared as docs/data.md says (--fps=30 --size=128 --rate=24000 --require_audio). `code`: as the public code has it
where it departs from the paper.
"""

from ml_collections import ConfigDict

from configs import default, demo, mmv
from vatt_jax.models import presets

CLASSES = 16
METHODS = ('one_head', 'unaligned', 'uniform', 'sela', 'xdc', 'sdc', 'mdc', 'cdc', 'swav')
TARGETS = {'xdc': 'other', 'sdc': 'own', 'mdc': 'both', 'cdc': 'joint'}
# dataset -> (clusters, training videos) as published
DATASETS = {
    'vggsound': (309, 170_752),
    'kinetics': (400, 230_976),
    'kinetics_sound': (32, 22_408),
    'ave': (28, 3_328),
}
GPUS = 64


def get_config(arg: str = 'demo'):
    name, *options = (arg or 'demo').split(',')
    if name not in ('demo', *DATASETS):
        raise ValueError(
            f'configs/selavi.py has no setting {name!r}; there are demo, {", ".join(DATASETS)}'
        )
    known = (*METHODS, 'vatt', 'synthetic') if name == 'demo' else (*METHODS, 'code')
    for o in options:
        if o not in known:
            raise ValueError(
                f'configs/selavi.py:{name} has no option {o!r}; there are {", ".join(known)}'
            )
    chosen = [o for o in options if o in ('sela', 'swav', *TARGETS)]
    if len(chosen) > 1:
        raise ValueError(
            f'configs/selavi.py:{name} takes one method, {len(chosen)} given: {", ".join(chosen)}'
        )
    c = _demo(options) if name == 'demo' else _published(name, options)
    c.name = f'selavi {" ".join([name, *options])}'

    o = c.objective
    if 'one_head' in options:
        o.heads = o.groups = 1
    if 'unaligned' in options:
        o.align = False
    if 'uniform' in options:
        o.prior = 'uniform'
    if 'sela' in options:
        o.views = ('video',)
        del c.model.towers['audio']
    for method in TARGETS.keys() & set(options):
        c.objective = ConfigDict(
            {
                'name': 'kmeans_labels',
                'views': ('video', 'audio'),
                'targets': TARGETS[method],
                'clusters': o.clusters,
                'every': max(1, c.steps // 10),
            }
        )
    if 'swav' in options:
        # Two views of the video, as in the paper: a code of the sound tells an untrained video network nothing, and then both collapse.
        c.objective = ConfigDict(
            {
                'name': 'online_codes',
                'views': ('video', 'video.second'),
                'clusters': 4 * o.clusters,
                'width': 64,
                'hidden': o.hidden,
            }
        )
        c.data.views = (('video.second', {'kind': 'clip'}),)
        del c.model.towers['audio']
        if name == 'demo':  # small batches: fewer prototypes, sharper codes
            c.objective.update({'clusters': 2 * o.clusters, 'epsilon': 0.01, 'freeze': 40})
            c.optimizer.schedule.peak = 5e-4

    e = c.evals = ConfigDict()
    if c.objective.name != 'kmeans_labels':
        e.clusters = {'type': 'clustering'}
        e.clusters_test = {'type': 'clustering', 'split': 'test'}
    for stream in tuple(c.model.towers):
        e[f'kmeans_{stream}'] = {'type': 'clustering', 'of': 'features', 'streams': (stream,)}
        e[f'probe_{stream}'] = {
            'type': 'linear_probe',
            'stream': stream,
            'label': 'class',
            'train_limit': 1 << 20,
            'test_limit': 1 << 20,
        }
    if len(c.model.towers) > 1:
        e.kmeans = {'type': 'clustering', 'of': 'features', 'streams': ('video', 'audio')}
    e.neighbours = {'type': 'neighbours', 'stream': 'video', 'windows': 1 if name == 'demo' else 10}
    return c


def _demo(options):
    source = ['synthetic'] * ('synthetic' in options)
    if 'vatt' in options:
        c = demo.get_config(*source)
        c.steps = 500
        del c.model.towers.text
        for tower in c.model.towers.values():
            tower.drop_token = 0.5
    else:
        c = mmv.get_config(','.join(['demo_fac_va', *source]))
        c.steps = 300
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict(
        {
            'name': 'self_labelling',
            'views': ('video', 'audio'),
            'clusters': CLASSES,
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
    # Clusters are of whatever survives augmentation. With the demo's mild one they are colours: 8 easy classes that video alone can see.
    c.augment.update(
        {
            'color': 1.0,
            'brightness': 0.3,
            'contrast': 0.4,
            'saturation': 0.8,
            'hue': 0.5,
            'volume': 0.5,
        }
    )
    c.data.crop = (0.4, 1.0)
    if 'synthetic' not in options:
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
        c.data.train = ConfigDict(
            {
                'scenes': {
                    'path': 'runs/data/scenes/records',
                    'split': 'train',
                    'weight': 1.0,
                    'share': 0.0,
                }
            }
        )
    return c


def _published(name, options):
    clusters, videos = DATASETS[name]
    c = default.get_config()
    c.batch_size, c.compute_dtype = 1024, 'bfloat16'
    epoch = videos // c.batch_size
    c.steps = 200 * epoch
    m = c.model
    # frames less 0.45, over 0.225
    m.inputs.video.update(
        {'frames': 30, 'size': 112, 'fps': 30.0, 'range': (-0.45 / 0.225, 0.55 / 0.225)}
    )
    m.inputs.audio.update({'samples': 24_000, 'rate': 24_000, 'mel': presets.FILTERBANK})
    m.towers = ConfigDict({'video': {'name': 'r2plus1d'}, 'audio': {'name': 'resnet9'}})
    m.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict(
        {
            'name': 'self_labelling',
            'views': ('video', 'audio'),
            'clusters': clusters,
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
    # keras_sgd puts the decay into the velocity, as PyTorch's SGD does
    o.name, o.momentum, o.weight_decay, o.decay_skip, o.frozen = 'keras_sgd', 0.9, 1e-5, (), ()
    o.schedule.update({'name': 'constant', 'peak': 1e-2 * GPUS, 'warmup': 10 * epoch})
    c.data.train[name] = {
        'path': f'data/{name}/records',
        'split': 'train',
        'weight': 1.0,
        'share': 0.0,
    }
    c.data.crop, c.data.aspect = (
        (0.49, 0.77),
        (1.0, 1.0),
    )  # a square of 112 out of frames whose short side is 128 to 160
    c.augment.color, c.augment.audio_noise, c.augment.volume = 0.0, 0.0, 0.1
    c.checkpoint.every, c.checkpoint.keep, c.log_every = 10 * epoch, 5, 50
    return c
