"""What a config builds: mesh, model, objective, the jitted step and the state's layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vatt_jax import config as configs
from vatt_jax import evals, models, objectives, optim
from vatt_jax.config import ConfigError
from vatt_jax.inference.feature_extractor import FeatureExtractor
from vatt_jax.inputs import mirrored, preprocess
from vatt_jax.inputs.batch import device_part
from vatt_jax.models import attention
from vatt_jax.objectives.base import Objective, select_streams, stream_names
from vatt_jax.parallel import sharding
from vatt_jax.rng import Rng
from vatt_jax.training import (
    frozen_base,
    frozen_models,
    other_models,
    starting_values,
    trackers,
    train_state,
    train_step,
)


@dataclasses.dataclass
class Built:
    """What a config builds, the same in training and in evaluation.

    A function of the config and `info` alone, so that runs may share it.

    Attributes:
        mesh: the device mesh.
        model: the Linen module.
        objective: what is being learnt.
        tx: the optimizer.
        init: () -> TrainState, jitted; to be called inside `jax.set_mesh(mesh)`.
        step: (state, device batch) -> (state, metrics), jitted; to be called inside
            `jax.set_mesh(mesh)`. The state passed in is donated: its memory becomes the new one's.
        shape: abstract TrainState.
        shardings: the TrainState's tree of shardings.
        batch: abstract device batch of one step, as it comes from the host.
        inputs: what of it a loss sees, after the device stage; abstract.
        outputs: the model's Outputs of `inputs`; abstract.
        info: what the data say of themselves.
        tables: name -> [M …], abstract: those that the host keeps (`Objective.tables`).
        encoder: of evaluations; made by the first one, and compiled once for all.
        others: models of other runs that evaluators read; run folder -> its model.
        passes: of refreshes; (function, augment) -> compiled once for all.
    """

    mesh: Any
    model: Any
    objective: Objective
    tx: optax.GradientTransformation
    init: Any
    step: Any
    shape: Any
    shardings: Any
    batch: Any
    inputs: Any
    outputs: Any
    info: dict[str, Any]
    tables: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    encoder: FeatureExtractor | None = None
    others: dict[str, FeatureExtractor] = dataclasses.field(default_factory=dict)
    passes: dict[Any, Any] = dataclasses.field(default_factory=dict)


def build(config: ConfigDict, data: Any) -> Built:
    """Builds all of a run but its values. Computes nothing on devices.

    Args:
        config: of the run; what only the data know is filled in (`resolve`).
        data: the data object of docs/architecture.md.

    Raises:
        ConfigError: config, data and devices do not fit together.
    """
    built = assemble(config, data, mesh_of(config))
    evals.check(config.evals, data, _evaluated_outputs(built))
    other_models.check(config, data.info)
    return built


def _evaluated_outputs(built: Built) -> Any:
    """The model's Outputs, abstract, with the spaces of the objective's own heads."""
    outputs = built.outputs
    own_spaces = jax.eval_shape(
        built.objective.embed,
        built.shape.params['objective'],
        built.shape.objective,
        outputs.encoded,
    )
    return outputs.replace(spaces={**outputs.spaces, **own_spaces})


def resolve(config: ConfigDict, data: Any) -> None:
    """Fills in place what only the data and other runs know.

    These are the vocabulary size of towers whose `vocab` is 0, and what frozen models are.

    Raises:
        ConfigError: the run of a frozen model cannot be read, or has other inputs.
    """
    for tower in config.model.towers.values():
        if tower.get('vocab', 1) == 0:
            tower.vocab = data.info['tokenizer']['size']
    frozen_models.resolve(config, data.info)


def mesh_of(config: ConfigDict) -> Any:
    """The mesh of a config.

    Raises:
        ConfigError: evaluators, compiler options, attention, augmentation or batch are wrong. It is
            raised before anything is built.
    """
    # Mistakes in evaluators are found now, not after hours of training.
    for name in config.evals:
        evals.build(name, config.evals[name])
    trackers.check(config.get('trackers', ()))
    check_compiler_options(config)
    attention.check(config.model, jax.default_backend())
    preprocess.check(config.model.inputs, config.augment)
    shape = configs.check_batch(config, jax.device_count(), jax.process_count())
    return sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape)))


def check(config: ConfigDict) -> dict[str, Any]:
    """Checks all of a config that does not depend on the data, before minutes go into making them.

    Returns:
        The model's variables, abstract: {'params', 'batch_stats'}. Where the data say how many
        words there are, word tables have two rows.

    Raises:
        ConfigError: something is wrong whatever the data say.
    """
    # A copy: the placeholder for the vocabulary below must not reach the caller's config.
    config = ConfigDict(config.to_dict())
    for tower in config.model.towers.values():
        if tower.get('vocab', 1) == 0:
            tower.vocab = 2  # any size will do: nothing is computed
    mesh_of(config)
    starting_values.check_fields(config.init_trees, config.init_rename, config.init_skip)
    frozen_base.check_fields(config)
    model = models.build(config.model, config.compute_dtype, frozen=bool(config.base))
    objective = objectives.build(config.objective)
    train_state.check_evaluated(config.evaluated, objective)
    optim.check(config.optimizer, config.steps)
    streams = objective.streams() or tuple(config.model.towers)
    # Only traced for its shapes, so any number of rows will do; neither the number of records nor
    # the labels matter to what is checked here.
    batch = preprocess.abstract(config.model.inputs, streams, 2, config.compute_dtype)
    spec = train_state.abstract(
        model, batch, 0, {}, _towerless(objective), bool(objective.map_streams())
    )
    train_step.check(config, model, objective, spec.batch_stats)
    assert spec.init is not None
    _, variables = jax.eval_shape(spec.init, jax.eval_shape(lambda: jax.random.key(0)), batch)
    return {'batch_stats': {}, **nn.meta.unbox(variables)}


def _towerless(objective: Objective) -> tuple[str, ...]:
    """Streams of an objective that the model does not read."""
    return (*objective.frozen_streams(), *objective.own_streams())


def check_compiler_options(config: ConfigDict) -> None:
    """Compiles nothing much with each of config.compiler_options.

    Raises:
        ConfigError: this XLA does not take one of them.
    """
    # XLA looks at its options only when it compiles. One option at a time, so that the message can
    # name the field.
    for name, value in config.compiler_options.items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except Exception as error:  # of one of several types, by what is wrong
            first_line = str(error).splitlines()[0]
            raise ConfigError(
                f'config.compiler_options.{name}={value!r} is not taken by XLA on '
                f'{jax.default_backend()}: {first_line}; leave it out'
            ) from error


def assemble(config: ConfigDict, data: Any, mesh: Any) -> Built:
    """What `build` builds of a checked config.

    Args:
        config: of the run; what only the data know is filled in (`resolve`).
        data: the data object of docs/architecture.md.
        mesh: its devices need not be here (planning compiles for machines that are elsewhere).

    Raises:
        ConfigError: the data lack a stream, or the objective cannot be cut into microbatches.
    """
    resolve(config, data)
    frozen_base.check(config)
    model = models.build(config.model, config.compute_dtype, frozen=bool(config.base))
    objective = objectives.build(config.objective)
    train_state.check_evaluated(config.evaluated, objective)
    objective.frozen = frozen_models.build(config, objective)

    example = _first_batch(data, objective)
    batch = _with_rows(example, config.batch_size)
    # Where a record is in the whole training set (`TrainBatches.next`).
    batch['record'] = jax.ShapeDtypeStruct((config.batch_size,), np.int32)
    columns = {}
    for name, entry in objective.columns().items():
        columns[name] = jax.ShapeDtypeStruct((config.batch_size, *entry.shape), entry.dtype)
    if columns:
        # Objectives with refreshes: joined to each batch by record (`TrainBatches.next`).
        batch['columns'] = columns

    # With plain accumulation each loss sees one microbatch; otherwise all of the batch.
    rows = config.batch_size
    if config.accumulation == 'plain':
        rows = config.batch_size // config.accumulate
    inputs = _abstract_inputs(config, _with_rows(example, rows), rows)
    _check_streams(objective, inputs)

    # Objectives with labels size their classifiers by the number of classes.
    labels = {name: len(classes) for name, classes in data.info.get('labels', {}).items()}
    spec = train_state.abstract(
        model,
        inputs,
        data.size('train'),
        labels,
        _towerless(objective),
        bool(objective.map_streams()),
    )
    spec = dataclasses.replace(spec, info=data.info)
    train_step.check(config, model, objective, spec.batch_stats)
    tables = {}
    for name, row in objective.tables(spec).items():
        tables[name] = jax.ShapeDtypeStruct((spec.size, *row.shape), row.dtype)
    if tables:
        batch['tables'] = _abstract_rows(objective, batch, tables)
    init, shape, shardings, tx = train_state.create(config, model, objective, spec, mesh)
    # The old state's memory is the new one's: two of them would not fit beside the activations.
    # Rows of the batch are split over both data axes. Metrics come back replicated: each process
    # can then read them without a collective of its own.
    step = jax.jit(
        train_step.make(config, model, objective, tx),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=dict(config.compiler_options) or None,
    )
    return Built(
        mesh=mesh,
        model=model,
        objective=objective,
        tx=tx,
        init=init,
        step=step,
        shape=shape,
        shardings=shardings,
        batch=batch,
        inputs=inputs,
        outputs=spec.outputs,
        info=data.info,
        tables=tables,
    )


def _first_batch(data: Any, objective: Objective) -> dict[str, Any]:
    """A host batch of the training data with the objective's streams: one example a process."""
    process_id, num_processes = process_position()
    # Shapes and dtypes are read off a real example, so that they are stated in one place only:
    # where the data are read. A pass deals each batch out over the processes, hence one row for
    # each.
    batches = data.one_pass(
        'train', num_processes, process=(process_id, num_processes), by='records', limit=1
    )
    return select_streams(next(iter(batches)), objective.streams())


def _abstract_rows(
    objective: Objective, batch: dict[str, Any], tables: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The rows of tables that a batch is joined with (`HostTables.place`): name -> [B K …]."""

    def lookups(batch: dict[str, Any]) -> jax.Array:
        return objective.lookups(batch, Rng.create(0, 0, batch['position']), np.int32(2))

    num_clips, num_rows = jax.eval_shape(lookups, batch).shape
    rows = {}
    for name, table in tables.items():
        rows[name] = jax.ShapeDtypeStruct((num_clips, num_rows, *table.shape[1:]), table.dtype)
    return rows


def _check_streams(objective: Objective, batch: dict[str, Any]) -> None:
    """Checks that a batch after the device stage has all streams of the objective."""
    missing = sorted(set(objective.streams() or ()) - set(batch))
    if missing:
        streams = 'streams' if len(missing) > 1 else 'stream'
        raise ConfigError(
            f'config.objective: expected the {streams} {", ".join(map(repr, missing))}, '
            f'the data has {", ".join(stream_names(batch))} (more views: config.data.views; '
            'mirrored ones: config.augment.mirrored)'
        )


def process_position() -> tuple[int, int]:
    """(index of this process, number of processes), as the data object takes it."""
    return jax.process_index(), jax.process_count()


def _with_rows(batch: dict[str, Any], rows: int) -> dict[str, Any]:
    """The abstract device batch of `rows` examples such as those of a host batch."""

    def abstract(array: Any) -> jax.ShapeDtypeStruct:
        # The first axis is replaced: a host batch has the rows of one process, a device batch all.
        return jax.ShapeDtypeStruct((rows, *np.shape(array)[1:]), np.asarray(array).dtype)

    return jax.tree.map(abstract, device_part(batch))


def _abstract_inputs(config: ConfigDict, batch: dict[str, Any], rows: int) -> dict[str, Any]:
    """What the device stage makes of an abstract device batch."""

    # Traced rather than computed by hand: crops, spectrograms and dtypes are known to the stage
    # alone. Augmentation changes no shape.
    def device_stage(batch: dict[str, Any], rng: Rng) -> dict[str, Any]:
        batch = preprocess.device_stage(
            batch,
            config.model.inputs,
            config.augment,
            rng,
            augment=False,
            dtype=config.compute_dtype,
        )
        return mirrored.add(batch, config.augment)

    # An Rng is a pytree of arrays, so it can be abstract as well.
    rng = jax.eval_shape(lambda: Rng.create(0, 0, jnp.zeros((rows,), jnp.uint32)))
    return jax.eval_shape(device_stage, batch, rng)
