"""The labelling solver against the published procedure and OTT-JAX, on the same problems.

    python benchmarks/sinkhorn.py                      # all problems (an hour on two busy cores),
                                                       # one and two threads
    python benchmarks/sinkhorn.py --problems=small     # the 20k ones
    python benchmarks/sinkhorn.py --ott=VENV/bin/python    # also OTT-JAX, from an environment of
                                                           # its own (pip install ott-jax)

CPU seconds, memory and labels, in one run. Every solver runs in a process of its own, pinned to as
many cores as threads. Not counted: making the logits, placing them, compiling (a first call on the
same shapes). Counted: for the published procedure the power, the loop, the argmax; for OTT the loop
and the argmax; for ours everything `solve` does, samples, preconditioner and labels included. CPU
seconds (user + system) are the figure to compare on a shared machine. "warm" starts from the
potentials and the preconditioner of an earlier solution and solves the problem after a drift; its
ratio is to the published procedure on the drifted problem, which it cannot start warm in any useful
way. Problems that are not asked for keep their former results.
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from support import repository

RESULTS = repository.RESULTS / 'sinkhorn.json'
# λ of the published procedure; share of fresh noise in the drifted logits.
STRENGTH, DRIFT = 20.0, 0.3
# name -> (records M, clusters P, kind of logits, kind of prior)
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
# Rows of logits that are compared at a time, in float64.
COMPARED_ROWS = 10_000


# ---- problems


def make_logits(records: int, clusters: int, kind: str, drift: bool) -> np.ndarray:
    """float32 [M P]: the mean of two views' logits, each standard normal.

    Structured ones are 4 larger at one cluster of each record, drawn in proportion to 1/(k + 10).
    """
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((records, clusters), dtype=np.float32)
    logits += rng.standard_normal((records, clusters), dtype=np.float32)
    if kind == 'structured':
        share = 1 / (np.arange(clusters) + 10)
        labels = rng.choice(clusters, records, p=share / share.sum())
        logits[np.arange(records), labels] += 8
    if drift:
        noise_rng = np.random.default_rng(1)
        noise = noise_rng.standard_normal((records, clusters), dtype=np.float32)
        logits += np.sqrt(2, dtype=np.float32) * np.float32(DRIFT) * noise
    logits *= 0.5
    return logits


def make_prior(clusters: int, kind: str) -> np.ndarray:
    """float64 [P]: shares of the clusters, which sum to 1."""
    if kind == 'uniform':
        prior = np.ones(clusters)
    elif kind == 'zipf':
        prior = 1 / (1.0 + np.arange(clusters))
    else:
        prior = 1 + 0.1 * np.random.default_rng(1).standard_normal(clusters)
    return prior / prior.sum()


# ---- solvers: (logits, prior, start) -> (meter, labels, potentials, what else to report)


class Meter:
    """CPU and wall seconds of a with-block."""

    def __enter__(self):
        self.cpu, self.wall = cpu_seconds(), time.monotonic()
        return self

    def __exit__(self, *_):
        self.cpu, self.wall = cpu_seconds() - self.cpu, time.monotonic() - self.wall


def cpu_seconds() -> float:
    """User and system seconds of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def published(logits, prior, start):
    """The published procedure in float64.

    Kernel p^λ, alternate scaling, test of the summed error every tenth iteration, argmax.
    """
    logits = logits.astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(1, keepdims=True)
    del logits
    records = len(probabilities)
    with Meter() as meter:
        kernel = np.power(probabilities, STRENGTH, out=probabilities)
        beta, error, count = np.full(records, 1 / records), np.inf, 0
        while error > 0.1 and count < 2000:
            alpha = prior / (kernel.T @ beta)
            new_beta = (1 / records) / (kernel @ alpha)
            if count % 10 == 0:
                error = np.abs(beta / new_beta - 1).sum()
            beta = new_beta
            count += 1
        kernel *= alpha
        labels = kernel.argmax(1)
    return meter, labels, np.log(alpha), {'iterations': count, 'error': float(error)}


def ours(logits, prior, start):
    """vatt_jax's solver, in float32; from a start where one is given."""
    import jax

    from vatt_jax.clustering import sinkhorn

    logits = jax.block_until_ready(jax.device_put(logits))
    begin = None
    if start is not None:
        begin = sinkhorn.Start(start['potentials'], start['preconditioner'])

    def solve():
        return sinkhorn.solve([logits], prior, STRENGTH, tolerance='published', start=begin)

    def rows():
        return sinkhorn.Rows([logits], None, len(prior), 'float32', None)

    # Compiles.
    solve()
    with Meter() as meter:
        solution = solve()
    report = {
        'passes': solution.passes,
        'work': round(solution.work, 2),
        'converged': solution.converged,
        'error_float32': solution.published_error,
    }
    if start is None:
        with Meter() as build_meter:
            sample = rows().sample(sinkhorn.FINE * len(prior))
            sinkhorn.preconditioner(sample, solution.potentials, STRENGTH)
        report['preconditioner_cpu'] = round(build_meter.cpu, 3)
    with Meter() as pass_meter:
        rows().marginal(solution.potentials, STRENGTH)
    report['one_pass_cpu'] = round(pass_meter.cpu, 4)
    report['preconditioner'] = solution.preconditioner
    return meter, solution.labels, solution.potentials, report


def ott(logits, prior, start):
    """OTT-JAX in its best setting for a dense cost on a CPU.

    Float32 log domain, momentum chosen from the errors of the first 20 iterations, its threshold as
    low as float32 lets it go. Plain iterations take three times as many; Anderson acceleration,
    about as fast on uniform priors, and constant momentum above 1.3 do not converge on some of the
    problems; nor does the kernel domain.
    """
    import jax
    import jax.numpy as jnp
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration, sinkhorn

    cost = jax.block_until_ready(-jax.nn.log_softmax(jnp.asarray(logits), -1))
    threshold = max(0.1 / len(logits), 2e-6)
    solver = sinkhorn.Sinkhorn(
        threshold=threshold,
        inner_iterations=10,
        max_iterations=2000,
        momentum=acceleration.Momentum(start=20),
    )

    @jax.jit
    def solve(cost):
        problem = linear_problem.LinearProblem(
            geometry.Geometry(cost_matrix=cost, epsilon=1 / STRENGTH),
            a=jnp.full(len(cost), 1 / len(cost)),
            b=jnp.asarray(prior, jnp.float32),
        )
        solution = solver(problem)
        labels = jnp.argmax(STRENGTH * (solution.g[None] - cost), -1)
        return labels, solution.g * STRENGTH, solution.n_iters, solution.converged

    compiled = solve.lower(cost).compile()
    with Meter() as meter:
        labels, potentials, count, converged = jax.block_until_ready(compiled(cost))
    report = {'iterations': int(count), 'converged': bool(converged), 'threshold': threshold}
    return meter, np.asarray(labels), np.asarray(potentials, np.float64), report


SOLVERS = {'published': published, 'ours': ours, 'ott': ott}


# ---- a solver in a process of its own


def child(args: argparse.Namespace) -> None:
    """Solves one problem; arrays go to a file, a line of JSON to standard output."""
    records, clusters, kind, prior_kind = PROBLEMS[args.problem]
    start = dict(np.load(args.start, allow_pickle=False)) if args.start else None
    prior = make_prior(clusters, prior_kind)
    solver = SOLVERS[args.solver]
    # No name here for the logits: a solver that is done with them can free them.
    meter, labels, potentials, report = solver(
        make_logits(records, clusters, kind, args.drift), prior, start
    )
    arrays = {'labels': labels, 'potentials': potentials}
    preconditioner = report.pop('preconditioner', None)
    if preconditioner is not None:
        arrays['preconditioner'] = preconditioner
    np.savez(args.out, **arrays)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    measured = {
        'cpu_s': round(meter.cpu, 3),
        'wall_s': round(meter.wall, 3),
        'peak_GB': round(peak, 2),
    }
    print(json.dumps(measured | report))


def launch(
    solver: str,
    problem: str,
    threads: int,
    out: str,
    drift: bool = False,
    start: str = '',
    python: str = sys.executable,
) -> dict:
    """Runs child() on the first `threads` cores. Returns what it printed.

    Args:
        solver: one of SOLVERS.
        problem: one of PROBLEMS.
        threads: and cores.
        out: file for labels and potentials.
        drift: solve the drifted problem.
        start: file of an earlier solution.
        python: interpreter.

    Raises:
        SystemExit: the solver failed.
    """
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    for library in ('OMP', 'OPENBLAS', 'MKL'):
        env[f'{library}_NUM_THREADS'] = str(threads)
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
    if drift:
        command.append('--drift')

    def pin():
        os.sched_setaffinity(0, range(threads))

    done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=pin)
    if done.returncode:
        raise SystemExit(f'{solver} on {problem} failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- comparing


def compare(problem: str, drift: bool, reference_file: str, other_file: str) -> dict:
    """Compares a solution with the published one.

    A different label is excused where the published top-2 margin is below its own distance to ours,
    or where float32 logits cannot separate the two. Errors are recomputed in float64 from the
    potentials.
    """
    records, clusters, kind, prior_kind = PROBLEMS[problem]
    logits = make_logits(records, clusters, kind, drift)
    prior = make_prior(clusters, prior_kind)
    reference, other = np.load(reference_file), np.load(other_file)
    gap = np.ptp(reference['potentials'] - other['potentials'])
    blocks = [slice(i, i + COMPARED_ROWS) for i in range(0, records, COMPARED_ROWS)]

    different, unexcused, mass = 0, 0, np.zeros(clusters)
    for block in blocks:
        scaled = STRENGTH * logits[block].astype(np.float64)
        two_largest = np.partition(scaled + reference['potentials'], -2, 1)[:, -2:]
        margin = np.ptp(two_largest, axis=1)
        differs = reference['labels'][block] != other['labels'][block]
        different += int(differs.sum())
        unexcused += int((differs & (margin > gap + 2e-5)).sum())
        mass += softmax(scaled + other['potentials']).sum(0)

    ratio = prior / (mass / records)
    error = 0.0
    for block in blocks:
        scaled = STRENGTH * logits[block].astype(np.float64)
        error += np.abs(softmax(scaled + other['potentials']) @ ratio - 1).sum()
    return {
        'labels_different': different,
        'unexcused': unexcused,
        'potential_gap': float(gap),
        'published_error_float64': float(error),
        'column_L1_float64': float(np.abs(mass / records - prior).sum()),
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis of two."""
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def run_problem(problem: str, threads: int, ott_python: str, folder: str) -> dict[str, dict]:
    """{solver: what was measured and how it compares}, for one problem.

    Args:
        problem: one of PROBLEMS.
        threads: of each solver.
        ott_python: a Python that has ott-jax, or ''.
        folder: for solutions.
    """
    exact, exact_drifted = f'{folder}/published.npz', f'{folder}/published_drifted.npz'
    cold, warm, by_ott = f'{folder}/cold.npz', f'{folder}/warm.npz', f'{folder}/ott.npz'
    row = {}
    row['published'] = launch('published', problem, threads, exact)
    row['ours, cold'] = launch('ours', problem, threads, cold)
    row['ours, cold'] |= compare(problem, False, exact, cold)
    row['published, drifted'] = launch('published', problem, threads, exact_drifted, drift=True)
    row['ours, warm'] = launch('ours', problem, threads, warm, drift=True, start=cold)
    row['ours, warm'] |= compare(problem, True, exact_drifted, warm)
    if ott_python:
        row['ott'] = launch('ott', problem, threads, by_ott, python=ott_python)
        row['ott'] |= compare(problem, False, exact, by_ott)
    compared_with = {
        'ours, cold': 'published',
        'ours, warm': 'published, drifted',
        'ott': 'published',
    }
    for solver, baseline in compared_with.items():
        if solver in row:
            ratio = row[baseline]['cpu_s'] / row[solver]['cpu_s']
            row[solver]['times_faster'] = round(ratio, 2)
    return row


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
        child(args)
        return
    named = {'all': list(PROBLEMS), 'small': list(SMALL)}
    problems = named.get(args.problems) or args.problems.split(';')
    cores = len(os.sched_getaffinity(0))
    thread_counts = [count for count in map(int, args.threads.split(',')) if count <= cores]
    if not args.ott:
        print(
            'OTT-JAX is left out: make it an environment of its own '
            '(python -m venv V; V/bin/pip install ott-jax) and give --ott=V/bin/python'
        )
    commit = repository.git('rev-parse', 'HEAD')
    machine = f'{platform.processor() or platform.machine()}, {cores} cores'
    results = {'strength': STRENGTH, 'drift': DRIFT, 'problems': {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for problem in problems:
            of_problem = results['problems'].setdefault(problem, {})
            for threads in thread_counts:
                load = os.getloadavg()
                row = run_problem(problem, threads, args.ott, folder)
                of_problem[f'{threads} threads'] = {
                    'commit': commit,
                    'machine': machine,
                    'load': load,
                    'solvers': row,
                }
                for solver, values in row.items():
                    print(f'{problem}, {threads} thread(s), {solver}: {in_words(values)}')
                sys.stdout.flush()
                RESULTS.write_text(json.dumps(results, indent=1))
    print(f'→ {RESULTS.relative_to(repository.ROOT)}')


def in_words(values: dict) -> str:
    """A solver's row as a list of names and numbers."""
    parts = []
    for name, value in values.items():
        text = f'{value:.4g}' if isinstance(value, float) else str(value)
        parts.append(f'{name} {text}')
    return ', '.join(parts)


if __name__ == '__main__':
    main()
