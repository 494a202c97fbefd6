"""CLIP and SigLIP: pictures and sentences in one space (Radford et al. 2021, Zhai et al. 2023).

    python run.py --config=configs/clip.py:demo --workdir=runs/clip
        on the playground: one frame and its sentence, small enough for two CPU cores
    python run.py --config=configs/clip.py:demo,synthetic --workdir=runs/try
        no files, no TensorFlow
    python run.py --config=configs/clip.py:rn50_cc12m --workdir=runs/clip_rn50
        MODEL_DATASET: a published recipe, on a pod

Models: b32, b16, l14, l14_336, rn50, rn101, rn50x4, rn50x16, rn50x64, and of SigLIP siglip_b16,
siglip_b16_256, siglip_l16_256, siglip_so400m_224, siglip_so400m_384. Datasets: cc3m, cc12m,
yfcc15m, laion400m.

Options:

    synthetic   no data
    siglip      of the demo: SigLIP's pooling and loss
    resnet      of the demo: a ResNet over pictures
    flip        half of the patches dropped in training (FLIP, Li et al. 2023)
    locked      the picture's tower is not trained (LiT, Zhai et al. 2022); name what it begins
                with by --config.init_from

Where the recipes come from, and what differs: docs/clip.md.
"""

from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, choose
from vatt_jax.models import presets

from . import default, demo

OPTIONS = ('synthetic', 'flip', 'locked')
DEMO_OPTIONS = (*OPTIONS, 'siglip', 'resnet')
# open_clip's runs: pairs of the set, batch, epochs, learning rate, warm-up, weight decay.
DATASETS: dict[str, tuple[int, int, int, float, int, float]] = {
    'cc3m': (2_862_387, 1_024, 30, 1e-3, 10_000, 0.1),
    'cc12m': (10_968_539, 1_024, 30, 1e-3, 10_000, 0.1),
    'yfcc15m': (14_829_396, 1_024, 32, 5e-4, 10_000, 0.1),
    'laion400m': (407_332_084, 32_768, 32, 5e-4, 2_000, 0.2),
}
# Gains, biases and what has no second dimension are not decayed (open_clip).
DECAY_SKIP = (r'bias$', r'scale$', r'class_token$')
# Towers of pictures, by their parts.
PICTURE_TOWER = r'^model/(fronts|encoders|pools|nets)_video/'


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    for option in options:
        known = DEMO_OPTIONS if name == 'demo' else OPTIONS
        choose(option, known, f'configs/clip.py:{name} option')
    c = demo_config(options) if name == 'demo' else published_config(name, options)
    c.name = f'CLIP {" ".join([name, *options])}'
    if 'flip' in options:
        if c.model.towers.video.name != 'clip_vit':
            raise ConfigError('configs/clip.py: option flip drops patches, which a ResNet lacks')
        c.model.towers.video.drop_token = 0.5
    if 'locked' in options:
        c.optimizer.frozen = (PICTURE_TOWER,)
    if 'synthetic' in options:
        # Its sentences are words of its own, which fit CLIP's larger table.
        c.data.source, c.model.inputs.text.tokenizer = 'synthetic', 'words'
    return c


def split_name(name: str) -> tuple[str, str]:
    """'siglip_b16_cc12m' -> ('siglip_b16', 'cc12m'); of CLIP's models 'clip_' is left out.

    Raises:
        ConfigError: one of the two is not known.
    """
    model, _, dataset = name.rpartition('_')
    choose(dataset, DATASETS, f'configs/clip.py:{name} dataset')
    if not model.startswith('siglip'):
        model = f'clip_{model}'
    return choose(model, presets.CLIPS, f'configs/clip.py:{name} model'), dataset


def published_config(name: str, options: list[str]) -> ConfigDict:
    """open_clip's recipe for a dataset, with any of the models."""
    model, dataset = split_name(name)
    num_pairs, batch, epochs, rate, warmup, decay = DATASETS[dataset]
    c = default.get_config()
    c.batch_size, c.compute_dtype = batch, 'bfloat16'
    c.steps = epochs * (num_pairs // batch)
    set_model(c.model, model)
    c.model.scan, c.model.remat = True, 'dots'
    is_siglip = model.startswith('siglip')
    c.objective = ConfigDict(presets.CLIP_OBJECTIVES['siglip' if is_siglip else 'clip'])
    o = c.optimizer
    o.name, o.weight_decay, o.decay_skip, o.frozen = 'adamw', decay, DECAY_SKIP, ()
    # As open_clip sets them for transformers, and for ResNets.
    o.b1, o.b2, o.eps = 0.9, 0.98, 1e-6
    if c.model.towers.video.name == 'clip_resnet':
        o.b2, o.eps = 0.999, 1e-8
    if is_siglip:
        o.b2 = 0.95
    o.schedule.update({'name': 'warmup_cosine', 'peak': rate, 'warmup': warmup, 'end': 0.0})
    c.data.train[dataset] = default.records(f'data/{dataset}/records')
    set_augmentation(c)
    # Of the picture: a square crop of nine tenths of it or more.
    c.data.crop, c.data.aspect, c.data.flip = (0.9, 1.0), (0.75, 4 / 3), 0.0
    c.mesh.update({'replica': -1, 'fsdp': 1})
    c.checkpoint.every, c.log_every = 5_000, 50
    return c


def set_model(m: ConfigDict, name: str) -> None:
    """Towers, common space and inputs of a model, in place: there is no sound."""
    fields = presets.clip(name)
    m.towers, m.head, m.shared = fields.towers, fields.head, False
    m.inputs.video.update(fields.inputs.video)
    m.inputs.text.update(fields.inputs.text)


def set_augmentation(c: ConfigDict) -> None:
    """The crop alone, in place."""
    c.augment.color, c.augment.audio_noise = 0.0, 0.0


def demo_config(options: list[str]) -> ConfigDict:
    """A tiny model on frames and sentences of the playground."""
    c = demo.get_config('synthetic' if 'synthetic' in options else '')
    set_model(c.model, demo_model(options))
    shrink(c.model)
    form = 'siglip' if 'siglip' in options else 'clip'
    c.objective = ConfigDict(presets.CLIP_OBJECTIVES[form])
    c.steps, c.batch_size = 800, 64
    o = c.optimizer
    o.b2, o.eps, o.weight_decay, o.decay_skip = 0.98, 1e-6, 0.1, DECAY_SKIP
    o.schedule.update({'peak': 1e-3, 'warmup': 80, 'end': 0.0})
    set_augmentation(c)
    evals = c.evals
    del evals.sync, evals.probe_audio
    evals.retrieval.pairs = (('text', 'video', 'vt'), ('video', 'text', 'vt'))
    if 'synthetic' not in options:
        evals.update(zero_shot_evaluations())
    c.checkpoint.every = 400
    return c


def zero_shot_evaluations() -> dict[str, ConfigDict]:
    """Kinds and colours of the playground by their names, alone and in templates.

    One frame shows both; what happens in a scene, and with it the label `class`, it does not.
    """
    templates = {
        'object': (
            'a {}',
            'the {}',
            'a red {}',
            'a small {}',
            'a large blue {}',
            'this striped {}',
        ),
        'color': ('a {} disc', 'a {} ring', 'the {} plank', 'this {} pole', 'a large {} thing'),
    }
    evals = {}
    for label, sentences in templates.items():
        names = {'type': 'zero_shot', 'label': label, 'limit': 768}
        evals[f'zero_shot_{label}'] = ConfigDict(names)
        evals[f'zero_shot_{label}_templates'] = ConfigDict({**names, 'templates': sentences})
    return evals


def demo_model(options: list[str]) -> str:
    """Name of the model that the demo is a small one of."""
    if 'siglip' in options:
        return 'siglip_b16'
    return 'clip_rn50' if 'resnet' in options else 'clip_b32'


def shrink(m: ConfigDict) -> None:
    """The demo's size, in place. Words are the playground's own; they have no mark of the end."""
    m.inputs.video.size = 32
    m.inputs.text.update({'words': 12, 'tokenizer': 'words'})
    size = {'layers': 3, 'width': 128, 'mlp': 256, 'heads': 4, 'head_width': 32}
    m.towers.text.update({**size, 'layers': 2, 'vocab': 0, 'positions': 12, 'pool': 'last_word'})
    if m.towers.video.name == 'clip_resnet':
        # A map of two points a side; the last of it is pooled.
        m.inputs.video.size = 64
        m.towers.video.update({'blocks': (1, 1, 1, 1), 'features': 16, 'size': 64})
    else:
        m.towers.video.update({**size, 'patch': 8, 'positions': (4, 4)})
    m.head.vt = 128
