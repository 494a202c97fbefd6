"""Plans of the published models on pods: compiled here, without the pods, into benchmarks/results/plans.json and the tables of docs/scaling.md.

    PYTHONPATH=<folder with libtpu and JAX's plugin for GPUs> python benchmarks/plans.py    # what is missing, one plan after another
    python benchmarks/plans.py --only='lbs.*v5e' --again                  # some of them, anew
    python benchmarks/plans.py --tables                                   # docs/scaling.md from the results there are

A row is a model, a machine, a global batch and the kind of attention: `fused` has no dropout on attention probabilities and runs the platform's
kernel, `dense` is the published step. Each is `run.py --mode=plan` in a process of its own, so that a crash or a kill costs one row, and is
written when it is known. On GPUs, Pallas' Triton kernel stands in for cuDNN's (vatt_jax/planning/plan.py).
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results' / 'plans.json'
DOCS = ROOT / 'docs' / 'scaling.md'
MODELS = {
    'bbs': 'configs/vatt.py:bbs,synthetic',
    'mbs': 'configs/vatt.py:mbs,synthetic',
    'lbs': 'configs/vatt.py:lbs,synthetic',
    'agnostic': 'configs/vatt.py:agnostic_medium,synthetic',
    'mmv': 'configs/mmv.py:tsm50x2_fac_vat,synthetic',
}
MACHINES = {
    'v5e-256': 'v5e:16x16',
    'v5p-256': 'v5p:4x8x8',
    'v6e-256': 'v6e:16x16',
    '8 × H100': 'h100:1x8',
    '64 × H100': 'h100:8x8',
}
# weak scaling at 8 clips a chip: within a slice, then slice by slice over the network between them
WEAK = {16: 'v5e:4x4', 64: 'v5e:8x8', 256: 'v5e:16x16', 1024: 'v5e:16x16*4', 4096: 'v5e:16x16*16'}


def rows() -> dict[str, dict]:
    """name -> {model, machine, batch, attention, topology}, the most wanted first."""
    out = {}

    def add(model, machine, topology, batch, attention):
        out.setdefault(
            f'{model} {attention} {topology} {batch}',
            {
                'model': model,
                'machine': machine,
                'topology': topology,
                'batch': batch,
                'attention': attention,
            },
        )

    for machine in ('v5e-256', 'v5p-256', 'v6e-256', '8 × H100', '64 × H100'):
        add('lbs', machine, MACHINES[machine], 2048, 'fused')
    for model in ('lbs', 'mbs'):
        add(model, 'v5e-256', MACHINES['v5e-256'], 2048, 'dense')
    for model in ('mbs', 'bbs', 'agnostic', 'mmv'):
        add(model, 'v5e-256', MACHINES['v5e-256'], 2048, 'dense' if model == 'mmv' else 'fused')
    for chips in (1024, 4096, 64, 16):
        add('lbs', f'v5e-{chips}', WEAK[chips], 8 * chips, 'fused')
    for batch in (2048, 16384):
        for machine in MACHINES:
            for model in MODELS:
                add(
                    model, machine, MACHINES[machine], batch, 'dense' if model == 'mmv' else 'fused'
                )
    return out


def plan(row: dict, extra: list[str]) -> dict:
    """The plan of a row in short, or {'error': …}."""
    config = MODELS[row['model']] + (',fused' if row['attention'] == 'fused' else '')
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            'run.py',
            '--mode=plan',
            f'--config={config}',
            f'--topology={row["topology"]}',
            f'--workdir={folder}',
            '--quick',
            f'--config.batch_size={row["batch"]}',
            *(['--config.mesh.fsdp=8'] if row['topology'].startswith('h100') else []),
            *extra,
        ]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ)
        found = list(pathlib.Path(folder).glob('plan/*.json'))
        if done.returncode or not found:
            lines = (
                done.stderr.strip() or done.stdout.strip() or f'exit code {done.returncode}'
            ).splitlines()
            return row | {'error': lines[-1][:300]}
        p = json.loads(found[0].read_text())
    keep = {
        k: p[k]
        for k in ('chips', 'mesh', 'per_device_batch', 'memory', 'roofline', 'notes', 'compiled')
    }
    keep['model_step_flops'], keep['executed_step_flops'] = (
        p['flops']['model_step'],
        p['flops']['executed_step'],
    )
    keep['kernel'] = p['model']['attention']
    git = lambda *c: subprocess.run(
        ['git', *c], cwd=ROOT, text=True, capture_output=True
    ).stdout.strip()
    keep['commit'] = git('rev-parse', '--short', 'HEAD') + (
        '+' if git('status', '--porcelain', 'vatt_jax', 'configs') else ''
    )
    return (
        row
        | keep
        | {
            'command': ' '.join(
                c for c in ['python', *command[1:]] if not c.startswith('--workdir')
            )
        }
    )


# ---- tables
def amount(x: float | None, unit: float = 1.0, digits: int = 3) -> str:
    return '–' if x is None else f'{x / unit:.{digits}g}' if x / unit < 1000 else f'{x / unit:.0f}'


def line(r: dict, name: str) -> str:
    if 'error' in r:
        return f'| {name} | {r["error"]} | | | | | | |'
    m, roof = r['memory'], r['roofline']
    each = f'{r["per_device_batch"]:g}'
    peak = f'{amount(m["peak"], 1e9)}' if m['peak'] else f'> {amount(m["arguments"], 1e9)}'
    if m['fits'] is False:
        would = ' or '.join(x.partition(':')[0] for x in m['would_fit'] if 'alone are' not in x)
        return f'| {name} | {each} | {peak} | does not fit in {amount(m["limit"], 1e9)}; would, by estimate: {would} | | | | |'
    if 'bound' not in roof:
        return f'| {name} | {each} | {peak} | | | | | |'
    s = roof['seconds']
    ms = lambda k: amount(s[k], 1e-3)
    return (
        f'| {name} | {each} | {peak} | {ms("compute")} | {ms("memory")} | {amount((s["links"] or 0) + (s["network"] or 0), 1e-3)} | '
        f'{amount(roof["clips_per_s_per_chip"])} ({amount(roof["clips_per_s_per_chip"] * roof["bound"] / roof["serial"])}) | '
        f'{100 * roof["mfu"]:.0f} % ({100 * roof["mfu_serial"]:.0f} %) |'
    )


HEAD = (
    '| {} | clips a chip | peak GB | compute ms | memory ms | links + network ms | clips/s/chip (nothing overlaps) | MFU |\n'
    '|---|---|---|---|---|---|---|---|'
)
TITLES = {
    'bbs': 'VATT bbs',
    'mbs': 'VATT mbs',
    'lbs': 'VATT lbs',
    'agnostic': 'VATT agnostic, medium',
    'mmv': 'MMV tsm50x2',
}


def tables(results: dict[str, dict]) -> str:
    wanted = rows()
    out = []
    for machine, topology in MACHINES.items():
        named = [(name, w) for name, w in wanted.items() if w['topology'] == topology]
        named.sort(
            key=lambda x: (list(TITLES).index(x[1]['model']), x[1]['batch'], x[1]['attention'])
        )
        have = [(name, w) for name, w in named if name in results]
        out += [
            f'**{machine}** (`{topology}`)',
            '',
            *([HEAD.format('model, batch')] if have else []),
        ]
        out += [
            line(
                results[name],
                f'{TITLES[w["model"]]}, {w["batch"]}'
                + (
                    ', dense attention'
                    if w['attention'] == 'dense'
                    and w['model'] != 'mmv'
                    and not topology.startswith('h100')
                    else ''
                ),
            )
            for name, w in have
        ]
        missing = [
            f'{w["model"]} {w["batch"]}'
            + (' dense' if w['attention'] == 'dense' and w['model'] != 'mmv' else '')
            for name, w in named
            if name not in results
        ]
        out += [''] if have else []
        out += (
            [
                f'Not compiled yet (`python benchmarks/plans.py --only={topology}`): {", ".join(missing)}.',
                '',
            ]
            if missing
            else []
        )
    out += [
        '**Weak scaling**: VATT lbs, fused attention, 8 clips a chip, v5e; above 256 chips in slices of 256',
        '',
    ]
    weak = {chips: f'lbs fused {topology} {8 * chips}' for chips, topology in WEAK.items()}
    have = [line(results[name], str(chips)) for chips, name in weak.items() if name in results]
    missing = [str(chips) for chips, name in weak.items() if name not in results]
    out += [HEAD.format('chips'), *have, ''] if have else []
    return '\n'.join(
        out + ([f'Not compiled yet: {", ".join(missing)} chips.'] if missing else [])
    ).rstrip()


BEGIN, END = '<!-- tables of benchmarks/plans.py -->', '<!-- end -->'


def write(results: dict[str, dict]) -> None:
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(f'{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}')


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
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, row in rows().items():
        if not re.search(flags.only, name):
            continue
        if flags.list:
            print(name, 'there' if name in results and 'error' not in results[name] else 'missing')
        elif not flags.tables and (flags.again or name not in results or 'error' in results[name]):
            print(name, flush=True)
            made = plan(row, extra)  # minutes, in which another process may have written
            results = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | {name: made}
            RESULTS.write_text(json.dumps(results, indent=1) + '\n')
            print('  ', line(results[name], name), flush=True)
    if not flags.list:
        write(results)


if __name__ == '__main__':
    main()
