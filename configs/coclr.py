"""CoCLR: each of two modalities finds positives for the other.

Method and results: docs/coclr.md.

On the playground, video and sound, by towers of the demo's size:

    python run.py --config=configs/coclr.py:demo --workdir=runs/coclr
        InfoNCE on either, then CoCLR on either with the other one's network, as phases
    python run.py --config=configs/coclr.py:demo,infonce --workdir=runs/infonce_video
    python run.py --config=configs/coclr.py:demo,infonce,other --workdir=runs/infonce_audio
        InfoNCE alone; `other`: on the other modality of the pair
    python run.py --config=configs/coclr.py:demo,coclr --workdir=runs/coclr_video \\
        --config.init_from=runs/infonce_video --config.objective.sampler=runs/infonce_audio
        CoCLR alone, from these two
    python run.py --config=configs/coclr.py:demo,infonce,synthetic --workdir=runs/try
        no files, no TensorFlow
    python run.py --config=configs/coclr.py:demo,flow --workdir=runs/coclr_flow \\
        "--config.data.train={'mine': {'path': 'data/mine'}}"
        optical flow instead of sound, on data that were prepared with --flow (docs/data.md)

Published, video and optical flow:

    python run.py --config=configs/coclr.py:ucf101 --workdir=runs/coclr_ucf101
    python run.py --config=configs/coclr.py:k400 --workdir=runs/coclr_k400
        S3D on 32 frames of 128 x 128; InfoNCE 300 epochs, then two cycles of CoCLR of 100 (ucf101)
        or 50 (k400) epochs for each modality

Option `audio`: sound instead of flow. Records are looked for in data/NAME/records.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose
from vatt_jax.models import presets

from . import default, selavi

STAGES = ('infonce', 'coclr')
PAIRS = ('audio', 'flow')


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a published run depends on.

    Attributes:
        videos: of the training split; by it epochs become steps.
        queue: keys.
        epochs: of CoCLR, for each modality and cycle.
        drop: the epoch of these at which the rate falls to a tenth.
    """

    videos: int
    queue: int
    epochs: int
    drop: int


DATASETS = {
    # Split 1.
    'ucf101': Dataset(9_537, 2_048, 100, 80),
    # As many as others found of it; what can be downloaded becomes fewer.
    'k400': Dataset(232_067, 16_384, 50, 40),
}
INFONCE_EPOCHS, INFONCE_DROPS = 300, (250, 280)
CYCLES = 2
BATCH_SIZE = 128
# Network of each modality. Those for video read flow too.
DEMO_TOWERS: dict[str, dict[str, Any]] = {
    'video': {'name': 'tsm_resnet', 'depth': 18, 'multiplier': 0.25},
    'flow': {'name': 'tsm_resnet', 'depth': 18, 'multiplier': 0.25},
    'audio': {'name': 'resnet2d_v2', 'depth': 18, 'multiplier': 0.25},
}
TOWERS: dict[str, dict[str, Any]] = {
    'video': {'name': 's3d', 'space_to_depth': False},
    'flow': {'name': 's3d', 'space_to_depth': False},
    'audio': {'name': 'resnet9'},
}


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    check_options(name, options)
    is_demo = name == 'demo'
    c = demo_config('synthetic' in options) if is_demo else published_config(name)
    c.name = f'CoCLR {" ".join([name, *options])}'
    pair = chosen_of(PAIRS, options) or ('audio' if is_demo else 'flow')
    streams = ('video', pair)
    trained, other = streams[::-1] if 'other' in options else streams
    stage = chosen_of(STAGES, options)
    if stage:
        set_fields(c, stage_fields(name, stage, trained, other))
    else:
        c.phases = phases(name, streams, cycles=1 if is_demo else CYCLES)
    used = (trained,) if stage == 'infonce' else streams
    if 'flow' in used:
        describe_flow(c.model.inputs)
    return c


def check_options(name: str, options: list[str]) -> None:
    """Raises ConfigError for a setting or an option that there is not."""
    choose(name, ('demo', *DATASETS), 'configs/coclr.py: setting')
    known = (*STAGES, 'other', *PAIRS, *(('synthetic',) if name == 'demo' else ()))
    for option in options:
        choose(option, known, f'configs/coclr.py:{name} option')


def chosen_of(names: tuple[str, ...], options: list[str]) -> str:
    """The one of the names that is among the options, the last if there are several; '' for none"""
    chosen = ''
    for option in options:
        if option in names:
            chosen = option
    return chosen


def describe_flow(inputs: ConfigDict) -> None:
    """Flow of the same frames as the video, in place."""
    video = inputs.video
    inputs.flow = ConfigDict(
        {'frames': video.frames, 'size': video.size, 'fps': video.fps, 'channels': 2}
    )


def phases(name: str, streams: tuple[str, str], cycles: int) -> tuple[Any, ...]:
    """InfoNCE on both streams, then so many cycles in which each mines for the other."""
    found = []
    newest = {}  # stream -> the phase that has its newest network
    for stream in streams:
        phase = f'infonce_{stream}'
        found.append((phase, stage_fields(name, 'infonce', stream, '')))
        newest[stream] = phase
    for cycle in range(1, cycles + 1):
        for stream, other in (streams, streams[::-1]):
            fields = stage_fields(name, 'coclr', stream, other)
            fields['init_from'] = f'phase:{newest[stream]}'
            fields['objective']['sampler'] = f'phase:{newest[other]}'
            phase = f'coclr_{stream}' + (f'_{cycle}' if cycles > 1 else '')
            found.append((phase, fields))
            newest[stream] = phase
    last = found[-1][1]
    last['evals'].update(two_stream_evaluations(last['evals'], streams[0], newest[streams[0]]))
    return tuple(found)


def set_fields(c: ConfigDict, fields: dict[str, Any]) -> None:
    """Sets fields by their dotted paths, in place."""
    for path, value in fields.items():
        *groups, field = path.split('.')
        group = c
        for parent in groups:
            group = group[parent]
        group[field] = ConfigDict(value) if isinstance(value, dict) else value


def stage_fields(name: str, stage: str, stream: str, other: str) -> dict[str, Any]:
    """What one stage changes.

    Args:
        name: demo, or entry of DATASETS.
        stage: infonce or coclr.
        stream: whose network is trained.
        other: whose frozen network finds positives for it (coclr).

    Returns:
        Dotted path of a field -> its value.
    """
    is_demo = name == 'demo'
    second = f'{stream}.second'
    # Published: half of the clips are one window twice, with a crop and colours of its own each.
    window = {'kind': 'clip'} if is_demo else {'kind': 'clip', 'same': 0.5}
    views = [(second, window)]
    objective = {
        'name': 'coclr',
        'query': stream,
        'key': second,
        'queue': 512 if is_demo else DATASETS[name].queue,
        # A short run has few steps in which a teacher could follow.
        'momentum': 0.99 if is_demo else 0.999,
        'temperature': 0.07,
    }
    if stage == 'coclr':
        # The same window as the key's: views of one suffix share it.
        views.append((f'{other}.second', window))
        objective.update({'sampler_stream': f'{other}.second', 'nearest': 5})
        # The run folder of its network: --config.objective.sampler=… .
        objective['sampler'] = ''
    fields = {
        'model.towers': {stream: (DEMO_TOWERS if is_demo else TOWERS)[stream]},
        'data.views': tuple(views),
        'objective': objective,
        'evals': evaluations(stream, windows=1 if is_demo else 10),
    }
    fields.update(demo_schedule(stage) if is_demo else published_schedule(name, stage))
    return fields


def evaluations(stream: str, windows: int) -> dict[str, Any]:
    """Nearest neighbours as published, and a linear probe."""
    return {
        f'neighbours_{stream}': {
            'type': 'neighbours',
            'stream': stream,
            'of': 'pooled',
            'unit': 'mean',
            'centre': True,
            'windows': windows,
        },
        f'probe_{stream}': selavi.whole_probe(stream, windows),
    }


def two_stream_evaluations(evals: dict[str, Any], other: str, phase: str) -> dict[str, Any]:
    """The evaluations of a network once more, averaged with the network of another phase.

    Args:
        evals: of this phase.
        other: the stream that the other network reads.
        phase: that trained it.
    """
    found = {}
    for name, entry in evals.items():
        kind, _ = name.split('_')
        found[f'{kind}_both'] = {**entry, 'beside': (other,), 'beside_run': f'phase:{phase}'}
    return found


def demo_schedule(stage: str) -> dict[str, Any]:
    return {
        'steps': 300 if stage == 'infonce' else 200,
        'optimizer.schedule.peak': 2e-3 if stage == 'infonce' else 1e-3,
        'optimizer.schedule.warmup': 30,
    }


def published_schedule(name: str, stage: str) -> dict[str, Any]:
    """Adam's rate of 1e-3, which falls to a tenth at the published epochs."""
    dataset = DATASETS[name]
    epoch = dataset.videos // BATCH_SIZE
    epochs = INFONCE_EPOCHS
    drops: tuple[int, ...] = INFONCE_DROPS
    if stage == 'coclr':
        epochs, drops = dataset.epochs, (dataset.drop,)
    rate = 1e-3
    levels = [(1, rate)]
    for drop in drops:
        # Level until the step before each fall, so that no cosine smooths it.
        levels.append((drop * epoch - 1, rate))
        rate /= 10
        levels.append((drop * epoch, rate))
    levels.append((epochs * epoch, rate))
    return {
        'steps': epochs * epoch,
        'optimizer.schedule.name': 'vatt',
        'optimizer.schedule.levels': tuple(levels),
        'checkpoint.every': 10 * epoch,
    }


def demo_config(synthetic: bool) -> ConfigDict:
    """What all stages share on the playground, whose videos hold one scene each."""
    c = selavi.get_config('demo,synthetic' if synthetic else 'demo')
    c.model.head = ConfigDict({'name': 'projection', 'hidden': 256, 'projection': 64})
    return c


def published_config(name: str) -> ConfigDict:
    """What all stages of a published run share."""
    c = default.get_config()
    c.batch_size, c.compute_dtype = BATCH_SIZE, 'bfloat16'
    m = c.model
    m.inputs.video.update({'frames': 32, 'size': 128, 'fps': 30.0, 'range': (0.0, 1.0)})
    m.inputs.audio.update({'samples': 24_000, 'rate': 24_000, 'mel': presets.FILTERBANK})
    m.head = ConfigDict({'name': 'projection', 'hidden': 1024, 'projection': 128})
    o = c.optimizer
    o.name, o.eps, o.weight_decay, o.decay_skip, o.frozen = 'adam', 1e-8, 1e-5, (), ()
    c.data.train[name] = default.records(f'data/{name}/records')
    if name == 'ucf101':
        c.data.train[name].fold = 1
    c.data.crop, c.data.aspect = (0.2, 1.0), (0.75, 1.33)
    a = c.augment
    a.grey, a.blur = 0.2, 0.5
    a.color, a.brightness, a.gain = 0.8, 0.0, 0.4
    a.contrast, a.saturation, a.hue = 0.4, 0.4, 0.1
    a.audio_noise = 0.0
    # With this probability a view takes all of these, else it is only cropped and mirrored.
    a.strong = 0.3
    c.checkpoint.keep, c.log_every = 5, 50
    return c
