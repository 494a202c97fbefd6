"""GDT: contrast across modalities, with clips shifted and reversed in time (Patrick et al. 2020).

Method, hypotheses and results: docs/gdt.md.

On the playground, by towers of the demo's size:

    python run.py --config=configs/gdt.py:demo --workdir=runs/gdt
        hypothesis 6: distinctive to shift and to reversal
    python run.py --config=configs/gdt.py:demo,h1 --workdir=runs/gdt_h1
        h1 (neither is used: the cross-modal baseline) to h9 (invariant to both)
    python run.py --config=configs/gdt.py:demo,synthetic --workdir=runs/synthetic
        no files, no TensorFlow

Published settings (64 GPUs), any hypothesis after a comma:

    python run.py --config=configs/gdt.py:kinetics --workdir=runs/gdt_kinetics
        R(2+1)D-18 on 30 frames of 112 x 112 at 30 fps, ResNet-9 on one second of sound; 200 passes
        in batches of 512, over data prepared as docs/data.md says (--fps=30 --size=128
        --rate=24000 --require_audio)
    python run.py --config=configs/gdt.py:audioset --workdir=runs/gdt_audioset
    python run.py --config=configs/gdt.py:ig65m --workdir=runs/gdt_ig65m
    python run.py --config=configs/gdt.py:howto100m --workdir=runs/gdt_howto100m
        video and words: captions of 20 words by word2vec, 30 frames at 16 fps

Options: `code`, negatives as they pile up in the public code, on its 64 replicas; `redrawn`,
reversed sound augmented by itself. Fine-tuning: configs/selavi_finetune.py, which has the same
protocol, with --config.init_from=runs/gdt_kinetics.
"""

import dataclasses

from ml_collections import ConfigDict

from vatt_jax.models import presets
from vatt_jax.objectives.gdt import needed_views
from vatt_jax.objectives.transformations import HYPOTHESES

from . import default, mmv, selavi

HYPOTHESIS_OPTIONS = {f'h{number}': roles for number, roles in HYPOTHESES.items()}
NUM_GPUS = 64
# SpecAugment's 'medium' setting.
MEDIUM = {'frequency_masks': 1, 'frequency_width': 3, 'time_masks': 1, 'time_width': 6}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a published run learns from.

    Attributes:
      videos: of the training set, about.
      per_gpu: clips of a batch.
      hypothesis: what is trained unless an option says otherwise.
      modalities: what is contrasted.
    """

    videos: int
    per_gpu: int = 8
    hypothesis: str = 'h6'
    modalities: tuple[str, str] = ('video', 'audio')


DATASETS = {
    'kinetics': Dataset(230_976),
    'audioset': Dataset(1_784_108),
    'ig65m': Dataset(65_000_000),
    # Words have no direction of time, so hypothesis 6 is none of theirs.
    'howto100m': Dataset(1_238_911, 12, 'h4', ('video', 'text')),
}


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    check_options(name, options)
    is_demo = name == 'demo'
    c = demo_config(options) if is_demo else published_config(name)
    c.name = f'gdt {" ".join([name, *options])}'

    chosen = [option for option in options if option in HYPOTHESIS_OPTIONS]
    hypothesis = 'h6' if is_demo else DATASETS[name].hypothesis
    roles = HYPOTHESIS_OPTIONS[chosen[0] if chosen else hypothesis]
    c.objective.update(roles._asdict())
    if 'code' in options:
        c.objective.update({'published_negatives': True, 'replicas': NUM_GPUS})
    c.data.views, c.augment.mirrored = needed_views(c.objective, 'redrawn' in options)
    return c


def check_options(name: str, options: list[str]) -> None:
    """Raises ValueError for a setting or an option that there is not, and for two hypotheses."""
    names = ('demo', *DATASETS)
    if name not in names:
        raise ValueError(f'configs/gdt.py: expected one of {", ".join(names)}, got {name!r}')
    extra = ('synthetic',) if name == 'demo' else ('code',)
    known = (*HYPOTHESIS_OPTIONS, *extra, 'redrawn')
    for option in options:
        if option not in known:
            raise ValueError(
                f'configs/gdt.py:{name}: expected an option of {", ".join(known)}, got {option!r}'
            )
    hypotheses = [option for option in options if option in HYPOTHESIS_OPTIONS]
    if len(hypotheses) > 1:
        raise ValueError(
            f'configs/gdt.py:{name}: expected at most one hypothesis, got {", ".join(hypotheses)}'
        )


def demo_config(options: list[str]) -> ConfigDict:
    """GDT at the size of the playground."""
    is_synthetic = 'synthetic' in options
    c = mmv.get_config('demo_fac_va,synthetic' if is_synthetic else 'demo_fac_va')
    c.steps = 300
    c.model.head = ConfigDict({'name': 'none'})
    # Sounds of the playground: their mean and standard deviation, about.
    c.model.inputs.audio.mel.update({'mean': -6.0, 'deviation': 3.0})
    modalities = ('video', 'audio')
    sizes = {'width': 64, 'hidden': 128, 'dropout': 0.1}
    c.objective = ConfigDict({'name': 'gdt', 'modalities': modalities, **sizes})
    c.optimizer.schedule.warmup = 50
    c.checkpoint.every = 100
    c.augment.volume = 0.1
    c.augment.spec_augment.update(MEDIUM)
    # In the space of the objective's own heads.
    c.evals.retrieval.pairs = (('audio', 'video', 'gdt'), ('video', 'audio', 'gdt'))
    c.evals.sync.space = 'gdt'
    c.evals.neighbours = {'type': 'neighbours', 'stream': 'video', 'windows': 1}
    return c


def published_config(name: str) -> ConfigDict:
    """GDT's published run on one of its datasets."""
    dataset = DATASETS[name]
    # Towers, frames, optimizer and crops of the same authors' SeLaVi.
    c = selavi.published_config('kinetics', [])
    c.batch_size = dataset.per_gpu * NUM_GPUS
    epoch = dataset.videos // c.batch_size
    c.steps = 200 * epoch
    c.optimizer.schedule.warmup = 10 * epoch
    c.checkpoint.every = 10 * epoch
    c.objective = ConfigDict({'name': 'gdt', 'modalities': dataset.modalities})
    c.data.train = ConfigDict({name: default.records(f'data/{name}/records')})

    m, a = c.model, c.augment
    if 'text' in dataset.modalities:
        del m.towers['audio']
        m.towers.text = presets.tower('mmv_words')
        m.inputs.text.update({'candidates': 1, 'words': 20})
        m.inputs.video.fps = 16.0
    else:
        mel = {**presets.FILTERBANK, 'bins': 40, 'mean': 1.93, 'deviation': 17.89}
        m.inputs.audio.mel = mel
        a.volume = 0.1
        a.spec_augment.update(MEDIUM)
    # Always on, without hue.
    a.color, a.brightness, a.gain = 1.0, 0.0, 0.4
    a.contrast, a.saturation, a.hue = 0.4, 0.4, 0.0
    return c
