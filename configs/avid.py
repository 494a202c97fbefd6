"""AVID and CMA: instance discrimination against a memory of all records.

Method and results: docs/avid.md.

On the playground, by towers of the demo's size:

    python run.py --config=configs/avid.py:demo --workdir=runs/avid
        AVID-Cross: the sound of a clip against videos of all records, and the other way
    python run.py --config=configs/avid.py:demo,self --workdir=runs/avid_self
        within each modality; joint: within and across
    python run.py --config=configs/avid.py:demo,cma --workdir=runs/avid_cma
        AVID, and then CMA: records that agree by sight and by sound are positives of one another
    python run.py --config=configs/avid.py:demo,synthetic --workdir=runs/try
        no files, no TensorFlow

Videos there hold one scene each, because a record has one vector in each memory.

    python run.py --config=configs/avid.py:kinetics,cma --workdir=runs/avid_kinetics
        the published setting (8 GPUs): 30 passes of AVID, 20 of CMA, ten clips of a record in each
    python run.py --config=configs/avid.py:audioset,cma --workdir=runs/avid_audioset
        40 passes of each, five clips of a record in each

kinetics and audioset: R(2+1)D-18 on 8 frames of 224 x 224 and ten convolutional layers on two
seconds of sound, over data prepared as docs/data.md says (--fps=16 --size=256 --rate=24000
--require_audio).
"""

import dataclasses

from ml_collections import ConfigDict

from vatt_jax.config import choose
from vatt_jax.models import presets

from . import default, selavi

# (view of the clip, view of the memory)
ACROSS = (('video', 'audio'), ('audio', 'video'))
WITHIN = (('video', 'video'), ('audio', 'audio'))
DIRECTIONS = {'cross': ACROSS, 'self': WITHIN, 'joint': ACROSS + WITHIN}
OPTIONS = (*DIRECTIONS, 'cma')


@dataclasses.dataclass(frozen=True)
class Published:
    """A published run.

    Attributes:
        videos: training records.
        batch_size: over 8 GPUs.
        clips: of a record in one pass, at random places of it.
        passes: of AVID and of CMA.
        rates: learning rates of AVID and of CMA, constant.
        refresh: passes of CMA from refresh to refresh.
    """

    videos: int
    batch_size: int
    clips: int
    passes: tuple[int, int]
    rates: tuple[float, float]
    refresh: int

    @property
    def steps_per_pass(self) -> int:
        return self.videos * self.clips // self.batch_size


PUBLISHED = {
    'kinetics': Published(232_067, 256, 10, (30, 20), (2e-4, 2e-4), 5),
    'audioset': Published(1_784_108, 160, 5, (40, 40), (5e-4, 1e-4), 10),
}


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, ('demo', *PUBLISHED), 'configs/avid.py')
    known = (*OPTIONS, 'synthetic') if name == 'demo' else OPTIONS
    for option in options:
        choose(option, known, f'configs/avid.py:{name} option')
    c = demo_config(options) if name == 'demo' else published_config(PUBLISHED[name], name)
    c.name = f'AVID {" ".join([name, *options])}'

    for kind, directions in DIRECTIONS.items():
        if kind in options:
            c.objective.directions = directions
    if 'cma' in options:
        add_cma(c, None if name == 'demo' else PUBLISHED[name])
    return c


def objective_config() -> ConfigDict:
    """The published objective: AVID-Cross."""
    return ConfigDict(
        {
            'name': 'instance_memory',
            'space': 'va',
            'directions': ACROSS,
            'negatives': 1024,
            'temperature': 0.07,
            'momentum': 0.5,
            'positives': 0,
            'positive_directions': WITHIN,
            'positive_negatives': 64,
            'positive_weight': 0.5,
            'every': 10_000,
        }
    )


def add_cma(c: ConfigDict, published: Published | None) -> None:
    """CMA as a second phase, from AVID's weights, memories and Z, in place."""
    if published:
        steps = published.passes[1] * published.steps_per_pass
        every = published.refresh * published.steps_per_pass
        positives, rate = 32, published.rates[1]
    else:
        steps, every, positives, rate = c.steps // 2, 50, 16, c.optimizer.schedule.peak
    cma = {
        'init_from': 'phase:avid',
        'init_trees': ('model', 'state'),
        'steps': steps,
        'optimizer.schedule.peak': rate,
        'objective.positives': positives,
        'objective.every': every,
    }
    c.phases = (('avid', {}), ('cma', cma))


def demo_config(options: list[str]) -> ConfigDict:
    """AVID at the size of the playground."""
    # Towers and single-scene videos of the self-labelling demo.
    c = selavi.demo_config(options)
    c.steps = 600
    set_augmentation(c.augment)
    # Slower, the loss stays on its plateau (docs/avid.md).
    c.optimizer.schedule.peak = 3e-3
    c.model.head = ConfigDict({'name': 'avid', 'hidden': 128, 'va': 64})
    c.objective = objective_config()
    # Once in every pass each, the own vector of a clip would always be older than those of the
    # negatives, which its network can tell without knowing the record.
    c.data.clips_per_epoch = PUBLISHED['kinetics'].clips
    # Of 1200 records.
    c.objective.update({'negatives': 256, 'positive_negatives': 64})
    evals = c.evals = ConfigDict()
    pairs = (('audio', 'video', 'va'), ('video', 'audio', 'va'))
    evals.retrieval = {'type': 'retrieval', 'pairs': pairs}
    set_probes(evals, windows=1)
    # Of few records, more passes.
    evals.stages_video.epochs = 50
    return c


def published_config(published: Published, name: str) -> ConfigDict:
    """AVID's published run on one of its datasets."""
    c = default.get_config()
    c.batch_size, c.compute_dtype = published.batch_size, 'bfloat16'
    c.steps = published.passes[0] * published.steps_per_pass
    m = c.model
    # The published normalisation, by the mean of ImageNet's three colours.
    pixel_range = (-0.449 / 0.226, 0.551 / 0.226)
    m.inputs.video.update({'frames': 8, 'size': 224, 'fps': 16.0, 'range': pixel_range})
    m.inputs.audio.update({'samples': 48_000, 'rate': 24_000, 'mel': presets.DECIBELS})
    m.towers = ConfigDict(
        {'video': presets.tower('avid_video'), 'audio': presets.tower('avid_audio')}
    )
    m.head = ConfigDict({'name': 'avid', 'hidden': 512, 'va': 128})
    c.objective = objective_config()

    o = c.optimizer
    o.name, o.eps = 'adam', 1e-8
    o.weight_decay, o.decay_skip, o.frozen = 1e-5, (), ()
    o.schedule.update({'name': 'constant', 'peak': published.rates[0], 'warmup': 0})
    c.data.train[name] = default.records(f'data/{name}/records')
    c.data.clips_per_epoch = published.clips
    c.data.crop, c.data.aspect = (0.08, 1.0), (0.75, 4 / 3)
    set_augmentation(c.augment)
    c.checkpoint.every, c.checkpoint.keep, c.log_every = published.steps_per_pass, 5, 50
    set_probes(c.evals, windows=10)
    return c


def set_augmentation(augment: ConfigDict) -> None:
    """The published jitter of colour and volume, in place."""
    augment.color, augment.brightness, augment.gain, augment.contrast = 1.0, 0.0, 0.4, 0.4
    augment.saturation, augment.hue = 0.4, 0.2
    augment.audio_noise, augment.volume = 0.0, 0.1


def set_probes(evals: ConfigDict, windows: int) -> None:
    """Linear probes of both towers and of the video's stages, neighbours of videos, in place."""
    for stream in ('video', 'audio'):
        evals[f'probe_{stream}'] = selavi.whole_probe(stream, windows)
    evals.stages_video = {
        'type': 'stage_probe',
        'stream': 'video',
        'label': 'class',
        # Of a clip there are 35 thousand numbers: 5.6 GB.
        'train_limit': 40_000,
        'test_limit': 10_000,
        'windows': 1,
    }
    evals.neighbours = {'type': 'neighbours', 'stream': 'video', 'windows': windows}
