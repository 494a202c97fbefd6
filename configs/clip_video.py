"""CLIP over video and audio: sound comes to the frozen space of pictures and sentences.

As ImageBind (Girdhar et al. 2023) binds a modality: the towers of CLIP stay as they are, a clip is
the mean of its frames, and a tower of sound learns to find the frames of its clip (InfoNCE). No
sound is ever shown with a sentence; that it finds sentences all the same is what is measured.

    python run.py --config=configs/clip.py:demo --workdir=runs/clip
    python run.py --config=configs/clip_video.py:demo --workdir=runs/clip_video
        on the playground, from the run above
    python run.py --config=configs/clip_video.py:demo,synthetic --workdir=runs/try
        no files, no TensorFlow, no other run: the frozen space is a random one
    python run.py --config=configs/clip_video.py:b32_audioset --workdir=runs/b32_audioset \\
        --config.init_from=runs/clip_b32
        MODEL_audioset: any model of configs/clip.py, such as imported weights, on a pod

Options:

    synthetic   no data
    temporal    layers over the frames (CLIP4Clip, Luo et al. 2021), which begin as their mean; they
                and the tower of sound are trained, by sentences too: VATT's two pairs
    sentences   pairs of sound and sentence too, as AudioCLIP (Guzhov et al. 2021) has them: what
                the emergent alignment is compared with

What was measured, and what is assumed: docs/clip_video.md.
"""

from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose
from vatt_jax.models import presets

from . import clip, default, demo

OPTIONS = ('synthetic', 'temporal', 'sentences')
# What is CLIP's own: never trained. What is not: not read from config.init_from.
FROZEN = (
    r'^model/(fronts|encoders|pools|nets)_(video|text)/',
    r'^model/head/(video|text)_vt/',
)
NEW = (r'^(fronts|encoders|nets)_audio/', r'^head/audio_vt/', r'^times_video/')
# Of the balanced and the unbalanced part together (recalled).
AUDIOSET_CLIPS = 2_063_949
# ImageBind's sound: 128 bands of 25 ms every 10 ms.
FILTERBANK = {
    'form': 'filterbank',
    'bins': 128,
    'window': 400,
    'hop': 160,
    'transform': 512,
    'low': 20.0,
    'high': 8_000.0,
    'mean': -4.268,
    'deviation': 9.138,
}
# What the playground's events are called where its sentences say them.
EVENTS = ('bounces on the floor', 'crashes into the wall', 'appears', 'vanishes')


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    for option in options:
        choose(option, OPTIONS, f'configs/clip_video.py:{name} option')
    c = demo_config(options) if name == 'demo' else published_config(name)
    c.name = f'CLIP over video and audio {" ".join([name, *options])}'
    c.objective = objective(options)
    c.optimizer.frozen, c.init_skip = FROZEN, NEW
    if 'temporal' in options:
        if c.model.towers.video.name != 'clip_vit':
            raise ConfigError('configs/clip_video.py: option temporal is of the vit towers')
        c.model.towers.video.time_layers = 2
    if 'synthetic' in options:
        c.data.source, c.init_from = 'synthetic', ''
    return c


def objective(options: list[str]) -> ConfigDict:
    """Frames and sound; frames and sentences where something of theirs is trained."""
    pairs = [
        ('video', 'audio', 'vt', 1.0),
        # Of weight 0 the sentences' tower is there, for evaluations alone.
        ('video', 'text', 'vt', 1.0 if 'temporal' in options else 0.0),
    ]
    if 'sentences' in options:
        pairs.append(('audio', 'text', 'vt', 1.0))
    return ConfigDict({**presets.CLIP_OBJECTIVES['clip'], 'pairs': tuple(pairs)})


def demo_config(options: list[str]) -> ConfigDict:
    """The demo of configs/clip.py with two frames and two seconds of sound."""
    c = clip.demo_config(['synthetic'] if 'synthetic' in options else [])
    with_sound = demo.get_config()
    c.model.towers.audio = with_sound.model.towers.audio
    c.model.inputs.video.update({'frames': 2, 'fps': 1.0})
    c.init_from = 'runs/clip'
    c.steps = 400
    c.optimizer.schedule.update({'peak': 1e-3, 'warmup': 40, 'end': 0.0})
    c.optimizer.decay_skip = (*clip.DECAY_SKIP, *with_sound.optimizer.decay_skip)
    c.checkpoint.every = 200
    c.evals = evaluations()
    return c


def evaluations() -> ConfigDict:
    """Sounds and clips by their sentences: retrieval, and classes by name."""
    evals = ConfigDict()
    pairs = (('text', 'audio', 'vt'), ('text', 'video', 'vt'), ('audio', 'video', 'vt'))
    evals.retrieval = {'type': 'retrieval', 'split': 'test', 'limit': 768, 'pairs': pairs}
    for stream in ('audio', 'video'):
        evals[f'{stream}_event'] = {
            'type': 'zero_shot',
            'stream': stream,
            'label': 'event',
            'names': EVENTS,
            'templates': ('a thing {}', 'the thing {}', '{}'),
        }
        evals[f'{stream}_object'] = {
            'type': 'zero_shot',
            'stream': stream,
            'label': 'object',
            'templates': ('a {}', 'this {}', 'the {}'),
        }
    return evals


def published_config(name: str) -> ConfigDict:
    """A model of configs/clip.py on AudioSet. ImageBind's recipe, recalled: docs/clip_video.md."""
    model, _, dataset = name.rpartition('_')
    choose(dataset, ('audioset',), f'configs/clip_video.py:{name} dataset')
    if not model.startswith('siglip'):
        model = f'clip_{model}'
    choose(model, presets.CLIPS, f'configs/clip_video.py:{name} model')
    c = default.get_config()
    c.batch_size, c.compute_dtype = 2_048, 'bfloat16'
    c.steps = 64 * (AUDIOSET_CLIPS // c.batch_size)
    clip.set_model(c.model, model)
    c.model.scan, c.model.remat = True, 'dots'
    # Two frames and two seconds.
    c.model.inputs.video.update({'frames': 2, 'fps': 1.0})
    c.model.inputs.audio.update({'samples': 32_000, 'rate': 16_000, 'mel': FILTERBANK})
    c.model.towers.audio = presets.tower('spt_base', patch=(16, 16), positions=())
    o = c.optimizer
    o.name, o.b1, o.b2, o.eps, o.weight_decay = 'adamw', 0.9, 0.95, 1e-8, 0.2
    warmup = 2 * (AUDIOSET_CLIPS // c.batch_size)
    o.schedule.update({'name': 'warmup_cosine', 'peak': 1.6e-3, 'warmup': warmup, 'end': 0.0})
    c.data.train.audioset = default.records('data/audioset/records')
    clip.set_augmentation(c)
    c.mesh.update({'replica': -1, 'fsdp': 1})
    c.checkpoint.every, c.log_every = 5_000, 50
    return c
