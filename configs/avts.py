"""AVTS: is this the sound of this moment? (Korbar, Tran and Torresani, 2018)

Method, results and what of the published settings is certain: docs/avts.md.

    python run.py --config=configs/avts.py:demo --workdir=runs/avts
        on the playground, by small MC3 and VGG: easy negatives first, then a quarter of hard ones
    python run.py --config=configs/avts.py:demo,no_curriculum --workdir=runs/avts_easy
        easy negatives to the end
    python run.py --config=configs/avts.py:demo,hard_only --workdir=runs/avts_hard
        hard negatives from the start
    python run.py --config=configs/avts.py:demo,synthetic --workdir=runs/avts_synthetic
        no files, no TensorFlow
    python run.py --config=configs/avts.py:kinetics --workdir=runs/avts_kinetics
        the published setting (4 GPUs); audioset and soundnet too. mc2: MC2 instead of MC3

The data of the published runs are prepared as docs/data.md says (--fps=25 --size=256 --rate=24000
--require_audio).
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose
from vatt_jax.models import presets

from . import default, demo

# Least time between the windows of a clip and of its hard negative, in seconds.
APART = 0.5
# Published: epochs of easy negatives, and of the whole run.
EASY_EPOCHS, EPOCHS = 50, 90
EASY = (1.0, 0.0, 0.0)
QUARTER_HARD = (0.75, 0.25, 0.0)
HARD = (0.0, 1.0, 0.0)
# Name -> videos, rounded as the paper has them.
DATASETS = {'kinetics': 230_000, 'audioset': 1_800_000, 'soundnet': 2_000_000}
OPTIONS = {
    'demo': ('no_curriculum', 'hard_only', 'synthetic'),
    **{name: ('no_curriculum', 'hard_only', 'mc2') for name in DATASETS},
}


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, OPTIONS, 'configs/avts.py')
    for option in options:
        choose(option, OPTIONS[name], f'configs/avts.py:{name} option')
    if {'no_curriculum', 'hard_only'} <= set(options):
        raise ValueError('configs/avts.py: expected one of no_curriculum and hard_only, got both')
    c = demo_config(options) if name == 'demo' else published_config(name, options)
    c.name = f'AVTS {" ".join([name, *options])}'
    set_objective(c, options)
    set_evaluations(c)
    return c


def set_objective(c: ConfigDict, options: list[str]) -> None:
    """The margin loss and its curriculum, in place."""
    # (first step, shares of the kinds of negatives)
    curriculum: tuple[tuple[int, tuple[float, ...]], ...] = (
        (0, EASY),
        (c.steps * EASY_EPOCHS // EPOCHS, QUARTER_HARD),
    )
    if 'no_curriculum' in options:
        curriculum = ((0, EASY),)
    if 'hard_only' in options:
        curriculum = ((0, HARD),)
    c.objective = ConfigDict({'name': 'synchronisation', 'curriculum': curriculum})
    if 'no_curriculum' not in options:
        far = {'kind': 'shift', 'seconds': 'random', 'apart': APART}
        c.data.views = (('audio.shifted', far),)


def set_evaluations(c: ConfigDict) -> None:
    """Pairs in and out of sync, told apart by their distance; retrieval and linear probes."""
    evals = c.evals = ConfigDict()
    # The threshold is that of the validation split.
    sync = {'type': 'sync', 'measure': 'distance', 'threshold_split': 'validation', 'limit': 768}
    evals.sync_easy = {**sync, 'against': 'other'}
    evals.sync_hard = {**sync, 'apart': APART}
    evals.retrieval = {
        'type': 'retrieval',
        'limit': 768,
        'pairs': (('audio', 'video', 'va'), ('video', 'audio', 'va')),
    }
    for stream in ('video', 'audio'):
        evals[f'probe_{stream}'] = {
            'type': 'linear_probe',
            'stream': stream,
            'label': 'class',
            'strengths': (0.1, 1.0),
        }


def demo_config(options: list[str]) -> ConfigDict:
    """AVTS at the size of the playground."""
    c = demo.get_config('synthetic' if 'synthetic' in options else '')
    c.steps = 600
    # XLA's older code generator, which the other demos take, runs VGG's pooling slowly.
    c.compiler_options = {'xla_llvm_disable_expensive_passes': True}
    m = c.model
    # Windows of one second, as published: of two there is seldom another one in 8 seconds.
    m.inputs.video.update({'frames': 8, 'size': 32, 'fps': 8.0})
    m.inputs.audio.update({'samples': 8000, 'rate': 8000})
    m.inputs.audio.mel = {
        **presets.FILTERBANK,
        'bins': 40,
        'window': 320,
        'hop': 160,
        'transform': 512,
        'high': 4000.0,
    }
    m.towers = ConfigDict(
        {
            'video': {**presets.tower('mc3'), 'multiplier': 0.125},
            'audio': {'name': 'vggish', 'dense': (), 'multiplier': 0.125, 'batch_norm': True},
        }
    )
    m.head = ConfigDict({'name': 'linear', 'va': 128})
    o = c.optimizer
    o.name, o.weight_decay, o.clip = 'adam', 0.0, 1.0
    o.schedule.update({'peak': 1e-3, 'warmup': 60, 'end': 1e-5})
    c.augment.audio_noise = 0.0
    c.checkpoint.every = 100
    return c


def published_config(name: str, options: list[str]) -> ConfigDict:
    """The published run on one of its datasets; docs/avts.md says what of it is certain."""
    c = default.get_config()
    c.batch_size, c.compute_dtype = 64, 'bfloat16'
    epoch = DATASETS[name] // c.batch_size
    c.steps = EPOCHS * epoch
    m = c.model
    m.inputs.video.update({'frames': 25, 'size': 224, 'fps': 25.0, 'range': (-2.0, 2.0)})
    m.inputs.audio.update({'samples': 24_000, 'rate': 24_000})
    m.inputs.audio.mel = {**presets.FILTERBANK, 'bins': 40}
    video = presets.tower('mc2' if 'mc2' in options else 'mc3')
    # VGG's convolutions and two layers; the last linear one is the head.
    audio = {'name': 'vggish', 'dense': (4096, 4096), 'batch_norm': True}
    m.towers = ConfigDict({'video': video, 'audio': audio})
    m.head = ConfigDict({'name': 'linear', 'va': 1024})

    o = c.optimizer
    # keras_sgd puts the decay into the velocity, as PyTorch's SGD does.
    o.name, o.momentum = 'keras_sgd', 0.9
    o.weight_decay, o.frozen = 1e-5, ()
    o.schedule.update({'name': 'warmup_cosine', 'peak': 1e-2, 'warmup': epoch, 'end': 0.0})
    c.data.train[name] = default.records(f'data/{name}/records')
    # Several scales of a square.
    c.data.crop, c.data.aspect = (0.4, 1.0), (1.0, 1.0)
    c.augment.color, c.augment.audio_noise = 0.0, 0.0
    c.checkpoint.every, c.checkpoint.keep, c.log_every = epoch, 5, 50
    return c
