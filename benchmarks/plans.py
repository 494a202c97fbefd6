"""Plans of the published models on pods: compiled here, without the pods.

    PYTHONPATH=<folder with libtpu and JAX's plugin for GPUs> python benchmarks/plans.py
                                                     # what is missing, one plan after another
    python benchmarks/plans.py --only='lbs.*v5e' --again    # some of them, anew
    python benchmarks/plans.py --tables              # docs/scaling.md from the results there are

A row is a model, a machine, a global batch and the kind of attention: `fused` has no dropout on
attention probabilities and runs the platform's kernel, `dense` is the published step. Each is
`run.py --mode=plan` in a process of its own, so that a crash or a kill costs one row, and is
written when it is known. On GPUs, Pallas' Triton kernel stands in for cuDNN's
(vatt_jax/planning/plan.py). Writes benchmarks/results/plans.json and the tables of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from support import repository

RESULTS = repository.RESULTS / 'plans.json'
DOCS = repository.ROOT / 'docs' / 'scaling.md'
# Between these lines of the document the tables are written.
BEGIN, END = '<!-- tables of benchmarks/plans.py -->', '<!-- end -->'

MODELS = {
    'bbs': 'configs/vatt.py:bbs,synthetic',
    'mbs': 'configs/vatt.py:mbs,synthetic',
    'lbs': 'configs/vatt.py:lbs,synthetic',
    'agnostic': 'configs/vatt.py:agnostic_medium,synthetic',
    'mmv': 'configs/mmv.py:tsm50x2_fac_vat,synthetic',
}
TITLES = {
    'bbs': 'VATT bbs',
    'mbs': 'VATT mbs',
    'lbs': 'VATT lbs',
    'agnostic': 'VATT agnostic, medium',
    'mmv': 'MMV tsm50x2',
}
MACHINES = {
    'v5e-256': 'v5e:16x16',
    'v5p-256': 'v5p:4x8x8',
    'v6e-256': 'v6e:16x16',
    '8 × H100': 'h100:1x8',
    '64 × H100': 'h100:8x8',
}
# Chips -> topology, for weak scaling at 8 clips a chip: within a slice, then slice by slice over
# the network between them.
WEAK = {16: 'v5e:4x4', 64: 'v5e:8x8', 256: 'v5e:16x16', 1024: 'v5e:16x16*4', 4096: 'v5e:16x16*16'}
WEAK_CLIPS = 8
BATCHES = (2048, 16384)
# Fields of a plan that are copied into the results.
COPIED = ('chips', 'mesh', 'per_device_batch', 'memory', 'roofline', 'notes', 'compiled')


# ---- plans


class Rows:
    """The rows by name, in the order in which they were first added."""

    def __init__(self):
        self.by_name: dict[str, dict] = {}

    def add(self, model: str, machine: str, topology: str, batch: int, attention: str) -> None:
        """Adds a row that is not there."""
        row = {
            'model': model,
            'machine': machine,
            'topology': topology,
            'batch': batch,
            'attention': attention,
        }
        self.by_name.setdefault(f'{model} {attention} {topology} {batch}', row)


def fastest_attention(model: str) -> str:
    """`fused` where a model has attention."""
    return 'dense' if model == 'mmv' else 'fused'


def list_rows() -> dict[str, dict]:
    """name -> {model, machine, topology, batch, attention}, in the order of compiling."""
    rows = Rows()
    # First what says most: the largest model on every machine, what fused attention gains, the
    # other models, and weak scaling.
    for machine, topology in MACHINES.items():
        rows.add('lbs', machine, topology, 2048, 'fused')
    for model in ('lbs', 'mbs'):
        rows.add(model, 'v5e-256', MACHINES['v5e-256'], 2048, 'dense')
    for model in ('mbs', 'bbs', 'agnostic', 'mmv'):
        rows.add(model, 'v5e-256', MACHINES['v5e-256'], 2048, fastest_attention(model))
    for chips in (1024, 4096, 64, 16):
        rows.add('lbs', f'v5e-{chips}', WEAK[chips], WEAK_CLIPS * chips, 'fused')
    # Then all the others.
    for batch in BATCHES:
        for machine, topology in MACHINES.items():
            for model in MODELS:
                rows.add(model, machine, topology, batch, fastest_attention(model))
    return rows.by_name


def compile_plan(row: dict, extra: list[str]) -> dict:
    """The plan of a row in short, or {'error': …}.

    Args:
        row: of list_rows().
        extra: further flags of run.py.
    """
    config = MODELS[row['model']]
    if row['attention'] == 'fused':
        config += ',fused'
    flags = [
        '--mode=plan',
        f'--config={config}',
        f'--topology={row["topology"]}',
        '--quick',
        f'--config.batch_size={row["batch"]}',
    ]
    if row['topology'].startswith('h100'):
        flags.append('--config.mesh.fsdp=8')
    flags += extra
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, 'run.py', *flags, f'--workdir={folder}'],
            cwd=repository.ROOT,
            text=True,
            capture_output=True,
            env=os.environ,
        )
        files = list(pathlib.Path(folder).glob('plan/*.json'))
        if done.returncode or not files:
            output = done.stderr.strip() or done.stdout.strip()
            message = output or f'exit code {done.returncode}'
            return row | {'error': message.splitlines()[-1][:300]}
        plan = json.loads(files[0].read_text())
    copied = {field: plan[field] for field in COPIED}
    return {
        **row,
        **copied,
        'model_step_flops': plan['flops']['model_step'],
        'executed_step_flops': plan['flops']['executed_step'],
        'kernel': plan['model']['attention'],
        'commit': repository.commit('vatt_jax', 'configs'),
        'command': ' '.join(['python', 'run.py', *flags]),
    }


# ---- tables


def amount(x: float | None, unit: float = 1.0, digits: int = 3) -> str:
    """x in a unit, to some digits but with all before the point; – for None."""
    if x is None:
        return '–'
    scaled = x / unit
    return f'{scaled:.{digits}g}' if scaled < 1000 else f'{scaled:.0f}'


def heading(first: str) -> str:
    """The first two lines of a table, whose first column is named."""
    columns = (
        first,
        'clips a chip',
        'peak GB',
        'compute ms',
        'memory ms',
        'links + network ms',
        'clips/s/chip (nothing overlaps)',
        'MFU',
    )
    return f'{table_line(columns)}\n|---|---|---|---|---|---|---|---|'


def table_line(cells) -> str:
    """Cells of Markdown."""
    return '| ' + ' | '.join(cells) + ' |'


def row_line(row: dict, title: str) -> str:
    """A row of a table; one whose plan failed or does not fit says so."""
    if 'error' in row:
        return f'| {title} | {row["error"]} | | | | | | |'
    memory, roofline = row['memory'], row['roofline']
    clips = f'{row["per_device_batch"]:g}'
    if memory['peak']:
        peak = amount(memory['peak'], 1e9)
    else:
        peak = f'> {amount(memory["arguments"], 1e9)}'
    if memory['fits'] is False:
        would_fit = []
        for option in memory['would_fit']:
            if 'alone are' not in option:
                would_fit.append(option.partition(':')[0])
        limit, options = amount(memory['limit'], 1e9), ' or '.join(would_fit)
        why = f'does not fit in {limit}; would, by estimate: {options}'
        return f'| {title} | {clips} | {peak} | {why} | | | | |'
    if 'bound' not in roofline:
        return f'| {title} | {clips} | {peak} | | | | | |'
    seconds = roofline['seconds']
    between_chips = (seconds['links'] or 0) + (seconds['network'] or 0)
    rate = roofline['clips_per_s_per_chip']
    serial_rate = rate * roofline['bound'] / roofline['serial']
    cells = (
        title,
        clips,
        peak,
        amount(seconds['compute'], 1e-3),
        amount(seconds['memory'], 1e-3),
        amount(between_chips, 1e-3),
        f'{amount(rate)} ({amount(serial_rate)})',
        f'{100 * roofline["mfu"]:.0f} % ({100 * roofline["mfu_serial"]:.0f} %)',
    )
    return table_line(cells)


def reading_order(named_row: tuple[str, dict]) -> tuple[int, int, str]:
    """Key by which the rows of a machine are sorted."""
    _, row = named_row
    return list(TITLES).index(row['model']), row['batch'], row['attention']


def machine_table(machine: str, topology: str, results: dict[str, dict]) -> list[str]:
    """Lines of a machine: its rows, and which are missing."""
    named = [(name, row) for name, row in list_rows().items() if row['topology'] == topology]
    named.sort(key=reading_order)
    table, missing = [], []
    for name, row in named:
        is_dense = row['attention'] == 'dense' and row['model'] != 'mmv'
        if name in results:
            title = f'{TITLES[row["model"]]}, {row["batch"]}'
            if is_dense and not topology.startswith('h100'):
                title += ', dense attention'
            table.append(row_line(results[name], title))
        else:
            missing.append(f'{row["model"]} {row["batch"]}' + (' dense' if is_dense else ''))
    lines = [f'**{machine}** (`{topology}`)', '']
    if table:
        lines += [heading('model, batch'), *table, '']
    if missing:
        command = f'python benchmarks/plans.py --only={topology}'
        lines += [f'Not compiled yet (`{command}`): {", ".join(missing)}.', '']
    return lines


def weak_scaling_table(results: dict[str, dict]) -> list[str]:
    """Lines of weak scaling: its rows, and which are missing."""
    table, missing = [], []
    for chips, topology in WEAK.items():
        name = f'lbs fused {topology} {WEAK_CLIPS * chips}'
        if name in results:
            table.append(row_line(results[name], str(chips)))
        else:
            missing.append(str(chips))
    lines = [
        f'**Weak scaling**: VATT lbs, fused attention, {WEAK_CLIPS} clips a chip, v5e; above 256 '
        'chips in slices of 256',
        '',
    ]
    if table:
        lines += [heading('chips'), *table, '']
    if missing:
        lines.append(f'Not compiled yet: {", ".join(missing)} chips.')
    return lines


def all_tables(results: dict[str, dict]) -> str:
    """What stands in the document."""
    lines = []
    for machine, topology in MACHINES.items():
        lines += machine_table(machine, topology, results)
    lines += weak_scaling_table(results)
    return '\n'.join(lines).rstrip()


def write_tables(results: dict[str, dict]) -> None:
    """Replaces the tables of the document."""
    before, rest = DOCS.read_text().split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(f'{before}{BEGIN}\n\n{all_tables(results)}\n\n{END}{after}')


# ---- the program


def read_results() -> dict[str, dict]:
    """name -> row with its plan."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', default='', help='regular expression over the names of rows')
    parser.add_argument('--again', action='store_true', help='also those that are there')
    parser.add_argument('--tables', action='store_true', help='compile nothing')
    parser.add_argument(
        '--list', action='store_true', help='names of the rows and whether they are there'
    )
    flags, extra = parser.parse_known_args()
    results = read_results()
    for name, row in list_rows().items():
        if not re.search(flags.only, name):
            continue
        is_there = name in results and 'error' not in results[name]
        if flags.list:
            print(name, 'there' if is_there else 'missing')
        elif not flags.tables and (flags.again or not is_there):
            print(name, flush=True)
            compiled = compile_plan(row, extra)
            # Read again: it took minutes, in which another process may have written.
            results = read_results() | {name: compiled}
            RESULTS.write_text(json.dumps(results, indent=1) + '\n')
            print('  ', row_line(results[name], name), flush=True)
    if not flags.list:
        write_tables(results)


if __name__ == '__main__':
    main()
