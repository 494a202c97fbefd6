"""Refreshes on features that are given, of all records or of the records of one process."""

import types

import jax
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from vatt_jax import objectives
from vatt_jax.clustering import sinkhorn
from vatt_jax.objectives import TrainingRecords, self_labelling
from vatt_jax.parallel import sharding

NUM_RECORDS = 601
WIDTHS = {'video': 7, 'audio': 4}
# So that the records that alignment compares are those of both processes, and not all of them.
NUM_PAIRED = 230


def encoded_records() -> dict[str, np.ndarray]:
    """What a pass returns: a third has no sound, two have nothing; few of the last 60 were read."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 5, NUM_RECORDS)
    records = {'index': np.arange(NUM_RECORDS)}
    for view, width in WIDTHS.items():
        centres = np.eye(5)[group] @ rng.standard_normal((5, width)) * 2
        noise = rng.standard_normal((NUM_RECORDS, width))
        records[view] = (centres + noise).astype(np.float32)
        records[f'{view}/valid'] = np.ones(NUM_RECORDS, bool)
    records['audio/valid'][::3] = False
    for view in WIDTHS:
        records[f'{view}/valid'][[6, 307]] = False
    is_read = (np.arange(NUM_RECORDS) < 540) | (np.arange(NUM_RECORDS) % 7 == 0)
    return {name: values[is_read] for name, values in records.items()}


def records_of(part: slice, columns: dict[str, np.ndarray]) -> TrainingRecords:
    """The training set as the process with these records sees it."""
    encoded = encoded_records()
    is_own = (encoded['index'] >= part.start) & (encoded['index'] < part.stop)
    own = {name: values[is_own] for name, values in encoded.items()}
    own['index'] = own['index'] - part.start
    return TrainingRecords(part.stop - part.start, columns, lambda fn, augment=True, draw=0: own)


def objective_of(**fields):
    """(objective, params, state) as `init` makes them, on the host."""
    objective = objectives.build(ConfigDict({'views': tuple(WIDTHS), **fields}))
    encoded = {}
    for view, width in WIDTHS.items():
        pooled = jax.ShapeDtypeStruct((2, width), 'float32')
        encoded[view] = types.SimpleNamespace(pooled=pooled)
    output = types.SimpleNamespace(encoded=encoded)
    spec = objectives.Spec(None, output, None, NUM_RECORDS, {})

    @jax.jit
    def init(key):
        return meta.unbox(objective.init(key, spec))

    return objective, *jax.tree.map(np.array, init(jax.random.key(3)))


def refreshed(part: slice, fields: dict, again: bool = False) -> dict[str, np.ndarray]:
    """Columns and metrics of a refresh; `again`: of the one after it, with other features."""
    objective, params, state = objective_of(**fields)
    result = objective.refresh(None, params, state, 0, records_of(part, {}))
    if again:
        for layer in result.params['video'].values():
            layer['kernel'] = layer['kernel'] * 1.2
        records = records_of(part, result.columns)
        result = objective.refresh(None, result.params, result.state, 5, records)
    found = {f'column/{name}': column for name, column in result.columns.items()}
    for name, value in result.metrics.items():
        found[f'metric/{name}'] = np.float64(value)
    return found


def blocks_of_logits(part: slice) -> list[list[np.ndarray]]:
    """Logits of two views in blocks of rows, as the solver takes them."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((2, NUM_RECORDS, 6)) * 3 + 40
    blocks = []
    for view in logits.astype(np.float32):
        own = view[part]
        blocks.append([own[:100], own[100:]])
    return blocks


def solved(part: slice, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """Labels of logits in blocks and as arrays, and shares."""
    blocks = blocks_of_logits(part)
    whole = [np.concatenate(view) for view in blocks]
    prior = np.arange(1, 7) / 21
    found = {}
    for name, views in (('blocks', blocks), ('arrays', whole)):
        solution = sinkhorn.solve(views, prior, 15, mesh=mesh, tolerance=1e-6)
        found[f'column/{name}'] = solution.labels
        found[f'metric/{name}/cost'] = np.float64(solution.cost)
    found['metric/shares'] = sinkhorn.shares(whole, 15, mesh=mesh)
    return found


def message_of_nan(part: slice, mesh: jax.sharding.Mesh) -> str:
    """What the solver says where one of the last records is not a number."""
    views = [np.concatenate(view) for view in blocks_of_logits(part)]
    if part.stop == NUM_RECORDS:
        views[1][-2] = np.nan
    try:
        sinkhorn.solve(views, np.full(6, 1 / 6), 15, mesh=mesh)
    except ValueError as error:
        return str(error)
    return ''


SELF_LABELLING = {
    'name': 'self_labelling',
    'clusters': 5,
    'heads': 2,
    'groups': 2,
    'hidden': 6,
    'prior': 'zipf',
    'spread': 0.5,
    'tolerance': 1e-6,
}
PUBLISHED = {
    'name': 'self_labelling',
    'clusters': 5,
    'prior': 'gaussian',
    'published_prior': True,
}
CASES = {
    'second': (SELF_LABELLING, True),
    'published': ({**PUBLISHED, 'tolerance': 1e-6}, False),
    'kmeans': ({'name': 'kmeans_labels', 'clusters': 7, 'targets': 'both'}, False),
}


def run(part: slice) -> dict[str, np.ndarray]:
    """All cases on all devices, of the records `part` of this process.

    Returns:
        'CASE/column/NAME': [m …], 'CASE/metric/NAME': numbers, and 'message'.
    """
    self_labelling.PAIRED = NUM_PAIRED
    mesh = sharding.make_mesh({'replica': -1})
    found = {}
    with jax.set_mesh(mesh):
        for case, (fields, again) in CASES.items():
            for name, value in refreshed(part, fields, again).items():
                found[f'{name}/{case}'] = value
        found |= solved(part, mesh)
        found['message'] = np.array(message_of_nan(part, mesh))
    return found
