"""One setting for all objectives: the same videos, towers, steps and evaluations.

    python run.py --config=configs/comparison.py:gdt_h6 --workdir=runs/comparison/gdt_h6
        one row of the table in docs/comparison.md; benchmarks/objectives.py runs all of them

Rows are the keys of METHODS. The playground's videos hold one scene of eight seconds here: one
class for a record, which is what labels, memories and mined positives are of, and room for other
windows of two seconds, which shifts and hard negatives need. Optimizer, augmentation and heads are
those of each method's own demo.
"""

import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vatt_jax.config import choose

from . import avid, avts, coclr, default, demo, dpc, gdt, jepa, mmv, selavi, simclr

# Of each network. Where a method has two stages, the second takes the last of them.
STEPS, SECOND_STAGE = 400, 150
DATA = 'runs/data/long_scenes'
HYPOTHESES = {f'gdt_{name}': f'demo,{name}' for name in gdt.HYPOTHESIS_OPTIONS}

# Row -> the config that it changes.
METHODS: dict[str, Callable[[], ConfigDict]] = {
    'vatt': demo.get_config,
    'mmv': functools.partial(mmv.get_config, 'demo_fac_va'),
    'mmv_shuffled': functools.partial(mmv.get_config, 'demo_fac_va'),
    'selavi': functools.partial(selavi.get_config, 'demo'),
    'xdc': functools.partial(selavi.get_config, 'demo,xdc'),
    **{row: functools.partial(gdt.get_config, arg) for row, arg in HYPOTHESES.items()},
    'avid': functools.partial(avid.get_config, 'demo'),
    'cma': functools.partial(avid.get_config, 'demo,cma'),
    'avts': functools.partial(avts.get_config, 'demo'),
    'avts_easy': functools.partial(avts.get_config, 'demo,no_curriculum'),
    'simclr': functools.partial(simclr.get_config, 'demo'),
    'infonce': functools.partial(coclr.get_config, 'demo,infonce'),
    'infonce_audio': functools.partial(coclr.get_config, 'demo,infonce,other'),
    'infonce_flow': functools.partial(coclr.get_config, 'demo,infonce,other,flow'),
    'coclr': functools.partial(coclr.get_config, 'demo'),
    'coclr_flow': functools.partial(coclr.get_config, 'demo,flow'),
    'jepa_video': functools.partial(jepa.get_config, 'demo'),
    'jepa_audio_video': functools.partial(jepa.get_config, 'demo,audio_video'),
    'sigreg': functools.partial(jepa.get_config, 'demo,audio_video,lejepa'),
    'dpc': functools.partial(dpc.get_config, 'demo'),
    'memdpc': functools.partial(dpc.get_config, 'demo,memdpc'),
}
# Rows on transformers of their own: VATT's on waveforms, and those whose tokens are hidden.
OWN_TOWERS = ('vatt', 'jepa_video', 'jepa_audio_video', 'sigreg')
# Rows whose embeddings of video and sound are compared with each other -> in which space.
SPACES = {
    'vatt': 'va',
    'mmv': 'va',
    'mmv_shuffled': 'va',
    'avid': 'va',
    'cma': 'va',
    'avts': 'va',
    'avts_easy': 'va',
    'sigreg': 'projection',
}
SPACES.update(dict.fromkeys(HYPOTHESES, 'gdt'))


def get_config(arg: str = 'mmv') -> ConfigDict:
    row = choose(arg, METHODS, 'configs/comparison.py')
    c = METHODS[row]()
    c.name = f'comparison {row}'
    c.steps, c.batch_size, c.eval_every = STEPS, 64, 0
    c.checkpoint.every = 100
    if row == 'mmv_shuffled':
        # The control: sound of other clips, from which nothing can be learnt of the two together.
        c.data.mismatch = ('audio',)
    # Of the random initialisation of each kind of towers, which the report evaluates too.
    c.report = row in ('vatt', 'mmv')
    reads_flow = row.endswith('_flow')
    set_data(c, reads_flow)
    if row not in OWN_TOWERS:
        set_towers(c)
    if reads_flow:
        coclr.describe_flow(c.model.inputs)
    streams = tuple(stream for stream in c.model.towers if stream != 'text')
    c.evals = evaluations(streams, SPACES.get(row, ''))
    c.phases = tuple(
        (name, with_setting(c, fields, name, SPACES.get(row, ''))) for name, fields in c.phases
    )
    if row.startswith('avts'):
        # Its curriculum is counted in steps.
        avts.set_objective(c, ['no_curriculum'] if row == 'avts_easy' else [])
        # Embeddings of any length stay on the plateau of docs/avts.md for longer than this.
        c.objective.normalise = True
    if row.startswith('jepa'):
        # The teacher's momentum grows in steps.
        c.objective.momentum_steps = int(jepa.STRETCH * c.steps)
    if row == 'xdc':
        c.objective.every = c.steps // 10
    if row in ('dpc', 'memdpc'):
        # Eight frames are four blocks, and the same network keeps maps of 4 × 4 positions.
        c.objective.update({'blocks': 4, 'frames': 2, 'stride': 2, 'curriculum': ((0, 1),)})
        c.model.towers.video.stride = 8
    return c


def set_data(c: ConfigDict, reads_flow: bool) -> None:
    """Videos of one long scene, in place, with their optical flow or without it."""
    scenes = {
        'path': f'{DATA}_flow' if reads_flow else DATA,
        'flow': 'dis' if reads_flow else '',
        'train': 1200,
        'validation': 64,
        'test': 768,
        'seconds': 8.0,
        'episodes': 1,
        'size': 64,
        # Flow is stored at the rate at which the model reads it.
        'fps': 4.0 if reads_flow else 8.0,
        'rate': 8000,
        'seed': 0,
    }
    c.data.make = scenes
    c.data.train = ConfigDict({'long_scenes': default.records('')})


def set_towers(c: ConfigDict) -> None:
    """MMV's towers of the demo's size and their inputs, in place."""
    c.model.inputs = mmv.get_config('demo_fac_va').model.inputs
    c.model.towers = towers_of(tuple(c.model.towers))
    c.compiler_options = demo.get_config().compiler_options


def towers_of(streams: tuple[str, ...]) -> ConfigDict:
    """MMV's towers of the demo's size; flow is read by one like video's."""
    towers = mmv.get_config('demo_fac_va').model.towers
    towers.flow = towers.video.copy_and_resolve_references()
    return ConfigDict({stream: towers[stream] for stream in streams})


def with_setting(c: ConfigDict, fields: dict[str, Any], phase: str, space: str) -> dict[str, Any]:
    """The fields of a phase, with this setting in the place of its own.

    Args:
        c: what the phase changes.
        fields: its changes.
        phase: its name; a second stage is one that starts from another.
        space: see SPACES.
    """
    is_second = 'init_from' in fields
    fields = {**fields, 'steps': SECOND_STAGE if is_second else c.steps - SECOND_STAGE}
    streams = tuple(fields.get('model.towers', c.model.towers))
    if 'model.towers' in fields:
        fields['model.towers'] = towers_of(streams).to_dict()
    fields['evals'] = evaluations(streams, space).to_dict()
    return fields


def evaluations(streams: tuple[str, ...], space: str) -> ConfigDict:
    """Linear probes, nearest neighbours, and in a common space retrieval and synchrony."""
    evals = ConfigDict()
    for stream in streams:
        # A linear probe, and neighbours as CoCLR measures them.
        evals.update(coclr.evaluations(stream, windows=1))
    if space:
        pairs = (('audio', 'video', space), ('video', 'audio', space))
        evals.retrieval = {'type': 'retrieval', 'pairs': pairs, 'limit': 768}
        evals.sync = {'type': 'sync', 'space': space, 'seconds': 1.0, 'limit': 768}
    return evals
