"""Mesh axes, logical axis names and the rules that join them.

Model code names *logical* axes; only this file knows mesh axes. An unknown name is an error, never silently unsharded
(Flax's own constraint helpers do nothing in that case).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ('replica', 'fsdp', 'model', 'seq')

# logical axis -> mesh axes, tried in order; a mesh axis is used once per array.
RULES: dict[str, tuple[str, ...] | None] = {
    'batch': ('replica', 'fsdp'),
    'embed': ('fsdp',),  # model width: the axis that FSDP splits
    'mlp': ('model',),
    'heads': ('model',),
    'kv': None,  # width of one head
    'length': ('seq',),  # tokens of activations
    'layers': None,  # stacked transformer layers
    'patch': None,  # pixels or samples of one patch
    'buckets': None,  # rows of positional and relative-position tables
    'vocab': None,  # rows of the word table
    'word': None,  # width of the word table
    'joint': None,  # width of a common space
    'hidden': ('fsdp',),  # hidden width of a head
    'classes': None,  # classes or clusters of a classifier
    'memory': ('replica', 'fsdp'),  # rows of a per-record table
}


class ShardingError(ValueError):
    pass


def logical(init, *names: str | None):
    """An initialiser whose result carries logical axis names (Flax boxes)."""
    _check(names)
    return nn.with_logical_partitioning(init, names)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin an activation's sharding by logical names when a mesh is set. Dimensions that do not divide stay free; tokens need not, for with an
    aggregate token they seldom do (785, 601, 17), and XLA pads them inside a program."""
    _check(names)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or mesh.size == 1:
        return x
    parts = math.prod(mesh.shape.get(axis, 1) for axis in RULES['length'])
    padded = [
        math.ceil(n / parts) * parts if name == 'length' and n >= parts else n
        for name, n in zip(names, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, mesh_spec(names, dict(mesh.shape), padded))


def as_rows(x: jax.Array) -> jax.Array:
    """[B N …] -> [B·N …], for a product with one matrix: its derivative then sums over one axis, which XLA on CPU does without transposing (and
    recomputing, element by element) what it sums over. As it is where the mesh splits N: rows of the flat array would have to move."""
    mesh = jax.sharding.get_abstract_mesh()
    if (
        x.ndim < 3
        or not mesh.empty
        and any(mesh.shape.get(axis, 1) > 1 for axis in RULES['length'])
    ):
        return x
    return x.reshape(-1, *x.shape[2:])


def _check(names: Sequence[str | None]) -> None:
    for name in names:
        if name is not None and name not in RULES:
            raise ShardingError(
                f'logical axis {name!r} has no rule in vatt_jax/parallel/sharding.py; known: {", ".join(RULES)}'
            )


def mesh_spec(names: Sequence[str | None], sizes: Mapping[str, int], shape: Sequence[int]) -> P:
    """PartitionSpec of an array with these logical names and shape. A dimension that its mesh axes do not divide is
    left unsharded: jit refuses uneven shardings at its boundary."""
    used: set[str] = set()
    out: list[Any] = []
    for name, dim in zip(names, shape, strict=True):
        axes = (
            tuple(a for a in (RULES[name] or ()) if name and sizes.get(a, 1) > 1 and a not in used)
            if name
            else ()
        )
        size = 1
        for a in axes:
            size *= sizes[a]
        if size == 1 or dim % size:
            out.append(None)
            continue
        used.update(axes)
        out.append(axes if len(axes) > 1 else axes[0])
    return P(*out)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all) with axes MESH_AXES. One size may be -1: whatever is left.

    A mesh smaller than the machine takes its first devices. On several TPU slices only `replica` crosses from one to another: what it moves once a
    step goes over the network, everything else stays on the links of a slice. Raises ShardingError when axes are unknown or the mesh is too large.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    devices, types = devices[: math.prod(shape)], (AxisType.Auto,) * len(MESH_AXES)
    slices = (
        len({getattr(d, 'slice_index', 0) for d in devices}) if devices[0].platform == 'tpu' else 1
    )
    if slices == 1:
        return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=types)
    if shape[0] % slices:
        raise ShardingError(
            f'config.mesh.replica={shape[0]} does not divide over the {slices} slices of this machine; a multiple of {slices} would'
        )
    from jax.experimental import mesh_utils

    array = mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1), devices
    )
    return Mesh(array, MESH_AXES, axis_types=types)


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """The mesh's shape in the order of MESH_AXES, with -1 filled in."""
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise ShardingError(
            f'config.mesh has unknown axis {sorted(unknown)[0]!r}; axes are {", ".join(MESH_AXES)}'
        )
    shape = [int(sizes.get(a, 1)) for a in MESH_AXES]
    text = ', '.join(f'{a}={s}' for a, s in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(s == 0 or s < -1 for s in shape):
        raise ShardingError(
            f'config.mesh ({text}): sizes are positive, and at most one is -1 (all that is left)'
        )
    fixed = 1
    for s in shape:
        fixed *= s if s > 0 else 1
    if -1 in shape:
        if devices % fixed:
            raise ShardingError(
                f'config.mesh ({text}): {fixed} does not divide the {devices} devices of this machine'
            )
        shape[shape.index(-1)] = devices // fixed
    elif fixed > devices:
        raise ShardingError(
            f'config.mesh ({text}) needs {fixed} devices and there are {devices}; use fewer, or set one axis to -1'
        )
    elif fixed < devices and jax.process_count() > 1:
        raise ShardingError(
            f'config.mesh ({text}) leaves {devices - fixed} of {devices} devices idle, and every process must '
            'own a part of the mesh; set config.mesh.replica=-1'
        )
    return tuple(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every data axis."""
    return NamedSharding(mesh, P(('replica', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Sharding of every leaf of an abstract tree whose leaves may be boxed with logical names."""

    def leaf(x: Any) -> NamedSharding:
        if isinstance(x, nn.Partitioned):  # LogicallyPartitioned too
            names = tuple(x.names)
            _check(names)
            return NamedSharding(mesh, mesh_spec(names, dict(mesh.shape), x.value.shape))
        return replicated(mesh)

    return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
