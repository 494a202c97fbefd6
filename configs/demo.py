"""VATT on the playground, small enough for two CPU cores.

    python run.py                                     # this config, into runs/demo
    python run.py --config=configs/demo.py:agnostic   # one shared encoder for all modalities
    python run.py --config=configs/demo.py:synthetic  # no files, no TensorFlow

Controls:

    python run.py --config=configs/demo.py:shuffled
        audio and text of other clips: must stay at chance
    python run.py --config=configs/demo.py:controls --mode=eval
        the finished run, without motion, without synchrony, without learning
"""

from ml_collections import ConfigDict

from . import default

VARIANTS = ('agnostic', 'shuffled', 'synthetic', 'controls')
STEPS = 1250


def get_config(arg: str = '') -> ConfigDict:
    if arg and arg not in VARIANTS:
        raise ValueError(
            f'configs/demo.py: expected one of {", ".join(VARIANTS)} or nothing, got {arg!r}'
        )
    c = default.get_config()
    c.name = f'demo {arg}'.strip()
    c.steps, c.batch_size = STEPS, 64
    c.jax_platform = 'cpu'
    # A step of these sizes runs faster from XLA's older code generator, and LLVM's expensive
    # passes only make it compile longer.
    c.compiler_options = {
        'xla_cpu_use_fusion_emitters': False,
        'xla_llvm_disable_expensive_passes': True,
    }
    c.report = True
    set_model(c.model, shared=arg == 'agnostic')

    o = c.optimizer
    o.name, o.weight_decay, o.frozen, o.clip = 'adamw', 0.02, (), 1.0
    o.schedule.update({'peak': 1e-3, 'warmup': 100, 'end': 1e-5})

    set_data(c.data, synthetic=arg == 'synthetic')
    if arg == 'shuffled':
        c.data.mismatch = ('audio', 'text')
    # Milder than the official jitter: here a colour is a word, and a run is short.
    c.augment.color, c.augment.hue = 0.5, 0.05
    c.checkpoint.every, c.log_every = 250, 25

    c.evals = evaluations()
    if arg == 'controls':
        c.evals.update(control_evaluations(c.evals))
    return c


def set_model(m: ConfigDict, shared: bool) -> None:
    """Inputs and towers of the demo's size, in place."""
    m.inputs.video.update({'frames': 8, 'size': 32, 'fps': 4.0})
    m.inputs.audio.update({'samples': 16000, 'rate': 8000})
    m.inputs.text.update({'candidates': 3, 'words': 12})
    size = {
        'layers': 3,
        'width': 128,
        'mlp': 256,
        'heads': 4,
        'head_width': 32,
        'dropout': 0.0,
        'attention_dropout': 0.0,
    }
    m.towers.video = {
        'name': 'vit',
        **size,
        'patch': (2, 8, 8),
        'drop_token': 0.25,
        'position_dropout': 0.0,
        'patch_init': 5.0,
    }
    m.towers.audio = {
        'name': 'wat',
        **size,
        'patch': 256,
        'drop_token': 0.5,
        'position_dropout': 0.0,
        'patch_init': 4.0,
    }
    m.towers.text = {
        'name': 't5',
        **size,
        'layers': 2,
        'vocab': 0,
        'word_width': 64,
        'frozen_words': False,
    }
    m.head.update({'va': 128, 'vat': 64})
    if shared:
        m.shared = True
        m.encoder = size


def set_data(d: ConfigDict, synthetic: bool) -> None:
    """The playground, rendered and prepared where it is not there yet, in place."""
    d.crop = (0.7, 1.0)
    if synthetic:
        d.source = 'synthetic'
        return
    d.make = {
        'path': 'runs/data/playground',
        'train': 1200,
        'validation': 128,
        'test': 256,
        'seconds': 8.0,
        'size': 64,
        'fps': 8.0,
        'rate': 8000,
        'seed': 0,
    }
    # An empty path stands for what d.make makes.
    d.train.playground = default.records('')


def evaluations() -> ConfigDict:
    """Retrieval, synchrony and a linear probe of each stream."""
    evals = ConfigDict()
    evals.retrieval = {'type': 'retrieval', 'split': 'test', 'limit': 768}
    evals.sync = {'type': 'sync', 'limit': 768, 'seconds': 1.0}
    for stream in ('video', 'audio'):
        evals[f'probe_{stream}'] = {
            'type': 'linear_probe',
            'stream': stream,
            'label': 'class',
            'strengths': (0.1, 1.0),
        }
    return evals


def control_evaluations(evals: ConfigDict) -> dict[str, ConfigDict]:
    """The same evaluations with something essential taken away; each must do worse."""
    pairs = (('text', 'video', 'vat'), ('audio', 'video', 'va'))
    controls = {
        'single_frame_retrieval': {**evals.retrieval, 'change': 'single_frame', 'pairs': pairs},
        'single_frame_probe': {**evals.probe_video, 'change': 'single_frame'},
        'shifted_retrieval': {
            **evals.retrieval,
            'views': (('audio.shifted', {'kind': 'shift', 'seconds': 1.0}),),
            'pairs': (('audio.shifted', 'video', 'va'),),
        },
        'simple_probe_color': {**evals.probe_video, 'type': 'simple_probe'},
        'simple_probe_spectrum': {**evals.probe_audio, 'type': 'simple_probe'},
    }
    return {name: ConfigDict({**fields, 'baseline': False}) for name, fields in controls.items()}
