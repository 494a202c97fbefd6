"""Joint-embedding prediction: V-JEPA, the same of sound, within and across both, and LeJEPA.

Method, sources and what was measured: docs/jepa.md.

On the playground, by towers of the demo's size:

    python run.py --config=configs/jepa.py:demo --workdir=runs/jepa
        tubelets of video: masked features by what is seen, against a teacher (V-JEPA)
    python run.py --config=configs/jepa.py:demo,audio --workdir=runs/jepa_audio
        spectrogram patches of sound
    python run.py --config=configs/jepa.py:demo,audio_video --workdir=runs/jepa_av
        both by one encoder, within and across (MJEPA)
    python run.py --config=configs/jepa.py:demo,lejepa --workdir=runs/lejepa
        no teacher: two windows of a video agree, embeddings are Gaussian; with audio_video two of
        each modality (AV-JEPA's loss)
    python run.py --config=configs/jepa.py:demo,text --workdir=runs/jepa_text
        and sentences, by contrast with the video
    python run.py --config=configs/jepa.py:demo,synthetic --workdir=runs/try
        no files, no TensorFlow; with any of these

Published sizes, tiny, small, base, large, huge and giant (ViT-g), with the same options, over data
prepared as docs/data.md says, in data/videos/records:

    python run.py --config=configs/jepa.py:large --workdir=runs/jepa_large
    python run.py --config=configs/jepa.py:giant,audio_video,synthetic --mode=plan \\
        --machine=v5p_256 --workdir=runs/plan
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose
from vatt_jax.models import jepa_presets, presets

from . import default, demo, selavi

OPTIONS = ('audio', 'audio_video', 'lejepa', 'text', 'synthetic')
# The published run: 300 epochs of 300 steps, 40 of them warm-up; schedules are cut off at the end
# of the run, at 1 / 1.25 of their length.
EPOCH, EPOCHS, WARMUP, STRETCH = 300, 300, 40, 1.25
TEXT_WEIGHT = 0.1


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, ('demo', *jepa_presets.SIZES), 'configs/jepa.py')
    for option in options:
        choose(option, OPTIONS, f'configs/jepa.py:{name} option')
    streams = modalities(options)
    is_synthetic = 'synthetic' in options
    if name == 'demo':
        c = demo_config(streams, is_synthetic)
    else:
        c = published_config(name, streams, is_synthetic)
    c.name = f'JEPA {" ".join([name, *options])}'
    if 'lejepa' in options:
        set_lejepa(c, streams, is_demo=name == 'demo')
    if 'text' in options:
        add_text(c, is_demo=name == 'demo')
    return c


def modalities(options: Sequence[str]) -> tuple[str, ...]:
    """The modalities that are predicted."""
    if 'audio_video' in options:
        return ('video', 'audio')
    return ('audio',) if 'audio' in options else ('video',)


def prediction(streams: Sequence[str], steps: int) -> ConfigDict:
    """The objective: every stream within itself, and each by each other, all of one weight.

    Args:
        streams: that are encoded.
        steps: of the run, by which the teacher's momentum grows.
    """
    pairs = tuple((seen, told, 1.0) for seen in streams for told in streams)
    return ConfigDict(
        {
            'name': 'joint_prediction',
            'pairs': pairs,
            'momentum': (0.998, 1.0),
            'momentum_steps': int(STRETCH * steps),
        }
    )


def set_lejepa(c: ConfigDict, streams: Sequence[str], is_demo: bool) -> None:
    """Two windows of each stream that agree, in the place of prediction and teacher, in place."""
    second = tuple(f'{stream}.second' for stream in streams)
    c.data.views = tuple((view, {'kind': 'clip'}) for view in second)
    c.evaluated = 'student'
    c.model.head = ConfigDict(
        {
            'name': 'lejepa',
            'hidden': 256 if is_demo else 2048,
            'projection': 64 if is_demo else 128,
        }
    )
    c.objective = ConfigDict({'name': 'lejepa', 'views': (*streams, *second)})


def add_text(c: ConfigDict, is_demo: bool) -> None:
    """Sentences beside the rest, by contrast with the first stream, in place."""
    if 'video' not in c.model.towers:
        choose('audio', ('video', 'audio_video'), 'configs/jepa.py: text goes with one of')
    if c.objective.name == 'lejepa':
        choose('lejepa', ('joint_prediction',), 'configs/jepa.py: text goes with the objective')
    text = demo.get_config().model.towers.text if is_demo else presets.tower('t5_small')
    c.model.towers.text = text
    c.model.head = ConfigDict({'name': 'fac', 'va': 128, 'vat': 64} if is_demo else presets.FAC)
    c.model.inputs.text = demo.get_config().model.inputs.text
    # The teacher is one task's own; evaluators see the student.
    c.evaluated = 'student'
    sentences = {'name': 'contrastive', 'pairs': (('video', 'text', 'vat', 1.0),)}
    c.objective = ConfigDict(
        {
            'name': 'multi_task',
            'tasks': {'prediction': c.objective.to_dict(), 'sentences': sentences},
            'weights': {'prediction': 1.0, 'sentences': TEXT_WEIGHT},
        }
    )


def demo_config(streams: Sequence[str], is_synthetic: bool) -> ConfigDict:
    """A run of the playground's size."""
    c = demo.get_config('synthetic' if is_synthetic else '')
    c.steps = 600
    size = c.model.towers.video
    sizes = {field: size[field] for field in jepa_presets.SIZES['tiny']}
    c.model.update(ConfigDict({'head': {'name': 'none'}, 'towers': ConfigDict()}))
    set_demo_model(c.model, sizes, streams)
    c.objective = prediction(streams, c.steps)
    set_demo_objective(c.objective)
    o = c.optimizer
    o.schedule.update({'peak': 1e-3, 'warmup': 60, 'end': 1e-5})
    c.augment.color, c.augment.audio_noise = 0.0, 0.0
    c.checkpoint.every = 200
    # As in the publications.
    c.evaluated = 'teacher'
    c.evals = ConfigDict({f'probe_{stream}': selavi.whole_probe(stream) for stream in streams})
    return c


def set_demo_model(m: ConfigDict, sizes: dict[str, Any], streams: Sequence[str]) -> None:
    """Towers of the demo's size over tubelets, and over patches of a spectrogram, in place."""
    fields = jepa_presets.towers(sizes, streams)
    m.shared, m.encoder = fields['shared'], ConfigDict(fields['encoder'])
    m.towers = ConfigDict(fields['towers'])
    m.head = ConfigDict({'name': 'none'})
    if 'video' in streams:
        # A grid of 4×4×4.
        m.towers.video.update({'patch': (2, 8, 8), 'patch_init': 5.0})
    if 'audio' in streams:
        # A grid of 8×5.
        m.towers.audio.update({'patch': (8, 8), 'patch_init': 4.0})
        mel = {'bins': 40, 'window': 500, 'hop': 250, 'low': 60.0, 'high': 3800.0}
        m.inputs.audio.mel = ConfigDict({**jepa_presets.INPUTS['audio']['mel'], **mel})


def set_demo_objective(objective: ConfigDict) -> None:
    """A predictor and masks for grids of few tokens, in place."""
    objective.update({'width': 64, 'layers': 2, 'mlp': 128, 'heads': 2})
    # A short run has few steps in which a teacher could follow.
    objective.momentum = (0.99, 1.0)
    # The published long-range mask would leave one token of such a grid to look at.
    short = {'blocks': 8, 'area': (0.15, 0.15), 'keep': 0.25, 'predict': 0.47}
    long = {'blocks': 2, 'area': (0.7, 0.7), 'keep': 0.1, 'predict': 0.6}
    objective.video_masks = objective.audio_masks = (short, long)


def published_config(name: str, streams: Sequence[str], is_synthetic: bool) -> ConfigDict:
    """The published run of V-JEPA at one of the sizes."""
    c = default.get_config()
    c.batch_size, c.compute_dtype = 3072, 'bfloat16'
    c.steps = EPOCH * EPOCHS
    c.model.update(jepa_presets.model(name, streams))
    c.model.head = ConfigDict({'name': 'none'})
    c.model.attention, c.model.scan, c.model.remat = 'auto', True, 'full'
    c.objective = prediction(streams, c.steps)
    c.evaluated = 'teacher'

    o = c.optimizer
    o.name, o.eps, o.frozen, o.clip = 'adamw', 1e-8, (), 10.0
    # Published is a decay that grows to ten times as much (V-JEPA), or this one (V-JEPA 2, as we
    # remember it).
    o.weight_decay = 0.04
    # The published cosine is cut off at 1 / 1.25 of its length, at about this rate.
    o.schedule.update({'peak': 6.25e-4, 'start': 2e-4, 'end': 7.4e-5, 'warmup': WARMUP * EPOCH})

    if is_synthetic:
        c.data.source = 'synthetic'
    else:
        c.data.train.videos = default.records('data/videos/records')
    c.data.crop, c.data.aspect = (0.3, 1.0), (0.75, 1.35)
    c.augment.color, c.augment.audio_noise = 0.0, 0.0
    c.checkpoint.every, c.checkpoint.keep, c.log_every = 10 * EPOCH, 5, 50
    return c
