"""Adapting a trained model with few new parameters, the model itself frozen (docs/adaptation.md).

    python run.py --config=configs/adapt.py:demo,lora,labels=20 --workdir=runs/lora
        beside the model of runs/demo (make demo), from 20 labelled segments of each class
    python run.py --config=configs/adapt.py:clip,coop,labels=20 --workdir=runs/coop
        beside that of runs/clip (configs/clip.py:demo)
    python run.py --config=configs/adapt.py:runs/clip_b32,vpt --workdir=runs/pets \\
            "--config.data.train={'pets': {'path': 'data/pets/records'}}"
        beside any run or imported checkpoint: its config.model is taken as it is

BASE,METHOD,OPTIONS. Methods with a classifier of their own:

    linear            the classifier alone
    lora              matrices of low rank in every layer
    vpt               prompts in every layer
    vpt_shallow       prompts at the first layer
    full              all of the model: fine-tuning, for comparison

Methods that compare with the names of the classes, of models with a text tower of CLIP's kind:

    visual_prompt     a frame of learnt pixels
    coop              learnt words before the name
    pgn               prompts mixed from a library, by what the picture shows
    video_prompting   learnt words around the name, a small Transformer over frames

Options:

    labels=N        of demo and clip: N labelled segments of each class (all without)
    modality=NAME   whose tower is adapted and classified: video (default) or audio
    synthetic       no files; of runs that were trained so, such as configs/demo.py:synthetic
"""

from typing import Any

from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax.config import ConfigError, choose

from . import clip, default, demo, vatt_finetune

# Method -> config.model.adapter.
CLASSIFIED: dict[str, dict[str, Any]] = {
    'linear': {},
    'lora': {'name': 'lora', 'rank': 4, 'alpha': 8.0},
    'vpt': {'name': 'vpt', 'prompts': 10, 'deep': True},
    'vpt_shallow': {'name': 'vpt', 'prompts': 10, 'deep': False},
    'full': {},
}
NAMED: dict[str, dict[str, Any]] = {
    'visual_prompt': {'name': 'visual_prompt', 'form': 'frame', 'width': 30},
    'coop': {'name': 'coop', 'context': 16},
    'pgn': {'name': 'pgn', 'prompts': 16, 'library': 256},
    'video_prompting': {'name': 'video_prompting', 'prefix': 16, 'postfix': 16},
}
# Of pictures of 32 pixels, sentences of 12 words and vectors of 128 numbers.
DEMO_SIZES: dict[str, dict[str, Any]] = {
    'visual_prompt': {'width': 4},
    'coop': {'context': 4},
    'pgn': {'library': 64},
    'video_prompting': {'prefix': 2, 'postfix': 2, 'heads': 4},
}
# Modalities that a method adapts; the others adapt the one that is classified.
TOWERS = {'coop': ('text',), 'video_prompting': ('video', 'text')}
BASES = {'demo': 'runs/demo', 'clip': 'runs/clip'}
WHERE = 'configs/adapt.py'


def get_config(arg: str = 'demo,lora') -> ConfigDict:
    base, *words = arg.split(',')
    methods = {**CLASSIFIED, **NAMED}
    method = choose(words.pop(0) if words else 'lora', methods, f'{WHERE} method')
    options = read_options(words)
    modality = options.get('modality', 'video')
    is_demo = base in BASES
    c = demo_config(base, options) if is_demo else config_of_run(base)
    c.name = f'{base} adapted by {" ".join([method, *words])}'
    set_base(c, method, BASES.get(base, base))
    set_adapter(c, method, modality, is_demo)
    set_objective(c, method, modality, windows=4 if is_demo else 1)
    set_optimizer(c, method)
    if 'synthetic' in options:
        c.data.source = 'synthetic'
    return c


def read_options(words: list[str]) -> dict[str, str]:
    """['labels=5', 'synthetic'] -> {'labels': '5', 'synthetic': ''}."""
    options = {}
    for word in words:
        name, _, value = word.partition('=')
        choose(name, ('labels', 'modality', 'synthetic'), f'{WHERE} option')
        options[name] = value
    if not options.get('labels', '1').isdigit():
        raise ConfigError(f'{WHERE}: labels={options["labels"]}: expected a number of segments')
    return options


def demo_config(base: str, options: dict[str, str]) -> ConfigDict:
    """The model and the data of the demo, or of CLIP's."""
    c = demo.get_config() if base == 'demo' else clip.get_config('demo')
    c.steps, c.batch_size, c.report = 300, 64, False
    if 'labels' in options:
        # Of the videos that pretraining saw without labels.
        labels = {'label': 'class', 'per_class': int(options['labels'])}
        c.data.train.playground.update(labels)
    return c


def config_of_run(folder: str) -> ConfigDict:
    """The model of any run; data are the user's to name."""
    stored = configs.stored(folder)
    if stored is None:
        raise ConfigError(
            f'{WHERE}:{folder}: expected {", ".join(BASES)} or the folder of a run, got neither'
        )
    c = default.get_config()
    c.steps, c.batch_size = 5_000, 64
    c.model = configs.fill_missing(stored, default.get_config()).model
    # How that run computed was for its machine.
    c.model.attention, c.model.packed = 'dense', False
    return c


def set_base(c: ConfigDict, method: str, folder: str) -> None:
    """Where the model comes from, in place."""
    if method == 'full':
        c.init_from = folder
    else:
        c.base = folder


def set_adapter(c: ConfigDict, method: str, modality: str, is_demo: bool) -> None:
    """What is new inside the towers, in place."""
    fields = {**CLASSIFIED, **NAMED}[method]
    if not fields:
        return
    sizes = DEMO_SIZES.get(method, {}) if is_demo else {}
    c.model.adapter = {**fields, **sizes, 'modalities': TOWERS.get(method, (modality,))}


def set_objective(c: ConfigDict, method: str, modality: str, windows: int) -> None:
    """What is learnt, and its evaluation, in place."""
    if method in NAMED:
        c.objective = {'name': 'class_names', 'stream': modality, 'label': 'class'}
        zero_shot = {'type': 'zero_shot', 'label': 'class', 'split': 'test', 'windows': windows}
        c.evals = {'zero_shot': {**zero_shot, 'stream': modality}}
        return
    c.objective = {'name': 'classification', 'stream': modality, 'label': 'class', 'dropout': 0.0}
    # The playground's frames are square, so there is one square of each.
    c.evals = vatt_finetune.classification('test', windows=windows)


def set_optimizer(c: ConfigDict, method: str) -> None:
    """One recipe for all methods, so that they can be compared, in place."""
    o = c.optimizer
    o.name, o.weight_decay, o.clip, o.frozen, o.rates = 'adamw', 0.01, 0.0, (), ()
    o.b2, o.eps = 0.999, 1e-7
    schedule = {'name': 'warmup_cosine', 'peak': 5e-3, 'warmup': c.steps // 10, 'end': 0.0}
    o.schedule.update(schedule)
    if method == 'full':
        o.schedule.peak = 3e-4
        # The new classifier learns faster than what is already trained.
        o.rates = ((r'^objective/', 5.0),)
    c.checkpoint.every = c.steps
