"""Several objectives at once: a weighted sum of their losses, over one set of towers.

ELo (Piergiovanni, Angelova and Ryoo 2020) sums self-supervised tasks of each modality and
distillation between modalities, and searches the weights: `python -m vatt_jax.evolve`. Tasks are
objectives of this project, by names of one's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vatt_jax.config import ConfigError, check_range, with_defaults
from vatt_jax.objectives.base import (
    Encoding,
    Loss,
    Objective,
    RefreshResult,
    Spec,
    TrainingRecords,
    select_streams,
)
from vatt_jax.objectives.forward import run_towers, stage_of
from vatt_jax.rng import Rng

DEFAULTS: dict[str, Any] = {
    'name': 'multi_task',
    # Name of each task -> its objective: its name and fields, as in config.objective.
    'tasks': {},
    # Name of a task -> its weight. Without an entry: 1. 0: the task is left out, with its streams.
    'weights': {},
}
TASKS, WEIGHTS = 'config.objective.tasks', 'config.objective.weights'
EXAMPLE = "{'order': {'name': 'temporal_order', 'stream': 'video'}}"


class MultiTask(Objective):
    """The sum over tasks of weight times loss.

    Tasks that take the towers' features as they are share one pass through them; one that encodes
    in a way of its own (changed clips, a teacher) adds its own. Parameters, state and writes are
    trees by the names of tasks, as are metrics. Columns, predictions and spaces keep the names that
    the task gives them.
    """

    def __init__(self, config: Any, build: Callable[[Any], Objective]) -> None:
        """Builds the tasks.

        Args:
          config: `config.objective`.
          build: makes an objective of its config (`objectives.build`).
        """
        config = with_defaults(ConfigDict(config), DEFAULTS, 'config.objective')
        every_task = _build_tasks(config.tasks, build)
        weights = _read_weights(config.weights, every_task)
        complete = {name: task.config for name, task in every_task.items()}
        super().__init__(ConfigDict({'name': config.name, 'tasks': complete, 'weights': weights}))
        # In the order of their names, so that sums do not depend on how a config is stored.
        self.weights = {name: weights[name] for name in sorted(weights) if weights[name] > 0}
        self.tasks = {name: every_task[name] for name in self.weights}
        _check(self.tasks)
        # Those that share a pass through the towers.
        self.sharing = [name for name, task in self.tasks.items() if _takes_plain_features(task)]
        refreshing = [name for name, task in self.tasks.items() if _refreshes(task)]
        self.refreshing = refreshing[0] if refreshing else ''

    def streams(self) -> tuple[str, ...] | None:
        return _union_of_streams(self.tasks.values())

    def tower_stages(self) -> tuple[tuple[str, int], ...]:
        """Those of the tasks that share a pass, each once."""
        stages = [stage for name in self.sharing for stage in self.tasks[name].tower_stages()]
        return tuple(dict.fromkeys(stages))

    def init(self, key: jax.Array, spec: Spec) -> tuple[Any, Any]:
        params, state = {}, {}
        for name, task in self.tasks.items():
            # By name: what a task begins with does not depend on which others there are.
            own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            with _fields_of(name):
                if task.tables(spec):
                    raise ConfigError(
                        "config.objective.memory: expected 'device' for one of several tasks, got "
                        "'host'"
                    )
                params[name], state[name] = task.init(own_key, spec)
        return params, state

    def begin(self, model_params: Any, batch_stats: Any, state: Any) -> Any:
        begun = {}
        for name, task in self.tasks.items():
            begun[name] = task.begin(model_params, batch_stats, state[name])
        return begun

    def encode(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Encoding:
        pooled: dict[str, jax.Array] = {}
        batch_stats = variables['batch_stats']
        if self.sharing:
            shared = _union_of_streams(self.tasks[name] for name in self.sharing)
            streams = select_streams(batch, shared)
            stages = self.tower_stages()
            pooled, batch_stats = run_towers(model, variables, streams, rng, stages=stages)

        new_state = dict(state)
        for name, task in self.tasks.items():
            if name in self.sharing:
                continue
            variables = {**variables, 'batch_stats': batch_stats}
            own = select_streams(batch, task.streams())
            encoding = task.encode(model, variables, params[name], state[name], own, rng.at(name))
            for key, features in encoding.pooled.items():
                pooled[_own_pass(name, key)] = features
            batch_stats, new_state[name] = encoding.batch_stats, encoding.state
        return Encoding(pooled, batch_stats, new_state)

    def compute_loss(
        self,
        model: Any,
        variables: Any,
        params: Any,
        state: Any,
        pooled: Mapping[str, Any],
        batch: Mapping[str, Any],
        rng: Rng,
    ) -> Loss:
        total = jnp.zeros((), jnp.float32)
        metrics, new_state, writes = {}, {}, {}
        apply_update: Any = True
        for name, task in self.tasks.items():
            own = self._features_of(name, pooled)
            loss = task.compute_loss(
                model, variables, params[name], state[name], own, batch, rng.at(name)
            )
            # Common spaces normalise in turn: each task goes on from the statistics of the last.
            variables = {**variables, 'batch_stats': loss.batch_stats}
            total = total + self.weights[name] * loss.value
            metrics[f'{name}/loss'] = loss.value
            for metric, value in loss.metrics.items():
                metrics[f'{name}/{metric}'] = value
            new_state[name], writes[name] = loss.state, loss.writes
            # Parameters stay until every task's memory is filled.
            apply_update = jnp.logical_and(apply_update, loss.apply_update)
        return Loss(total, metrics, variables['batch_stats'], new_state, apply_update, writes)

    def _features_of(self, name: str, pooled: Mapping[str, Any]) -> dict[str, Any]:
        """A task's own features, by the names that it gives them."""
        if name not in self.sharing:
            prefix = _own_pass(name, '')
            own = {key: x for key, x in pooled.items() if key.startswith(prefix)}
            return {key.removeprefix(prefix): x for key, x in own.items()}
        streams = self.tasks[name].streams()
        if streams is None:
            return {key: x for key, x in pooled.items() if '/' not in key}
        stages = [stage_of(*stage) for stage in self.tasks[name].tower_stages()]
        return {key: pooled[key] for key in (*streams, *stages)}

    def predict(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, jax.Array]:
        found = {}
        for name, task in self.tasks.items():
            found[name] = task.predict(params[name], state[name], encoded)
        return _join(found, 'predictions')

    def with_model(self, params: Any, model_params: Any) -> Any:
        completed = {}
        for name, task in self.tasks.items():
            completed[name] = task.with_model(params[name], model_params)
        return {**params, **completed}

    def map_streams(self) -> tuple[str, ...]:
        names = [stream for task in self.tasks.values() for stream in task.map_streams()]
        return tuple(dict.fromkeys(names))

    def heat_maps(self, params: Any, state: Any, encoded: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, task in self.tasks.items():
            found[name] = task.heat_maps(params[name], state[name], encoded)
        return _join(found, 'heat maps')

    def embed(
        self, params: Any, state: Any, encoded: Mapping[str, Any]
    ) -> dict[str, dict[str, jax.Array]]:
        found = {}
        for name, task in self.tasks.items():
            found[name] = task.embed(params[name], state[name], encoded)
        return _join(found, 'spaces')

    def running_losses(self, state: Any) -> dict[str, float]:
        found = {}
        for name, task in self.tasks.items():
            found[name] = task.running_losses(state[name])
        return _join(found, 'predictions')

    def after_update(
        self, model_params: Any, params: Any, state: Any, step: Any
    ) -> tuple[Any, Any, Any]:
        new_params, new_state = {}, {}
        for name, task in self.tasks.items():
            model_params, new_params[name], new_state[name] = task.after_update(
                model_params, params[name], state[name], step
            )
        return model_params, new_params, new_state

    def write_memory(self, state: Any, writes: Any, is_finite: jax.Array) -> Any:
        written = {}
        for name, task in self.tasks.items():
            written[name] = task.write_memory(state[name], writes[name], is_finite)
        return written

    def columns(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.tasks[self.refreshing].columns() if self.refreshing else {}

    def refresh_due(self, step: int, steps: int) -> bool:
        if not self.refreshing:
            return False
        return self.tasks[self.refreshing].refresh_due(step, steps)

    def refresh(
        self, variables: Any, params: Any, state: Any, step: int, records: TrainingRecords
    ) -> RefreshResult:
        """The refresh of the one task that has one."""
        name = self.refreshing

        def encode(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
            return records.encode(_FunctionOfTask(name, function), **options)

        result = self.tasks[name].refresh(
            variables,
            params[name],
            state[name],
            step,
            dataclasses.replace(records, encode=encode),
        )
        return dataclasses.replace(
            result,
            params={**params, name: result.params},
            state={**state, name: result.state},
            fresh_slots=tuple(_below(name, pattern) for pattern in result.fresh_slots),
        )


# A value with an equality: compiled passes over the records are kept by their function.
@dataclasses.dataclass(frozen=True)
class _FunctionOfTask:
    """A function of a refresh, given the parameters of its task out of those of all."""

    task: str
    function: Callable[..., Any]

    def __call__(self, model: Any, variables: Any, params: Any, batch: Any, rng: Any) -> Any:
        return self.function(model, variables, params[self.task], batch, rng)


def _own_pass(task: str, key: str) -> str:
    """The name among all pooled features of one that a task made by a pass of its own."""
    # Names of streams have no slash.
    return f'{task}/{key}'


def _below(task: str, pattern: str) -> str:
    """A regular expression for paths in a task's tree, as one for paths in the tree of all."""
    if pattern.startswith('^'):
        return f'^{task}/{pattern[1:]}'
    return f'^{task}/.*(?:{pattern})'


def _union_of_streams(tasks: Any) -> tuple[str, ...] | None:
    """The streams of all tasks, each once; None where one takes all of the batch."""
    names: dict[str, None] = {}
    for task in tasks:
        streams = task.streams()
        if streams is None:
            return None
        names.update(dict.fromkeys(streams))
    return tuple(names)


def _takes_plain_features(task: Objective) -> bool:
    return type(task).encode is Objective.encode


def _refreshes(task: Objective) -> bool:
    return type(task).refresh is not Objective.refresh


def _join(parts: Mapping[str, Mapping[str, Any]], what: str) -> dict[str, Any]:
    """What all tasks return, by the names that they give it.

    Raises:
      ConfigError: two of them give the same name.
    """
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for task, part in parts.items():
        for name, value in part.items():
            if name in found:
                raise ConfigError(
                    f'{TASKS}: expected {what} of different names, got {name!r} from both '
                    f'{owners[name]!r} and {task!r}.'
                )
            found[name], owners[name] = value, task
    return found


@contextlib.contextmanager
def _fields_of(task: str) -> Iterator[None]:
    """Messages about a task's fields name them by where they stand in the config."""
    try:
        yield
    except ConfigError as error:
        text = str(error).replace('config.objective.', f'{TASKS}.{task}.')
        raise ConfigError(text) from error


def _build_tasks(
    configs: Mapping[str, Any], build: Callable[[Any], Objective]
) -> dict[str, Objective]:
    """Name -> objective."""
    tasks = {}
    for name, fields in configs.items():
        # Names become parts of paths and of metrics.
        if not name.isidentifier():
            raise ConfigError(
                f'{TASKS}: expected names of letters, digits and _, such as {EXAMPLE}, got {name!r}'
            )
        if not isinstance(fields, ConfigDict) or 'name' not in fields:
            raise ConfigError(
                f'{TASKS}.{name}: expected an objective with its name, as in {EXAMPLE}, got '
                f'{fields!r}'
            )
        with _fields_of(name):
            tasks[name] = build(fields)
    return tasks


def _read_weights(given: Mapping[str, Any], tasks: Mapping[str, Objective]) -> dict[str, float]:
    """Name of each task -> its weight, 1 where none is given."""
    for name in given:
        if name not in tasks:
            raise ConfigError(
                f'{WEIGHTS}.{name}: expected names of {TASKS} ({", ".join(tasks) or "none"}), got '
                f'{name!r}.'
            )
    weights = {}
    for name in tasks:
        weight = given.get(name, 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f'{WEIGHTS}.{name}: expected a number, got {weight!r}.')
        check_range(weight, 0, math.inf, f'{WEIGHTS}.{name}')
        weights[name] = float(weight)
    return weights


def _check(tasks: Mapping[str, Objective]) -> None:
    """Raise ConfigError for tasks that cannot be part of a sum."""
    if not tasks:
        raise ConfigError(
            f'{TASKS}: expected at least one task with a weight above 0, such as {EXAMPLE}, got '
            'none.'
        )
    for name, task in tasks.items():
        where = f'{TASKS}.{name} ({task.config.name})'
        if task.mixes_examples:
            raise ConfigError(
                f'{where}: it mixes the clips of the batch, which other tasks read as they are; '
                'turn that off (mixup=0) or train it by itself'
            )
        if task.frozen_models():
            raise ConfigError(
                f'{where}: it reads the model of another run ({", ".join(task.frozen_models())}), '
                'which is found for config.objective alone; train it by itself'
            )
        if task.own_streams():
            raise ConfigError(
                f'{where}: it reads {", ".join(task.own_streams())} without the model, which other '
                'tasks do not; train it by itself'
            )
        if type(task).loss is not Objective.loss:
            raise ConfigError(
                f'{where}: it overrides loss(), which would not be called, only encode() and '
                'compute_loss(); train it by itself'
            )
    refreshing = [name for name, task in tasks.items() if _refreshes(task)]
    if len(refreshing) > 1:
        raise ConfigError(
            f'{TASKS}: expected at most one task that goes over all records (columns), got '
            f'{", ".join(refreshing)}; give all but one the weight 0'
        )
