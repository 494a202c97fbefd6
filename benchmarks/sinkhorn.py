"""The labelling solver against the published procedure and OTT-JAX: CPU seconds, memory, labels, on the same problems in one run.

    python benchmarks/sinkhorn.py                      # all problems (an hour on two busy cores), one and two threads
    python benchmarks/sinkhorn.py --problems=small     # the 20k ones
    python benchmarks/sinkhorn.py --ott=VENV/bin/python    # also OTT-JAX, from an environment of its own (pip install ott-jax)

Every solver runs in a process of its own, pinned to as many cores as threads. Not counted: making the logits, placing them, compiling
(a first call on the same shapes). Counted: for the published procedure the power, the loop, the argmax; for OTT the loop and the
argmax; for ours everything `solve` does, samples, preconditioner and labels included. CPU seconds (user + system) are the figure
to compare on a shared machine. "warm" starts from the potentials and the preconditioner of an earlier solution and solves the problem
after a drift; its ratio is to the published procedure on the drifted problem, which it cannot start warm in any useful way.
Problems that are not asked for keep their former results.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
STRENGTH, DRIFT = 20.0, 0.3
# name -> (M, P, kind, prior)
PROBLEMS = {
    'random 20k x 309': (20_000, 309, 'random', 'uniform'),
    'structured 20k x 309': (20_000, 309, 'structured', 'uniform'),
    'random 100k x 309': (100_000, 309, 'random', 'uniform'),
    'structured 100k x 309': (100_000, 309, 'structured', 'uniform'),
    'structured 100k x 309, gaussian': (100_000, 309, 'structured', 'gaussian'),
    'structured 170752 x 309': (170_752, 309, 'structured', 'uniform'),
    'structured 50k x 1000, zipf': (50_000, 1000, 'structured', 'zipf'),
    'random 100k x 1000': (100_000, 1000, 'random', 'uniform'),
}
SMALL = ('random 20k x 309', 'structured 20k x 309')


def logits(m: int, p: int, kind: str, drift: bool) -> np.ndarray:
    """float32 [M P]: mean of two views' logits, each standard normal, structured: 4 more at one cluster drawn in proportion to 1/(k + 10)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((m, p), dtype=np.float32)
    x += rng.standard_normal((m, p), dtype=np.float32)
    if kind == 'structured':
        share = 1 / (np.arange(p) + 10)
        x[np.arange(m), rng.choice(p, m, p=share / share.sum())] += 8
    if drift:
        x += (
            np.sqrt(2, dtype=np.float32)
            * np.float32(DRIFT)
            * np.random.default_rng(1).standard_normal((m, p), dtype=np.float32)
        )
    x *= 0.5
    return x


def shares(p: int, kind: str) -> np.ndarray:
    x = {
        'uniform': np.ones(p),
        'zipf': 1 / (1.0 + np.arange(p)),
        'gaussian': 1 + 0.1 * np.random.default_rng(1).standard_normal(p),
    }[kind]
    return x / x.sum()


class Meter:
    def __enter__(self):
        self.cpu, self.wall = cpu_seconds(), time.monotonic()
        return self

    def __exit__(self, *_):
        self.cpu, self.wall = cpu_seconds() - self.cpu, time.monotonic() - self.wall


def cpu_seconds() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def published(x, prior, start):
    """The published procedure in float64: kernel p^λ, alternate scaling, test of the summed error every tenth iteration, argmax."""
    x = x.astype(np.float64)
    x -= x.max(1, keepdims=True)
    p = np.exp(x)
    p /= p.sum(1, keepdims=True)
    del x
    m = len(p)
    with Meter() as meter:
        np.power(p, STRENGTH, out=p)
        beta, error, count = np.full(m, 1 / m), np.inf, 0
        while error > 0.1 and count < 2000:
            alpha = prior / (p.T @ beta)
            new = (1 / m) / (p @ alpha)
            if count % 10 == 0:
                error = np.abs(beta / new - 1).sum()
            beta = new
            count += 1
        p *= alpha
        labels = p.argmax(1)
    return meter, labels, np.log(alpha), {'iterations': count, 'error': float(error)}


def ours(x, prior, start):
    sys.path.insert(0, str(ROOT))
    import jax

    from vatt_jax.clustering import sinkhorn

    x = jax.block_until_ready(jax.device_put(x))
    begin = None if start is None else sinkhorn.Start(start['potentials'], start['preconditioner'])
    call = lambda **k: sinkhorn.solve([x], prior, STRENGTH, tolerance='published', start=begin, **k)
    call()  # compiles
    with Meter() as meter:
        found = call()
    told = {
        'passes': found.passes,
        'work': round(found.work, 2),
        'converged': found.converged,
        'error_float32': found.published_error,
    }
    if start is None:
        with Meter() as build:
            rows = sinkhorn.Rows([x], None, len(prior), 'float32', None).sample(
                sinkhorn.FINE * len(prior)
            )
            sinkhorn.preconditioner(rows, found.potentials, STRENGTH)
        told['preconditioner_cpu'] = round(build.cpu, 3)
    with Meter() as floor:
        rows = sinkhorn.Rows([x], None, len(prior), 'float32', None)
        rows.marginal(found.potentials, STRENGTH)
    told['one_pass_cpu'] = round(floor.cpu, 4)
    return meter, found.labels, found.potentials, told | {'preconditioner': found.preconditioner}


def ott(x, prior, start):
    """OTT-JAX in its best setting for a dense cost on a CPU: float32 log domain, momentum chosen from the errors of the first 20 iterations, its
    threshold as low as float32 lets it go. Plain iterations take three times as many; Anderson acceleration, about as fast on uniform priors, and
    constant momentum above 1.3 do not converge on some of the problems; nor does the kernel domain."""
    import jax
    import jax.numpy as jnp
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

    cost = jax.block_until_ready(-jax.nn.log_softmax(jnp.asarray(x), -1))
    threshold = max(0.1 / len(x), 2e-6)

    @jax.jit
    def run(cost):
        geom = geometry.Geometry(cost_matrix=cost, epsilon=1 / STRENGTH)
        out = sinkhorn.Sinkhorn(
            threshold=threshold,
            inner_iterations=10,
            max_iterations=2000,
            momentum=acceleration.Momentum(start=20),
        )(
            linear_problem.LinearProblem(
                geom, a=jnp.full(len(cost), 1 / len(cost)), b=jnp.asarray(prior, jnp.float32)
            )
        )
        return (
            jnp.argmax(STRENGTH * (out.g[None] - cost), -1),
            out.g * STRENGTH,
            out.n_iters,
            out.converged,
        )

    compiled = run.lower(cost).compile()
    with Meter() as meter:
        labels, g, count, converged = jax.block_until_ready(compiled(cost))
    return (
        meter,
        np.asarray(labels),
        np.asarray(g, np.float64),
        {'iterations': int(count), 'converged': bool(converged), 'threshold': threshold},
    )


SOLVERS = {'published': published, 'ours': ours, 'ott': ott}


def child(args) -> None:
    m, p, kind, prior = PROBLEMS[args.problem]
    start = dict(np.load(args.start, allow_pickle=False)) if args.start else None
    meter, labels, potentials, told = SOLVERS[args.solver](
        logits(m, p, kind, args.drift), shares(p, prior), start
    )
    matrix = told.pop('preconditioner', None)
    np.savez(
        args.out,
        labels=labels,
        potentials=potentials,
        **({} if matrix is None else {'preconditioner': matrix}),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {
                'cpu_s': round(meter.cpu, 3),
                'wall_s': round(meter.wall, 3),
                'peak_GB': round(peak, 2),
                **told,
            }
        )
    )


def launch(python, solver, problem, threads, out, drift=False, start='') -> dict:
    env = {
        **os.environ,
        **{f'{n}_NUM_THREADS': str(threads) for n in ('OMP', 'OPENBLAS', 'MKL')},
        'JAX_PLATFORMS': 'cpu',
    }
    if threads == 1:
        env['XLA_FLAGS'] = '--xla_cpu_multi_thread_eigen=false'
    command = [
        python,
        __file__,
        '--child',
        f'--solver={solver}',
        f'--problem={problem}',
        f'--out={out}',
        f'--start={start}',
    ]
    command += ['--drift'] if drift else []
    cores = set(range(threads))
    done = subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        raise SystemExit(f'{solver} on {problem} failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(problem, drift, reference, other) -> dict:
    """Labels against the published ones; a difference is excused where the published top-2 margin is below its own distance to ours, or
    where float32 logits cannot tell the two apart. Errors recomputed in float64 from the potentials."""
    m, p, kind, prior = PROBLEMS[problem]
    x, r = logits(m, p, kind, drift), shares(p, prior)
    a, b = np.load(reference), np.load(other)
    gap = np.ptp(a['potentials'] - b['potentials'])
    different, unexcused, mass, error = 0, 0, np.zeros(p), 0.0
    blocks = [slice(i, i + 10_000) for i in range(0, m, 10_000)]
    for part in blocks:
        z = STRENGTH * x[part].astype(np.float64)
        top = np.sort(np.partition(z + a['potentials'], -2, 1)[:, -2:], 1)
        wrong = a['labels'][part] != b['labels'][part]
        different += int(wrong.sum())
        unexcused += int((wrong & (top[:, 1] - top[:, 0] > gap + 2e-5)).sum())
        mass += softmax(z + b['potentials']).sum(0)
    ratio = r / (mass / m)
    for part in blocks:
        error += np.abs(
            softmax(STRENGTH * x[part].astype(np.float64) + b['potentials']) @ ratio - 1
        ).sum()
    return {
        'labels_different': different,
        'unexcused': unexcused,
        'potential_gap': float(gap),
        'published_error_float64': float(error),
        'column_L1_float64': float(np.abs(mass / m - r).sum()),
    }


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ('solver', 'problem', 'out', 'start'):
        parser.add_argument(f'--{name}', default='')
    parser.add_argument('--child', action='store_true')
    parser.add_argument('--drift', action='store_true')
    parser.add_argument('--problems', default='all', help='all | small | names separated by ;')
    parser.add_argument('--threads', default='1,2')
    parser.add_argument('--ott', default='', help='a Python that has ott-jax')
    args = parser.parse_args()
    if args.child:
        return child(args)
    names = {'all': list(PROBLEMS), 'small': list(SMALL)}.get(args.problems) or args.problems.split(
        ';'
    )
    cores = len(os.sched_getaffinity(0))
    threads = [t for t in map(int, args.threads.split(',')) if t <= cores]
    if not args.ott:
        print(
            'OTT-JAX is left out: make it an environment of its own (python -m venv V; V/bin/pip install ott-jax) and give --ott=V/bin/python'
        )
    commit = subprocess.run(
        ['git', '-C', ROOT, 'rev-parse', 'HEAD'], capture_output=True, text=True
    ).stdout.strip()
    file = ROOT / 'benchmarks' / 'results' / 'sinkhorn.json'
    file.parent.mkdir(exist_ok=True)
    results = (
        json.loads(file.read_text())
        if file.exists()
        else {'strength': STRENGTH, 'drift': DRIFT, 'problems': {}}
    )
    machine = f'{platform.processor() or platform.machine()}, {cores} cores'
    with tempfile.TemporaryDirectory() as folder:
        at = lambda name: f'{folder}/{name}.npz'
        for problem in names:
            here = results['problems'].setdefault(problem, {})
            for t in threads:
                row = {}
                here[f'{t} threads'] = {
                    'commit': commit,
                    'machine': machine,
                    'load': os.getloadavg(),
                    'solvers': row,
                }
                row['published'] = launch(sys.executable, 'published', problem, t, at('published'))
                row['ours, cold'] = launch(
                    sys.executable, 'ours', problem, t, at('cold')
                ) | compare(problem, False, at('published'), at('cold'))
                row['published, drifted'] = launch(
                    sys.executable, 'published', problem, t, at('published_drifted'), drift=True
                )
                row['ours, warm'] = launch(
                    sys.executable, 'ours', problem, t, at('warm'), drift=True, start=at('cold')
                )
                row['ours, warm'] |= compare(problem, True, at('published_drifted'), at('warm'))
                if args.ott:
                    row['ott'] = launch(args.ott, 'ott', problem, t, at('ott')) | compare(
                        problem, False, at('published'), at('ott')
                    )
                base, drifted = row['published']['cpu_s'], row['published, drifted']['cpu_s']
                for name, against in (('ours, cold', base), ('ours, warm', drifted), ('ott', base)):
                    if name in row:
                        row[name]['times_faster'] = round(against / row[name]['cpu_s'], 2)
                for name, values in row.items():
                    told = ', '.join(
                        f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
                        for k, v in values.items()
                    )
                    print(f'{problem}, {t} thread(s), {name}: {told}', flush=True)
                file.write_text(json.dumps(results, indent=1))
    print(f'→ {file.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
