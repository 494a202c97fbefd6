"""Fusion: video, words and sound attend to each other after their towers.

The attention types of Hendricks et al. (TACL 2021), trained to tell clips with their own words from
mismatched ones. What each type is, and what is assumed: docs/fusion.md.

    python run.py --config=configs/fusion.py:demo --workdir=runs/fusion
        on the playground: VATT's towers, two merged layers, video and words
    python run.py --config=configs/fusion.py:demo,specific --workdir=runs/fusion_specific
        the control: each stream attends to itself, and matching must stay at chance
    python run.py --config=configs/fusion.py:demo,co,4,audio --workdir=runs/fusion_co
        four layers of co-attention; sound is the third stream
    python run.py --config=configs/fusion.py:demo,synthetic --workdir=runs/fusion_synthetic
        no files, no TensorFlow
    python run.py --config=configs/fusion.py:demo,frozen --workdir=runs/fusion_frozen
        on the towers of runs/demo (configs/demo.py), which stay as they are

Options:

    co | merged | specific | asymmetric | single | mixed
                the attention type. asymmetric: words query, the rest attends to itself.
                mixed: one merged layer after specific ones
    a number    of layers
    audio       sound joins video and words
    hard        mismatched words and sounds are the most alike of eight
    contrastive each clip is told from eight mismatched forms of itself at once
    words       hidden words are told as well, of one sentence a clip
    frozen, synthetic
                see above
"""

from ml_collections import ConfigDict

from vatt_jax.config import choose
from vatt_jax.models import fusion

from . import demo

MIXED = 'mixed'
KINDS = (*fusion.TYPES, MIXED)
OPTIONS = (*KINDS, 'audio', 'hard', 'contrastive', 'words', 'frozen', 'synthetic')
# Towers and projections of another run; what is new beside them.
TOWERS = (r'^model/(fronts|encoders)_', r'^model/head/')
NEW = (r'^fusion/',)


def get_config(arg: str = 'demo') -> ConfigDict:
    name, *options = (arg or 'demo').split(',')
    choose(name, ('demo',), 'configs/fusion.py')
    numbers = [option for option in options if option.isdigit()]
    words = [option for option in options if not option.isdigit()]
    for option in words:
        choose(option, (*OPTIONS, 'a number of layers'), f'configs/fusion.py:{name} option')
    kinds = [option for option in words if option in KINDS]
    for found, what in ((kinds, 'attention type'), (numbers, 'number of layers')):
        if len(found) > 1:
            raise ValueError(f'configs/fusion.py: expected one {what}, got {" and ".join(found)}')
    kind = kinds[0] if kinds else fusion.MERGED
    num_layers = int(numbers[0]) if numbers else 2
    c = demo_config(schedule(kind, num_layers), words)
    c.name = f'fusion {" ".join([name, *options])}'
    return c


def schedule(kind: str, num_layers: int) -> tuple[str, ...]:
    """The type of each layer."""
    if kind == MIXED:
        # Published: five specific layers, then a merged one.
        return (fusion.SPECIFIC,) * (num_layers - 1) + (fusion.MERGED,)
    return (kind,) * num_layers


def demo_config(types: tuple[str, ...], options: list[str]) -> ConfigDict:
    """Fusion at the size of the playground."""
    c = demo.get_config('synthetic' if 'synthetic' in options else '')
    streams: tuple[str, ...] = ('video', 'text')
    if 'audio' in options:
        streams = ('video', 'text', 'audio')
    c.model.fusion = {
        'streams': streams,
        'types': types,
        'query': 'text' if fusion.ASYMMETRIC in types else '',
        'mlp': 256,
        'heads': 4,
        'head_width': 32,
        'dropout': 0.0,
        'attention_dropout': 0.0,
    }
    matching = ConfigDict(
        {
            'name': 'matching',
            'streams': streams,
            # With sound: words or sound of another clip.
            'replaced': streams[1:],
            'candidates': 8 if 'hard' in options else 1,
            'negatives': 8 if 'contrastive' in options else 0,
        }
    )
    c.objective = matching
    if 'words' in options:
        # Of two sentences of a clip one would tell what is hidden in the other.
        c.model.inputs.text.candidates = 1
        words = {'name': 'masked_words', 'streams': streams}
        tasks = {'matching': matching, 'words': words}
        c.objective = ConfigDict({'name': 'multi_task', 'tasks': tasks})
    if 'frozen' in options:
        c.init_from, c.init_skip = 'runs/demo', NEW
        c.optimizer.frozen = TOWERS
    c.evals = evaluations(streams)
    if 'words' in options:
        c.evals.masked_words = {'type': 'masked_words', 'stream': 'video'}
    return c


def evaluations(streams: tuple[str, ...]) -> ConfigDict:
    """Clips beside mismatched ones; a linear probe of the video after it met the others."""
    evals = ConfigDict()
    # Embeddings of common spaces are made of streams that have met: retrieval would be of pairs
    # that know each other already.
    for stream in streams[1:]:
        evals[f'matching_{stream}'] = {'type': 'matching', 'stream': stream}
    # Of the video after it met the words, which name its class.
    evals.probe_fused_video = demo.evaluations().probe_video
    return evals
