"""STiCA: contrast across modalities and between crops of feature maps (Patrick et al. 2021).

Method and results: docs/gdt.md.

On the playground, by towers of the demo's size:

    python run.py --config=configs/stica.py:demo --workdir=runs/stica
        crops of space and of time, a transformer that pools time
    python run.py --config=configs/stica.py:demo,space --workdir=runs/stica_space
        crops of one axis alone: space | time; mean: time is averaged
    python run.py --config=configs/stica.py:demo,synthetic --workdir=runs/synthetic
        no files, no TensorFlow

Published settings (64 GPUs):

    python run.py --config=configs/stica.py:kinetics --workdir=runs/stica_kinetics
        R(2+1)D-18 on 60 frames of 112 x 112 at 30 fps, ResNet-9 on two seconds of sound; 150 passes
        in batches of 512, over data prepared as docs/data.md says (--fps=30 --size=128
        --rate=24000 --require_audio)
    python run.py --config=configs/stica.py:kinetics,second --workdir=runs/stica_second
        30 frames and one second

Option `code`: places of crops as the public code draws them. Fine-tuning:
configs/selavi_finetune.py, with --config.init_from=runs/stica_kinetics.
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import mmv, selavi

OPTIONS = ('space', 'time', 'mean', 'code')
NUM_GPUS = 64
PER_GPU = 8
NUM_VIDEOS = 230_976
# The same clip once more, with a crop and colours of its own.
VIEWS = (('video.second', {'kind': 'shift', 'seconds': 0.0}),)


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, ('demo', 'kinetics'), 'configs/stica.py')
    known = (*OPTIONS, 'synthetic' if name == 'demo' else 'second')
    for option in options:
        choose(option, known, f'configs/stica.py:{name} option')
    c = demo_config(options) if name == 'demo' else published_config(options)
    c.name = f'STiCA {" ".join([name, *options])}'
    c.data.views = VIEWS

    objective = c.objective
    if 'space' in options:
        objective.time_crops = (0, 0)
    if 'time' in options:
        objective.space_crops = (0, 0)
    if 'mean' in options:
        objective.layers = 0
    objective.published_offsets = 'code' in options
    return c


def demo_config(options: list[str]) -> ConfigDict:
    """STiCA at the size of the playground."""
    # S3D of fewer pools, whose maps are 4×4×4 to the end.
    synthetic = ['synthetic'] if 'synthetic' in options else []
    c = mmv.get_config(','.join(['demo_fac_va', 's3d', *synthetic]))
    c.steps = 300
    c.model.head = ConfigDict({'name': 'none'})
    c.objective = ConfigDict(
        {
            'name': 'stica',
            'space_crops': (2, 4),
            'time_crops': (2, 1),
            'space_sizes': (3, 2),
            'time_sizes': (3, 2),
            'layers': 2,
            'mlp': 256,
            'width': 64,
            'hidden': 128,
            'dropout': 0.1,
        }
    )
    c.optimizer.schedule.warmup = 50
    c.checkpoint.every = 100
    c.data.crop = (0.4, 1.0)
    set_colours(c)
    # In the space of the objective's own heads.
    c.evals.retrieval.pairs = (('audio', 'video', 'stica'), ('video', 'audio', 'stica'))
    c.evals.sync.space = 'stica'
    c.evals.neighbours = {'type': 'neighbours', 'stream': 'video', 'windows': 1}
    return c


def published_config(options: list[str]) -> ConfigDict:
    """STiCA's published run on Kinetics-400."""
    # Towers, optimizer and sound of the same authors' SeLaVi.
    c = selavi.published_config('kinetics', [])
    c.batch_size = PER_GPU * NUM_GPUS
    epoch = NUM_VIDEOS // c.batch_size
    c.steps = 150 * epoch
    c.optimizer.schedule.warmup = 10 * epoch
    c.checkpoint.every = 10 * epoch
    is_second = 'second' in options
    c.objective = ConfigDict(
        {
            'name': 'stica',
            'space_crops': (2, 4),
            'time_crops': (2, 1),
            'space_sizes': (6, 4),
            'time_sizes': (3, 2) if is_second else (6, 4),
        }
    )
    if not is_second:
        c.model.inputs.video.frames = 60
        c.model.inputs.audio.samples = 48_000
    c.data.crop, c.data.aspect = (0.14, 1.0), (3 / 4, 4 / 3)
    set_colours(c)
    return c


def set_colours(c: ConfigDict) -> None:
    """The published augmentation of pictures, in place."""
    a = c.augment
    a.color, a.brightness, a.gain = 0.8, 0.0, 0.4
    a.contrast, a.saturation, a.hue = 0.4, 0.4, 0.0
    a.grey, a.blur = 0.2, 0.5
