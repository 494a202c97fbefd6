"""The training loop, read top to bottom: mesh, model, state, start order, step, evaluation, save."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import evals, models, objectives, optim
from vatt_jax.config import ConfigError
from vatt_jax.evals import base as evals_base
from vatt_jax.inference import encoder
from vatt_jax.inputs import preprocess, word_vectors
from vatt_jax.models import attention
from vatt_jax.objectives.base import TrainingRecords, select_streams
from vatt_jax.parallel import distributed, sharding
from vatt_jax.performance import chips, flops
from vatt_jax.rng import Rng
from vatt_jax.training import checkpoint, metrics, train_state, train_step


class TrainingStopped(RuntimeError):
    """The run cannot go on (several non-finite steps, too many unreadable records). The message says what to do."""


@dataclasses.dataclass
class Built:
    """What a config builds, the same in training and in evaluation: a function of the config and `info` alone, so that runs may share it.

    init: () -> TrainState and step: (state, device batch) -> (state, metrics), both jitted, to be called inside `jax.set_mesh(mesh)`; step takes
    its state's memory. shape: abstract TrainState. batch: abstract device batch of one step, from bytes; inputs: what of it a loss sees, after
    the device stage; outputs: the model's Outputs of that. info: what the data say of themselves.
    """

    mesh: Any
    model: Any
    objective: Any
    tx: Any
    init: Any
    step: Any
    shape: Any
    shardings: Any
    batch: Any
    inputs: Any
    outputs: Any
    info: dict[str, Any]
    encoder: encoder.Encoder | None = (
        None  # of evaluations: made by the first, and compiled once for all
    )
    passes: dict[Any, Any] = dataclasses.field(
        default_factory=dict
    )  # of refreshes: function -> compiled once for all


def resolve(config: ConfigDict, data) -> None:
    """Fills in place what only the data know: the vocabulary size of text towers whose `vocab` is 0."""
    for tower in config.model.towers.values():
        if tower.get('vocab', 1) == 0:
            tower.vocab = data.info['tokenizer']['size']


def mesh_of(config: ConfigDict) -> Any:
    """The mesh of a config whose evaluators, compiler options and batch are right; raises ConfigError before anything is built otherwise."""
    for name in config.evals:
        evals.build(name, config.evals[name])
    check_compiler_options(config)
    attention.check(config.model, jax.default_backend())
    shape = configs.check_batch(config, jax.device_count(), jax.process_count())
    return sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape)))


def check(config: ConfigDict) -> None:
    """Raises ConfigError for what is wrong with a config whatever the data say. For those who are about to spend minutes on making them."""
    config = ConfigDict(config.to_dict())
    for tower in config.model.towers.values():
        if tower.get('vocab', 1) == 0:
            tower.vocab = 2
    mesh_of(config)
    model, objective = (
        models.build(config.model, config.compute_dtype),
        objectives.build(config.objective),
    )
    optim.check(config.optimizer, config.steps)
    streams = objective.streams() or tuple(config.model.towers)
    spec = train_state.abstract(
        model, preprocess.abstract(config.model.inputs, streams, 2, config.compute_dtype), 0, {}
    )
    train_step.check(config, model, objective, spec.batch_stats)


def build(config: ConfigDict, data) -> Built:
    """Mesh, model, objective and the state's shape and shardings, of a config that the data complete (`resolve`). Computes nothing on devices."""
    built = assemble(config, data, mesh_of(config))
    evals.check(config.evals, data, built.outputs)
    return built


def assemble(config: ConfigDict, data, mesh) -> Built:
    """What `build` builds of a checked config, on a mesh whose devices need not be here (plan.py compiles for machines that are elsewhere)."""
    resolve(config, data)
    model, objective = (
        models.build(config.model, config.compute_dtype),
        objectives.build(config.objective),
    )
    process = (jax.process_index(), jax.process_count())
    first = next(iter(data.one_pass('train', process[1], process=process, by='records', limit=1)))
    first = select_streams(first, objective.streams())
    missing = set(objective.streams() or ()) - set(first)
    if missing:
        raise ConfigError(
            f'config.objective wants the stream {sorted(missing)[0]!r}; the data has '
            f'{", ".join(k for k, v in first.items() if isinstance(v, dict) and "data" in v)} '
            '(more views: config.data.views)'
        )
    of_rows = lambda rows: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), np.asarray(x).dtype),
        encoder.device_part(first),
    )
    rows = config.batch_size // (
        config.accumulate if config.accumulation == 'plain' else 1
    )  # that a loss sees
    rng = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros((rows,), jnp.uint32)))
    inputs = jax.eval_shape(
        lambda b, r: preprocess.device_stage(
            b, config.model.inputs, config.augment, r, augment=False, dtype=config.compute_dtype
        ),
        of_rows(rows),
        rng,
    )
    labels = {name: len(classes) for name, classes in data.info.get('labels', {}).items()}
    spec = train_state.abstract(model, inputs, data.size('train'), labels)
    train_step.check(config, model, objective, spec.batch_stats)
    init, shape, shardings, tx = train_state.create(config, model, objective, spec, mesh)
    step = jax.jit(
        train_step.make(config, model, objective, tx),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=dict(config.compiler_options) or None,
    )
    batch = of_rows(config.batch_size)
    columns = {
        k: jax.ShapeDtypeStruct((config.batch_size, *x.shape), x.dtype)
        for k, x in objective.columns().items()
    }
    if columns:
        batch['columns'] = columns
    return Built(
        mesh,
        model,
        objective,
        tx,
        init,
        step,
        shape,
        shardings,
        batch,
        inputs,
        spec.outputs,
        data.info,
    )


def train(
    config: ConfigDict, data, workdir: str | pathlib.Path, *, quiet: bool = False
) -> tuple[Built, dict[str, float]]:
    """Trains to config.steps or to SIGTERM, continuing whatever the run folder holds. Returns what it built, compiled by now, and the last
    evaluation's scalars.

    data: the data object of docs/architecture.md. Raises ConfigError before anything is written when config, data or checkpoint
    do not fit, and TrainingStopped when the run cannot go on.
    """
    with distributed.Stop() as stop:
        built = build(config, data)
        return built, _train(config, data, pathlib.Path(workdir), built, quiet, stop)


def _train(
    config: ConfigDict,
    data,
    workdir: pathlib.Path,
    built: Built,
    quiet: bool,
    stop: distributed.Stop,
) -> dict[str, float]:
    main, process = distributed.is_main(), (jax.process_index(), jax.process_count())
    check_run_folder(config, workdir)

    # Start order: the run's own latest checkpoint; else init_from; else scratch.
    start = {'consumed': 0, 'order': '', 'weights': []}
    columns: dict[str, np.ndarray] = {}
    saved = newest_sound(workdir)
    with jax.set_mesh(built.mesh):
        if saved is not None:
            keeper = checkpoint.Checkpoints(workdir / 'checkpoints', config.checkpoint)
            state, start, columns = keeper.restore(saved, built.shape, built.shardings)
            origin = f'continuing from step {saved}'
        else:
            state = built.init()
            origin = 'starting from scratch'
            if config.init_from:
                params, stats, left = checkpoint.init_from(
                    config.init_from,
                    state.params['model'],
                    state.batch_stats,
                    config.init_rename,
                    config.init_skip,
                )
                state = state.replace(
                    params={**state.params, 'model': params},
                    batch_stats=stats,
                    ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema else {},
                )
                origin = f'starting from {config.init_from}' + (
                    f', {len(left)} parameters fresh' if left else ''
                )
            frozen = [k for k, t in config.model.towers.items() if t.get('frozen_words')]
            if config.init_words:
                params, said = word_vectors.fill(
                    config.init_words, state.params['model'], data.info['tokenizer']
                )
                state = state.replace(
                    params={**state.params, 'model': params},
                    ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema else {},
                )
                origin += f', {said}'
            elif frozen and not config.init_from:
                origin += f', random word vectors that stay so (config.init_words is empty and config.model.towers.{frozen[0]}.frozen_words is set)'
            workdir.mkdir(parents=True, exist_ok=True)
            keeper = checkpoint.Checkpoints(workdir / 'checkpoints', config.checkpoint)
    step, consumed, order, weights = (
        int(state.step),
        int(start['consumed']),
        start['order'],
        tuple(start['weights']),
    )
    if main:
        write_atomically(workdir / 'config.json', configs.to_json(config))
        if step < config.steps:
            (workdir / 'done.json').unlink(
                missing_ok=True
            )  # of a run that was shorter: this one is not done
    writer = metrics.Writer(workdir, step, main)
    progress = metrics.Progress(config.steps, step, quiet, main)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    frozen = sum(
        x.size
        for n, x in zip(jax.tree.leaves(optim.paths(state.params)), jax.tree.leaves(state.params))
        if optim.matches(n, config.optimizer.frozen)
    )
    told = f' ({frozen / 1e6:.2f} M of them frozen)' if frozen else ''
    progress.say(
        f'{config.name}: {origin}; {count / 1e6:.2f} M parameters{told}, {data.size("train")} training records, '
        f'{jax.device_count()} × {jax.devices()[0].device_kind}, {jax.process_count()} process(es)'
    )

    with jax.set_mesh(built.mesh):
        first_record = data.offsets('train', by='records')
        peak = chips.peak_of(built.mesh.devices.flat)
        variables = {'params': built.shape.params['model'], 'batch_stats': built.shape.batch_stats}
        meter = metrics.Meter(
            flops.per_clip(config, built.inputs, variables) if peak else None, peak
        )
        first, last = config.profile or (0, 0)
        compiled = tracing = absent = False
        batches, pending, scalars, started, unreadable = None, None, {}, time.monotonic(), 0

        def save() -> None:
            meta = {
                'step': step,
                'consumed': consumed,
                'order': order,
                'weights': list(weights),
                'config': config.to_dict(),
                'info': built.info,
            }
            keeper.save(step, state, meta, columns)

        def settle() -> None:
            """Reads the metrics of the step before: by now they are computed, so reading them stops nothing."""
            nonlocal pending, order, unreadable
            if pending is None:
                return
            at, device_values = pending
            pending = None
            values = {k: np.asarray(v) for k, v in device_values.items()}
            rows = np.stack([values.pop('source'), values.pop('index')], 1)
            order = hashlib.sha256(order.encode() + rows.astype(np.int32).tobytes()).hexdigest()
            values = {k: float(v) for k, v in values.items()}
            if values['bad']:
                records = [f'{s}:{i}' for s, i in rows.tolist()]
                progress.say(
                    f'step {at}: non-finite loss or gradient, update skipped; records {" ".join(records)}'
                )
                writer.write(at, {'event': 'non-finite step', 'records': records})
                if values['bad'] >= config.max_bad_steps:
                    raise TrainingStopped(
                        f'{int(values["bad"])} non-finite steps in a row up to step {at}; the last good checkpoint is step '
                        f'{keeper.latest()}. Lower config.optimizer.schedule.peak, set config.optimizer.clip, or look at the records '
                        f'listed in {workdir}/metrics.jsonl'
                    )
            if at % config.log_every == 0 or at == config.steps:
                speed = meter.read()
                writer.write(at, {**values, 'order': order[:16], **speed})
                progress.show(at, {**values, **speed})
                found = data.problems()['indices'][unreadable:]
                if found:
                    unreadable += len(found)
                    writer.write(
                        at,
                        {
                            'event': 'unreadable records',
                            'records': [f'{source}:{index} {why}' for source, index, why in found],
                        },
                    )
                    progress.say(
                        f'step {at}: {len(found)} more records cannot be read, such as {" ".join(map(str, found[0]))}'
                    )

        try:
            while step < config.steps:
                if config.eval_every and step and step % config.eval_every == 0:
                    settle()
                    scalars = evaluate(
                        config, built, state, data, workdir, step, writer=writer, progress=progress
                    )
                    meter.reset()
                if built.objective.refresh_due(step, config.steps):
                    settle()
                    progress.say(f'step {step}: refresh')
                    state, fresh, weights = refresh(
                        config, built, state, step, data, process, columns
                    )
                    columns = {**columns, **fresh.columns}
                    writer.write(step, {f'refresh/{k}': v for k, v in fresh.metrics.items()})
                    meter.reset()
                    if fresh.weights and batches is not None:
                        batches.close()  # what is prefetched was drawn with the old weights
                        batches = None
                if batches is None:
                    sampling = {k: columns[k] for k in weights}
                    batches = data.train(
                        consumed, config.batch_size, process=process, columns=sampling or None
                    )
                began = time.monotonic()
                batch = select_streams(next(batches), built.objective.streams())
                if columns:
                    record = first_record[batch['source']] + batch['index']
                    batch['columns'] = {k: v[record] for k, v in columns.items()}
                meter.waited += time.monotonic() - began
                if step + 1 == first and main:
                    jax.profiler.start_trace(str(workdir / 'profile'))
                    tracing = True
                state, values = built.step(state, encoder.place(batch, built.mesh))
                step, consumed = step + 1, consumed + config.batch_size
                if tracing and step == last:
                    jax.block_until_ready(values['loss'])
                    jax.profiler.stop_trace()
                    tracing = False
                    progress.say(
                        f'trace of steps {first} to {last} in {workdir / "profile"}; look at it with XProf or TensorBoard'
                    )
                if not compiled:
                    compiled = True
                    meter.reset()
                settle()
                meter.clips += config.batch_size
                pending = (step, values)
                stopping = stop.now(step)
                if step % config.checkpoint.every == 0 or step == config.steps or stopping:
                    settle()
                    began = time.monotonic()
                    save()
                    meter.lost += time.monotonic() - began
                if stopping and step < config.steps:
                    keeper.wait()
                    progress.say(f'asked to stop: step {step} is saved; the same command continues')
                    return scalars
            keeper.wait()
            if config.evals and not stop.asked:
                scalars = evaluate(
                    config,
                    built,
                    state,
                    data,
                    workdir,
                    step,
                    gallery=config.report,
                    writer=writer,
                    progress=progress,
                )
            if stop.asked:
                progress.say(f'asked to stop: step {step} is saved; the same command evaluates')
                return scalars
            problems = data.problems()
            if main:
                final = {
                    'step': step,
                    'consumed': consumed,
                    'order': order,
                    'seconds': round(time.monotonic() - started, 1),
                    'skipped_steps': int(state.skipped),
                    'corrupt_records': problems['corrupt'],
                    'digests': {
                        k: checkpoint.digest(getattr(state, k))
                        for k in ('params', 'batch_stats', 'opt_state', 'objective')
                    }
                    if jax.process_count() == 1
                    else {},
                }
                write_atomically(workdir / 'done.json', json.dumps(final, indent=1))
            if problems['corrupt']:
                progress.say(
                    f'{problems["corrupt"]} of {problems["read"]} records could not be read: {problems["indices"][:10]}'
                )
            return scalars
        except jax.errors.JaxRuntimeError as error:
            absent = True  # until all of them come
            distributed.look_for_absent(error)
            absent = False
            raise
        finally:
            if tracing:
                jax.profiler.stop_trace()
            if batches is not None:
                batches.close()
            progress.close()
            writer.close()
            # A save under way is finished even when the run fails, so that what was written is whole; without the other processes it cannot be.
            if not absent:
                keeper.wait()
                keeper.close()


def refresh(config, built: Built, state, step: int, data, process, columns):
    """(state, Refreshed, sampling weights) after the objective's dataset-wide refresh before `step`."""

    def encode(fn, augment=True, draw=0):
        def forward(variables, params, batch, step, draw):
            rng = Rng.create(config.seed, step, batch['position']).at('refresh').at(draw)
            batch = preprocess.device_stage(
                batch,
                config.model.inputs,
                config.augment,
                rng.at('augment'),
                augment=augment,
                dtype=config.compute_dtype,
            )
            return fn(built.model, variables, params, batch, rng)

        if (fn, augment) not in built.passes:
            built.passes[fn, augment] = jax.jit(
                forward, out_shardings=sharding.replicated(built.mesh)
            )
        forward, at = built.passes[fn, augment], (np.uint32(step), np.uint32(draw))
        parts = []
        for batch in data.one_pass(
            'train',
            config.batch_size,
            process=process,
            by='records',
            augment=augment,
            draw=f'{step}/{draw}',
        ):
            batch = select_streams(batch, built.objective.streams())
            rows = encoder.gather_rows(batch, ('position', 'valid'))
            out = forward(
                variables, state.params['objective'], encoder.place(batch, built.mesh), *at
            )
            out = jax.tree.map(np.asarray, jax.device_get(out))
            parts.append(
                {
                    'index': rows['position'][rows['valid']],
                    **{k: v[rows['valid']] for k, v in out.items()},
                }
            )
        order = np.argsort(np.concatenate([p['index'] for p in parts]), kind='stable')
        return {k: np.concatenate([p[k] for p in parts])[order] for k in parts[0]}

    variables = {'params': state.params['model'], 'batch_stats': state.batch_stats}
    fresh = built.objective.refresh(
        variables,
        state.params['objective'],
        state.objective,
        step,
        TrainingRecords(data.size('train'), columns, encode),
    )
    put = lambda new, like: jax.tree.map(lambda x, s: jax.device_put(jnp.asarray(x), s), new, like)
    state = state.replace(
        params={
            **state.params,
            'objective': put(fresh.params, built.shardings.params['objective']),
        },
        objective=put(fresh.state, built.shardings.objective),
    )
    slots = jax.jit(
        lambda s: train_state.fresh_slots(built.tx, s, fresh.fresh_slots),
        out_shardings=built.shardings.opt_state,
    )
    return state.replace(opt_state=slots(state)), fresh, fresh.weights


def evaluate(
    config,
    built: Built,
    state,
    data,
    workdir: pathlib.Path,
    step: int,
    *,
    tag: str = '',
    gallery: bool = False,
    again: bool = False,
    writer=None,
    progress=None,
):
    """Runs config.evals on a state; results go to <workdir>/evals/<tag> (default step_NNNNNN), scalars to the log. tag: of a baseline,
    for which only the evaluators with `baseline` run. gallery: also keep what the report shows of the retrievals.

    A result folder appears whole or not at all, so an evaluation that was killed is simply run again, and one that is there is read
    and told (again: it is made anew).
    """
    folder = workdir / 'evals' / (tag or f'step_{step:06d}')
    if not again and distributed.agree((folder / 'results.json').exists()):
        return _tell(evals.load(folder), step, writer, progress)
    process = (jax.process_index(), jax.process_count())
    variables = train_state.evaluation_variables(state)
    if built.encoder is None:
        built.encoder = encoder.Encoder(config, variables, built.mesh, built.objective)
    enc = built.encoder.on(variables, state.params['objective'], state.objective)
    view = evals_base.View(enc, data, config.batch_size, process, config.seed)
    results = evals.run_all(config.evals, view, baseline=bool(tag))
    pictures = lambda path: evals.gallery.save(path, results, config.evals, data, config.batch_size)
    if distributed.is_main():
        evals.save(results, folder, pictures if gallery and jax.process_count() == 1 else None)
    return _tell(results, step, writer, progress)


def _tell(results, step: int, writer, progress) -> dict[str, float]:
    scalars = {f'{name}/{k}': v for name, r in results.items() for k, v in r.scalars.items()}
    if writer is not None:
        writer.write(step, {f'eval/{k}': v for k, v in scalars.items()})
    if progress is not None:
        shown = [
            f'{k} {v:.3g}'
            for k, v in scalars.items()
            if k.rsplit('/', 1)[-1] in ('R@10', 'accuracy', 'top1')
        ]
        progress.say(f'step {step}: ' + '  '.join(shown))
    return scalars


def newest(workdir: pathlib.Path) -> int | None:
    """Step of the run's newest complete checkpoint, if any."""
    step = distributed.agree(max(checkpoint.steps(workdir / 'checkpoints'), default=-1))
    return None if step < 0 else step


def newest_sound(workdir: pathlib.Path) -> int | None:
    """The same, of those whose files are what was written; newer ones that are not are told and set aside. The main process looks."""
    told, step = '', -1
    if distributed.is_main():
        try:
            step = checkpoint.newest_sound(workdir / 'checkpoints')
            step = -1 if step is None else step
        except ConfigError as error:
            told, step = str(error), -2
    step = distributed.agree(step)
    if step == -2:
        raise ConfigError(told or f'every checkpoint in {workdir} is damaged')
    return None if step < 0 else step


def check_compiler_options(config: ConfigDict) -> None:
    """Compiles nothing much with config.compiler_options; raises ConfigError for one that this XLA does not take."""
    for name, value in config.compiler_options.items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except Exception as error:  # of one of several types, by what is wrong
            raise ConfigError(
                f'config.compiler_options.{name}={value!r} is not taken by XLA on {jax.default_backend()}: '
                f'{str(error).splitlines()[0]}; leave it out'
            ) from error


def check_run_folder(config: ConfigDict, workdir: pathlib.Path, evaluating: bool = False) -> None:
    """A run folder belongs to one model and objective; raises ConfigError rather than continue it with another. A `vocab` of 0 is
    whatever the data say (`resolve`), so before the data are open it differs from nothing. evaluating: the model may be shown other sizes and
    rates of its inputs than in training (where a parameter's shape follows from them, reading it will tell)."""
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f'--workdir={workdir} is a file; a folder is wanted')
    if newest(workdir) is None:
        return
    old = configs.stored(workdir)
    if old is None:
        return
    before, new = dict(configs.flatten(old)), dict(configs.flatten(config))
    told = lambda f: (
        f in before or f.startswith(configs.OPEN)
    )  # else the run is older than the field
    changed = [
        f
        for f in configs.same(old, config)
        if told(f)
        and f.startswith(('model.', 'objective.', 'optimizer.name', 'optimizer.frozen'))
        and not f.startswith(
            (
                'model.attention',
                'model.scan',
                'model.remat',
                'model.packed',
                'objective.method',
                'objective.block',
            )
        )
        and not (f.endswith('.vocab') and new.get(f) == 0)
        and not (evaluating and f.startswith('model.inputs.'))
    ]
    if changed:
        f = changed[0]
        values = [c.get(f, 'absent') for c in (before, new)]
        raise ConfigError(
            f'--workdir={workdir} holds a run with config.{f}={values[0]!r} and this config has {values[1]!r}; '
            'choose another --workdir, or start from its weights with --config.init_from'
        )


def write_atomically(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text)
    os.replace(temporary, path)
