#!/usr/bin/env python
"""Trains, evaluates, embeds, reports and plans: the one entry point of runs.

python run.py                                                    # the demo, into runs/demo
python run.py --config=configs/demo.py:agnostic --workdir=runs/agnostic --config.seed=1
python run.py --mode=eval   --workdir=runs/demo                  # the run's own config, newest checkpoint
python run.py --mode=embed  --workdir=runs/demo --split=test     # embeddings of a dataset split, as npz
python run.py --mode=report --workdir=runs/demo                  # report/index.html
python run.py --mode=deflate --workdir=runs/mmv --out=runs/mmv_image   # a network for images out of one for video (docs/mmv.md)
python run.py --mode=plan   --workdir=runs/plan --config=configs/vatt.py:mbs --topology=v5p:4x4x4   # before it is rented: docs/scaling.md
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import sys
import time

os.environ.setdefault(
    'TF_CPP_MIN_LOG_LEVEL', '3'
)  # TensorFlow decodes on the host and need not introduce itself
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
MODES = ('train', 'eval', 'embed', 'report', 'deflate', 'plan')


def main(argv: list[str]) -> None:
    from vatt_jax import config as configs

    flags, overrides = parse(argv)
    workdir = pathlib.Path(flags.workdir)
    if flags.mode == 'report':
        report(workdir, tuple(flags.compare.split(',')) if flags.compare else ())
        return
    if flags.mode == 'plan':
        plan(read_config(flags, overrides, workdir), workdir, flags)
        return
    from vatt_jax.parallel import distributed

    config = read_config(flags, overrides, workdir)
    if config.jax_platform == 'cpu':
        keep_freed_memory()
    if config.jax_platform:
        import jax

        jax.config.update('jax_platforms', config.jax_platform)
    distributed.initialize()
    configs.check_batch(config, *machine())
    keep_compiled(config, workdir)
    if flags.mode == 'train':
        train(config, workdir, flags.quiet)
    else:
        {'eval': evaluate, 'embed': embed, 'deflate': deflate}[flags.mode](config, workdir, flags)
    distributed.leave()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Flags, and ('field.path', 'text') of every --config.field.path=text."""
    from vatt_jax.config import ConfigError

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise ConfigError(f'{message}; see python run.py --help')

    parser = Parser(
        prog='run.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        '--config',
        default='',
        help="configs/FILE.py[:arg]; default: the run folder's own, else configs/demo.py",
    )
    parser.add_argument('--workdir', default='runs/demo', help='the run folder')
    parser.add_argument('--mode', default='train', choices=MODES)
    parser.add_argument(
        '--quiet', action='store_true', help='plain log lines instead of the live one'
    )
    parser.add_argument('--split', default='test', help='embed: which split of config.data.eval')
    parser.add_argument(
        '--machine', default='', help='entry of configs/machines.py, whose mesh the config takes'
    )
    parser.add_argument(
        '--topology',
        default='',
        help='plan: v5p:8x8x4 | v5e:16x16 | v6e:16x16 | tpu7x:4x4x4 | v5e:16x16*4 (four slices) | '
        'h100:8x8 (hosts × GPUs) | cpu:8; default: that of --machine',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='plan, TPU and GPU: stop before code is generated; several times faster, memory is that '
        'of the buffer assignment',
    )
    parser.add_argument(
        '--search',
        action='store_true',
        help='plan: vary the batch per device, rematerialisation and FSDP width',
    )
    parser.add_argument(
        '--compare',
        default='',
        help='report: other run folders, separated by commas, shown beside this one',
    )
    parser.add_argument('--out', default='', help='deflate: the run folder to make')
    parser.add_argument(
        '--naive', action='store_true', help='deflate: sum the kernels, and fit nothing'
    )
    parser.add_argument(
        '--fit',
        default=1000,
        type=int,
        help='deflate: steps in which the batch norms are fitted, of config.batch_size pictures',
    )
    parser.add_argument(
        '--rate', default=1e-3, type=float, help='deflate: first learning rate of these steps'
    )
    overrides, rest = [], []
    words = iter(argv)
    for word in words:
        if word.startswith('--config.'):
            name, equals, value = word[len('--config.') :].partition('=')
            value = value if equals else next(words, None)
            if value is None:
                raise ConfigError(f'--config.{name} lacks a value; write --config.{name}=VALUE')
            overrides.append((name, value))
        else:
            rest.append(word)
    return parser.parse_args(rest), overrides


def read_config(flags, overrides, workdir: pathlib.Path):
    """The config with overrides, checked against configs/default.py."""
    from configs import default
    from vatt_jax import config as configs

    stored = configs.stored(workdir)
    if stored is None and flags.mode not in ('train', 'plan'):
        raise configs.ConfigError(
            f'--workdir={workdir} holds no run (no config.json); train first, or name another folder'
        )
    if flags.config or stored is None:
        config = configs.load(flags.config or 'configs/demo.py')
    else:
        config = configs.complete(stored, default.get_config())
    if flags.machine:
        from configs import machines

        machines.apply(config, flags.machine)
    configs.override(config, overrides)
    configs.check_fields(config, default.get_config())
    return config


def machine() -> tuple[int, int]:
    import jax

    try:
        return jax.device_count(), jax.process_count()
    except RuntimeError as error:
        from vatt_jax.config import ConfigError

        raise ConfigError(
            f'no device could be used ({str(error).splitlines()[0]}); --config.jax_platform=cpu runs on the CPU'
        ) from error


def keep_compiled(config, workdir: pathlib.Path) -> None:
    """Programs that take more than a second to compile are kept, and found by the next start of the same run: in config.compilation_cache, else where
    JAX was told to (JAX_COMPILATION_CACHE_DIR), else in the run folder. Without being asked not on a CPU, whose programs are for one processor."""
    import jax

    folder = config.compilation_cache
    if not folder and not jax.config.jax_compilation_cache_dir and jax.default_backend() != 'cpu':
        folder = workdir.absolute() / 'compiled'
    if folder:
        jax.config.update('jax_compilation_cache_dir', str(folder))


def keep_freed_memory() -> None:
    """glibc gives large blocks back to the system as they are freed. On the CPU that is all temporaries of every step, and to fault them in
    again took a quarter of its time. Nothing where there is no glibc. Before threads begin, so that they share few heaps."""
    import ctypes

    set_option = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if set_option is not None:
        M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 4)):
            set_option(option, value)


def open_data(config):
    """The data object; makes the playground first where the config asks for it and it is not there yet. That takes minutes, so whatever is
    wrong with the config without regard to data is told before."""
    import data_pipelines
    from vatt_jax.training import loop

    if config.data.source == 'records' and config.data.make:
        from data_pipelines.datasets import playground
        from data_pipelines.storage.records import read_from

        made = config.data.make.get('path', '')
        mixture, evaluated = read_from(config)
        read = [*(entry['path'] for entry in mixture.values()), evaluated['path']]
        if not made or os.path.join(made, 'records') in read:
            if not playground.is_made(made):
                loop.check(config)
            playground.make(**config.data.make)
    return data_pipelines.open(config)


def train(config, workdir: pathlib.Path, quiet: bool) -> None:
    from vatt_jax.parallel import distributed
    from vatt_jax.training import loop as training

    training.check_run_folder(config, workdir)
    clock = Clock(workdir)
    with clock('data'):
        data = open_data(config)
        distributed.barrier('data')
    with clock('training'):
        built, _ = training.train(config, data, workdir, quiet=quiet)
    clock.save()
    if config.report and distributed.agree((workdir / 'done.json').exists()):
        # All is saved: SIGTERM may end the process where it is, and the same command makes what is missing.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        with clock('evaluation and report'):
            compare(config, data, workdir, built)
        clock.save()
        distributed.leave()
        if distributed.is_main():
            report(workdir)


def compare(config, data, workdir: pathlib.Path, built=None, again: bool = False) -> None:
    """Evaluates the newest checkpoint, and the same network at random initialisation beside it; keeps a gallery for the report.

    built: of this config, if it has been built; again: also where results are there already.
    """
    import jax

    from vatt_jax.config import ConfigError
    from vatt_jax.parallel import distributed
    from vatt_jax.training import checkpoint, loop

    built = built or loop.build(config, data)
    loop.check_run_folder(config, workdir, evaluating=again)
    step = loop.newest_sound(workdir)
    if step is None:
        raise ConfigError(f'--workdir={workdir} holds no checkpoint; train first')
    wanted = lambda name: (
        config.evals
        and (again or not distributed.agree((workdir / 'evals' / name / 'results.json').exists()))
    )
    with jax.set_mesh(built.mesh):
        if wanted(f'step_{step:06d}'):
            keeper = checkpoint.Checkpoints(workdir / 'checkpoints', config.checkpoint)
            state, _, _ = keeper.restore(step, built.shape, built.shardings)
            keeper.close()
            loop.evaluate(config, built, state, data, workdir, step, gallery=True, again=again)
        if wanted('random_init'):
            loop.evaluate(
                config, built, built.init(), data, workdir, 0, tag='random_init', again=again
            )


def evaluate(config, workdir: pathlib.Path, flags) -> None:
    from vatt_jax.parallel import distributed
    from vatt_jax.training import checkpoint

    checkpoint.find(workdir)  # before the data are made
    compare(config, open_data(config), workdir, again=True)
    if distributed.is_main():
        from vatt_jax.reporting import report as reports

        print(reports.table(workdir), flush=True)


def embed(config, workdir: pathlib.Path, flags) -> None:
    """Writes <workdir>/embeddings/<split>.npz: pooled/<stream>, space/<space>/<stream>, index, labels/<name>, id, start."""
    import jax
    import numpy as np

    from vatt_jax.inference import encoder
    from vatt_jax.parallel import distributed, sharding
    from vatt_jax.training import checkpoint

    mesh = sharding.make_mesh(dict(config.mesh))
    stored, variables, _ = checkpoint.load_model(workdir, mesh)
    data = open_data(config)
    enc = encoder.Encoder(stored, variables, mesh)
    batches = data.one_pass(
        flags.split,
        config.batch_size,
        process=(jax.process_index(), jax.process_count()),
        by='segments',
    )
    features = encoder.features_of(enc, batches)
    texts = data.texts(flags.split, by='segments')
    out = {f'pooled/{k}': v for k, v in features['pooled'].items()}
    out |= {
        f'space/{space}/{k}': v
        for space, members in features['spaces'].items()
        for k, v in members.items()
    }
    out |= {f'labels/{k}': v for k, v in features['labels'].items()} | {'index': features['index']}
    out |= {f'valid/{k}': v for k, v in features['valid'].items()}
    out |= {
        'id': np.array([texts[i]['id'] for i in features['index']]),
        'start': np.array([texts[i]['start'] for i in features['index']]),
    }
    if distributed.is_main():
        path = workdir / 'embeddings' / f'{flags.split}.npz'
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'{path.stem}.tmp.npz')
        np.savez(temporary, **out)
        os.replace(temporary, path)
        print(f'{len(features["index"])} examples → {path}')


def deflate(config, workdir: pathlib.Path, flags) -> None:
    """Makes --out a run folder with the deflated model of this one's newest checkpoint; pictures for the fit are frames of config.data.train."""
    import jax
    import numpy as np
    from flax.traverse_util import flatten_dict

    from vatt_jax.adaptation import deflation
    from vatt_jax.config import ConfigError
    from vatt_jax.importers import parameter_map
    from vatt_jax.parallel import sharding

    if not flags.out:
        raise ConfigError('--mode=deflate makes a new run folder; name it with --out')
    if jax.process_count() > 1:
        raise ConfigError(
            f'--mode=deflate works in one process, this is one of {jax.process_count()}; all devices of one machine are used'
        )
    if flags.fit < 1 or flags.rate <= 0:
        raise ConfigError(
            f'--fit={flags.fit} --rate={flags.rate:g}: positive numbers are wanted; --naive fits nothing'
        )
    out = parameter_map.check_new(flags.out)
    stored, info, ours = parameter_map.read_run(workdir)
    stored.data, stored.mesh, stored.batch_size = config.data, config.mesh, config.batch_size
    still = deflation.still_config(stored)
    tree = lambda group: deflation.unflatten_dict(
        {k[1:]: v for k, v in ours.items() if k[0] == group}
    )
    params = deflation.naive(stored, tree('params'))
    losses: list[float] = []
    if not flags.naive:
        mesh = sharding.make_mesh(dict(config.mesh))
        pictures = open_data(still).train(0, config.batch_size)

        def told(step, loss):
            if step % 100 == 0 or step == flags.fit:
                print(f'step {step}: mean |difference| {loss:.5f}', flush=True)

        params, losses = deflation.refit(
            stored,
            {'params': tree('params'), 'batch_stats': tree('batch_stats')},
            still,
            params,
            pictures,
            flags.fit,
            flags.rate,
            mesh,
            told,
        )
        pictures.close()
    arrays = {k: v for k, v in ours.items() if k[0] != 'params'} | {
        ('params', *k): v for k, v in flatten_dict(params).items()
    }
    info = {
        **info,
        'deflated': {
            'fitted': not flags.naive,
            'from': workdir.name,
            'steps': len(losses),
            'loss': [float(np.mean(x)) for x in (losses[:10], losses[-10:])] if losses else [],
        },
    }
    parameter_map.write_run(
        out, still, parameter_map.abstract_state(still, info.get('labels', {})), arrays, info
    )
    print(f'{"naively " if flags.naive else ""}deflated {workdir} → {out}')


def plan(config, workdir: pathlib.Path, flags) -> None:
    """Prints the plan of a run on --topology and keeps it in <workdir>/plan/, as a table and as JSON."""
    from configs import machines
    from vatt_jax.config import ConfigError
    from vatt_jax.performance import chips

    text = flags.topology or (machines.MACHINES[flags.machine].topology if flags.machine else '')
    if not text:
        raise ConfigError(
            '--mode=plan wants --topology, such as v5p:4x4x4, v5e:16x16, h100:8x8 or cpu:8, or --machine'
        )
    if flags.search and flags.quick:
        raise ConfigError(
            '--quick leaves the compiler at work when its plan is made, and --search has further plans to make; drop one of them'
        )
    topology = chips.parse(text)
    os.environ.update(
        chips.environment(topology)
    )  # before JAX starts; a config may have imported it
    import jax

    jax.config.update('jax_platforms', 'cpu')
    if topology.chip.platform == 'cpu':
        jax.config.update('jax_num_cpu_devices', topology.devices)
    import data_pipelines
    from vatt_jax.planning import plan as plans

    notes = []
    try:
        data = data_pipelines.open(config)
    except (data_pipelines.DataError, ImportError) as error:
        like = config.copy_and_resolve_references()
        like.data.source = 'synthetic'
        data = data_pipelines.open(like)
        notes.append(
            f'the data are not here ({error}): frames of the size that the model reads, and a run of unknown epochs'
        )
    if flags.search:
        plans.search(config, data, topology, workdir / 'plan', notes)
        return
    print(
        plans.table(plans.plan(config, data, topology, workdir / 'plan', notes, flags.quick)),
        end='',
        flush=True,
    )
    if flags.quick:
        os._exit(0)  # the compiler is still at work


def report(workdir: pathlib.Path, others: tuple[str, ...] = ()) -> None:
    from vatt_jax.reporting import report as reports

    path = reports.build(workdir, others)
    print(reports.table(workdir, others))
    print(f'report: {path}')


class Clock:
    """Seconds of each stage, added to <workdir>/timings.json, over restarts, by `save`: a run that stops before it began writes nothing."""

    def __init__(self, workdir: pathlib.Path):
        self.path, self.seconds = workdir / 'timings.json', {}

    def __call__(self, stage: str):
        import contextlib

        @contextlib.contextmanager
        def timed():
            began = time.monotonic()
            yield
            self.seconds[stage] = time.monotonic() - began

        return timed()

    def save(self) -> None:
        from vatt_jax.parallel import distributed
        from vatt_jax.training import loop

        if distributed.is_main():
            before = json.loads(self.path.read_text()) if self.path.exists() else {}
            total = {
                k: round(before.get(k, 0) + self.seconds.get(k, 0), 1)
                for k in {**before, **self.seconds}
            }
            loop.write_atomically(self.path, json.dumps(total, indent=1))
        self.seconds = {}


def entry() -> None:
    """main(), with a user's mistakes told in one sentence (exit code 2) and a failed run in one too (exit code 1)."""
    from vatt_jax.config import ConfigError, fail

    try:
        main(sys.argv[1:])
    except ConfigError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print('interrupted; the same command continues from the last checkpoint', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        told = {'DataError': 2, 'TrainingStopped': 1, 'ShardingError': 2, 'Absent': 1, 'Unsaved': 1}
        code = told.get(type(error).__name__)
        if code is None:
            import jax

            if not jax.distributed.is_initialized():
                raise
            import traceback

            traceback.print_exc()  # and out: at its end Python would wait for the other processes, and they for this one
            code = 1
        else:
            print(f'error: {error}', file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


if __name__ == '__main__':
    entry()
