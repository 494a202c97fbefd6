"""SimCLR on video, and CVRL: two views of a video find each other among all others.

Method, augmentation and results: docs/simclr.md.

On the playground, by an R3D of four narrow blocks:

    python run.py --config=configs/simclr.py:demo --workdir=runs/simclr
        SimCLR: both views are of one clip
    python run.py --config=configs/simclr.py:demo,cvrl --workdir=runs/cvrl
        CVRL: two clips, at a distance that is drawn
    python run.py --config=configs/simclr.py:demo,coclr --workdir=runs/mild
        CoCLR's augmentation: each view takes the strong set three times in ten
    python run.py --config=configs/simclr.py:demo,plain --workdir=runs/plain
        cropped and mirrored alone
    python run.py --config=configs/simclr.py:demo,synthetic --workdir=runs/try
        no files, no TensorFlow

    python run.py --config=configs/simclr.py:kinetics400,cvrl --workdir=runs/cvrl_k400
        the published setting: R3D-50, 800 passes in batches of 1024

kinetics400, kinetics600: over data prepared as docs/data.md says (--fps=25 --size=256).
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import default, demo

OPTIONS = ('cvrl', 'coclr', 'plain', 'synthetic')
# Training videos: those of both sets that CVRL's schedule of 200 passes counts (K600), and as
# SeLaVi has it (K400).
NUM_VIDEOS = {'kinetics400': 230_976, 'kinetics600': 366_016}
NUM_PASSES = 800
VIEWS = ('video', 'video.second')


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, ('demo', *NUM_VIDEOS), 'configs/simclr.py')
    for option in options:
        choose(option, OPTIONS, f'configs/simclr.py:{name} option')
    c = demo_config(options) if name == 'demo' else published_config(name, options)
    c.name = f'SimCLR {" ".join([name, *options])}'
    set_method(c, is_cvrl='cvrl' in options)
    set_augmentation(c, options)
    set_evaluations(c, windows=1 if name == 'demo' else 10)
    return c


def set_method(c: ConfigDict, is_cvrl: bool) -> None:
    """Two views of the video, and one loss between them, in place."""
    # A shift by nothing is the same clip once more, with a crop and colours of its own.
    second = {'kind': 'shift', 'seconds': 0.0}
    if is_cvrl:
        second = {'kind': 'clip', 'interval': 'linear'}
    c.data.views = ((VIEWS[1], second),)
    c.objective = ConfigDict(
        {
            'name': 'contrastive',
            'pairs': ((*VIEWS, 'video', 1.0),),
            'form': 'nt_xent',
            'temperature': 0.1,
        }
    )
    c.model.head.name = 'cvrl' if is_cvrl else 'simclr'


def set_augmentation(c: ConfigDict, options: list[str]) -> None:
    """SimCLR's strong set for both views; CVRL's released code blurs and solarises by view."""
    c.data.crop, c.data.aspect = (0.3, 1.0), (0.5, 2.0)
    a = c.augment
    a.color, a.brightness, a.gain = 0.8, 0.0, 0.8
    a.contrast, a.saturation, a.hue = 0.8, 0.8, 0.2
    a.grey = 0.2
    a.blur, a.blur_sigma, a.blur_width = 0.5, (0.1, 2.0), 0.1
    if 'cvrl' in options:
        a.views = ((VIEWS[0], {'blur': 1.0}), (VIEWS[1], {'blur': 0.1, 'solarise': 0.2}))
    if 'coclr' in options:
        a.strong = 0.3
    if 'plain' in options:
        a.strong = 0.0


def set_evaluations(c: ConfigDict, windows: int) -> None:
    """A linear probe and nearest neighbours of the video features, in place."""
    c.evals = ConfigDict()
    c.evals.probe_video = {'type': 'linear_probe', 'stream': 'video', 'label': 'class'}
    c.evals.neighbours = {'type': 'neighbours', 'stream': 'video', 'windows': windows}


def demo_config(options: list[str]) -> ConfigDict:
    """A run of the playground's size."""
    c = demo.get_config('synthetic' if 'synthetic' in options else '')
    c.steps = 600
    c.model.inputs.video.range = (0.0, 1.0)
    video = {'name': 'r3d', 'blocks': (1, 1, 1, 1), 'multiplier': 0.25}
    c.model.towers = ConfigDict({'video': video})
    c.model.head = ConfigDict({'name': 'simclr', 'hidden': 256, 'video': 64})
    o = c.optimizer
    o.name, o.weight_decay, o.clip = 'adam', 0.0, 0.0
    o.schedule.update({'peak': 2e-3, 'warmup': 60, 'end': 0.0})
    c.checkpoint.every = 200
    return c


def published_config(name: str, options: list[str]) -> ConfigDict:
    """CVRL's published run on one of its sets, by the numbers of its released code."""
    c = default.get_config()
    c.batch_size, c.compute_dtype = 1024, 'bfloat16'
    epoch = NUM_VIDEOS[name] // c.batch_size
    c.steps = NUM_PASSES * epoch
    # 16 of 32 frames, of videos of 25 a second (which the sources at hand do not say).
    c.model.inputs.video.update({'frames': 16, 'size': 224, 'fps': 12.5, 'range': (0.0, 1.0)})
    c.model.towers = ConfigDict({'video': {'name': 'r3d'}})
    c.model.head = ConfigDict({'name': 'simclr', 'hidden': 2048, 'video': 128})

    o = c.optimizer
    # keras_sgd puts the decay into the velocity, as a penalty on the weights does.
    o.name, o.momentum, o.frozen = 'keras_sgd', 0.9, ()
    # Published are 0.32 and 1e-6 for the sum of both views' losses; here the loss is their mean.
    o.weight_decay, o.decay_skip = 1e-6 / 2, (r'bias$', r'scale$')
    o.schedule.update({'name': 'warmup_cosine', 'peak': 0.32 * 2, 'warmup': 5 * epoch, 'end': 0.0})

    if 'synthetic' in options:
        c.data.source = 'synthetic'
    else:
        c.data.train[name] = default.records(f'data/{name}/records')
    c.checkpoint.every, c.checkpoint.keep, c.log_every = 10 * epoch, 5, 50
    return c
