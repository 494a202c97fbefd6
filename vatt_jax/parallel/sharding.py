"""Mesh axes, logical axis names and the rules that join them.

Model code names *logical* axes; only this file knows mesh axes. An unknown name is an error, never
silently unsharded (Flax's own constraint helpers do nothing in that case).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

# Outermost first: neighbours on the last axes are neighbours in the machine. replica: copies of the
# parameters. fsdp: they are split, and rows of the batch with them. model: tensor parallelism. seq:
# tokens.
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


# Mesh axes over which tokens are split.
LENGTH_AXES = RULES['length'] or ()

Initializer = Callable[..., Any]
# Mesh axis -> devices along it, as `config.mesh` has them.
AxisSizes: TypeAlias = Mapping[str, int] | ConfigDict


class ShardingError(ValueError):
    """A mesh or a logical axis name that cannot be."""


def logical(init: Initializer, *names: str | None) -> Initializer:
    """Return an initialiser whose result carries logical axis names (Flax boxes).

    Args:
        init: Flax initialiser.
        *names: Logical name of each dimension, None for one that is never sharded.

    Raises:
        ShardingError: A name has no rule.
    """
    _check_names(names)
    return nn.with_logical_partitioning(init, names)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin an activation's sharding by logical names, where a mesh is set.

    Dimensions that do not divide stay free. Tokens need not divide, for with an aggregate token
    they seldom do (785, 601, 17), and XLA pads them inside a program.

    Args:
        x: The activation.
        *names: Logical name of each dimension, None for one that is never sharded.

    Raises:
        ShardingError: A name has no rule, also where no mesh is set.
    """
    _check_names(names)
    mesh = jax.sharding.get_abstract_mesh()
    # Outside of a mesh, as in tests and in inference on one device, there is nothing to pin.
    if mesh is None or mesh.empty or mesh.size == 1:
        return x
    parts = math.prod(mesh.shape.get(axis, 1) for axis in LENGTH_AXES)
    padded_shape = []
    for name, size in zip(names, x.shape, strict=True):
        # As if padded: mesh_spec leaves out what does not divide. Fewer tokens than devices stay
        # whole.
        if name == 'length' and size >= parts:
            size = math.ceil(size / parts) * parts
        padded_shape.append(size)
    spec = mesh_spec(names, dict(mesh.shape), padded_shape)
    return jax.lax.with_sharding_constraint(x, spec)


def as_rows(x: jax.Array) -> jax.Array:
    """Flatten [B N …] to [B·N …], for a product with one matrix.

    The product's derivative then sums over one axis, which XLA on CPU does without transposing (and
    recomputing, element by element) what it sums over. Where the mesh splits N, x stays as it is:
    rows of the flat array would have to move between devices.
    """
    if x.ndim < 3:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and any(mesh.shape.get(axis, 1) > 1 for axis in LENGTH_AXES):
        return x
    return x.reshape(-1, *x.shape[2:])


def _check_names(names: Sequence[str | None]) -> None:
    for name in names:
        if name is not None and name not in RULES:
            raise ShardingError(
                f'logical axis {name!r} has no rule in vatt_jax/parallel/sharding.py; known: '
                f'{", ".join(RULES)}'
            )


def mesh_spec(names: Sequence[str | None], sizes: Mapping[str, int], shape: Sequence[int]) -> P:
    """Return the PartitionSpec of an array.

    A dimension that its mesh axes do not divide is left unsharded: jit refuses uneven shardings at
    its boundary.

    Args:
        names: Logical name of each dimension, None for one that is never sharded.
        sizes: Mesh axis -> devices along it; axes not named have one.
        shape: The array's shape.
    """
    used: set[str] = set()
    dimensions: list[Any] = []
    for name, length in zip(names, shape, strict=True):
        candidates = RULES[name] if name else None
        # A mesh axis may occur once in a PartitionSpec: in a matrix [embed, hidden] the first one
        # gets fsdp.
        axes = tuple(
            axis for axis in candidates or () if sizes.get(axis, 1) > 1 and axis not in used
        )
        parts = math.prod(sizes[axis] for axis in axes)
        if parts == 1 or length % parts:
            dimensions.append(None)
            continue
        used.update(axes)
        dimensions.append(axes if len(axes) > 1 else axes[0])
    return P(*dimensions)


def make_mesh(sizes: AxisSizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with the axes MESH_AXES.

    A mesh smaller than the machine takes its first devices. On several TPU slices only `replica`
    crosses from one to another: what it moves once a step goes over the network, everything else
    stays on the links of a slice.

    Args:
        sizes: Mesh axis -> devices along it. One may be -1: whatever is left.
        devices: The devices to use, by default all.

    Raises:
        ShardingError: An axis is unknown, the mesh is too large, or it does not fit the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    devices = devices[: math.prod(shape)]
    # Auto: the compiler propagates shardings from the constraints, as opposed to Explicit, where
    # they are part of types.
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    num_slices = 1
    if devices[0].platform == 'tpu':
        num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if num_slices == 1:
        # Orders the devices by the machine's links, which a plain reshape of jax.devices() does
        # not.
        return jax.make_mesh(shape, MESH_AXES, devices=devices, axis_types=axis_types)
    if shape[0] % num_slices:
        raise ShardingError(
            f'config.mesh.replica={shape[0]} does not divide over the {num_slices} slices of this '
            f'machine; a multiple of {num_slices} would'
        )
    from jax.experimental import mesh_utils

    shape_within_slice = (shape[0] // num_slices, *shape[1:])
    device_array = mesh_utils.create_hybrid_device_mesh(
        shape_within_slice, (num_slices, 1, 1, 1), devices
    )
    return Mesh(device_array, MESH_AXES, axis_types=axis_types)


def mesh_shape(sizes: AxisSizes, devices: int) -> tuple[int, ...]:
    """Return the mesh's shape in the order of MESH_AXES, with -1 filled in.

    Args:
        sizes: Mesh axis -> devices along it. One may be -1: whatever is left.
        devices: How many devices there are.

    Raises:
        ShardingError: An axis is unknown, a size is impossible, or the sizes do not fit the
            devices.
    """
    unknown: set[str] = set(sizes) - set(MESH_AXES)
    if unknown:
        raise ShardingError(
            f'config.mesh has unknown axis {sorted(unknown)[0]!r}; axes are {", ".join(MESH_AXES)}'
        )
    shape = [int(sizes.get(axis, 1)) for axis in MESH_AXES]
    text = ', '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise ShardingError(
            f'config.mesh ({text}): sizes are positive, and at most one is -1 (all that is left)'
        )
    # The product of what is given, -1 left out.
    required = math.prod(size for size in shape if size > 0)
    if -1 in shape:
        if devices % required:
            raise ShardingError(
                f'config.mesh ({text}): {required} does not divide the {devices} devices of this '
                'machine'
            )
        shape[shape.index(-1)] = devices // required
    elif required > devices:
        raise ShardingError(
            f'config.mesh ({text}) needs {required} devices and there are {devices}; use fewer, or '
            'set one axis to -1'
        )
    elif required < devices and jax.process_count() > 1:
        raise ShardingError(
            f'config.mesh ({text}) leaves {devices - required} of {devices} devices idle, and '
            'every process must own a part of the mesh; set config.mesh.replica=-1'
        )
    return tuple(shape)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of a batch: rows over every data axis."""
    return NamedSharding(mesh, P(('replica', 'fsdp')))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def tree_shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the sharding of every leaf of an abstract tree.

    Args:
        boxed: Tree whose leaves may be boxed with logical names, see `logical`; others are
            replicated.
        mesh: The mesh.

    Raises:
        ShardingError: A name has no rule.
    """

    def is_boxed(leaf: Any) -> bool:
        return isinstance(leaf, nn.Partitioned)  # LogicallyPartitioned too

    def leaf_sharding(leaf: Any) -> NamedSharding:
        if not is_boxed(leaf):
            return replicated(mesh)
        names = tuple(leaf.names)
        _check_names(names)
        return NamedSharding(mesh, mesh_spec(names, dict(mesh.shape), leaf.value.shape))

    return jax.tree.map(leaf_sharding, boxed, is_leaf=is_boxed)
