"""From global arrays to each device's share: where kernels enter `shard_map`, and the collectives that they use inside.

Without a current mesh everything here does nothing, and a kernel computes on the one device where its arrays lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

Axes = tuple[str, ...]


def has_mesh() -> bool:
    """Whether there is a current mesh."""
    return not jax.sharding.get_abstract_mesh().empty


def on_each_device(f: Callable[..., Any], in_specs: Any, out_specs: Any, *, checked: bool = True) -> Callable[..., Any]:
    """`f` on every device's share of its arguments, manual over all axes of the current mesh that are not yet.

    On a mesh of one device nothing varies and no collective below does anything, so there is nothing to check.
    `checked=False` is for code that does not say what varies, such as the Pallas kernels of a library.
    """
    if not has_mesh():
        return f
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        f,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=checked and n_devices() > 1,
    )


def bring(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Moves an array to a sharding of the current mesh, if it does not have it yet."""
    return jax.sharding.reshard(x, spec) if has_mesh() else x


def axes_of(x: jax.Array, dimension: int) -> Axes:
    """The mesh axes over which a dimension of a global array is sharded."""
    if not has_mesh():
        return ()
    spec = jax.typeof(x).sharding.spec
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def n_devices() -> int:
    """Devices of the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().size if has_mesh() else 1


def platform() -> str:
    """`cpu`, `tpu`, `cuda` or `rocm`: of the current mesh's devices, which need not be this host's.

    The default backend's only where there is no mesh: then that is where the computation runs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def count(axes: Axes) -> int:
    """How many shards some mesh axes make; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    shards = 1
    for axis in axes:
        shards *= shape.get(axis, 1)
    return shards


def index(axes: Axes) -> jax.Array | int:
    """Inside: this device's place along some mesh axes."""
    return jax.lax.axis_index(axes) if count(axes) > 1 else 0


def total(x: Any, axes: Axes) -> Any:
    """Inside: the sum over some mesh axes, of every array of a pytree."""
    return jax.lax.psum(x, axes) if axes and n_devices() > 1 else x


def largest(x: jax.Array, axes: Axes) -> jax.Array:
    """Inside: the element-wise maximum over some mesh axes."""
    return jax.lax.pmax(x, axes) if axes and n_devices() > 1 else x


def gathered(x: jax.Array, axes: Axes, dimension: int) -> jax.Array:
    """Inside: the pieces along some mesh axes, put together along a dimension."""
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True) if count(axes) > 1 else x


def scattered_total(x: jax.Array, axes: Axes, dimension: int) -> jax.Array:
    """Inside: this device's piece, along a dimension, of the sum over some mesh axes (a reduce-scatter)."""
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True) if count(axes) > 1 else x


def exchanged(x: jax.Array, axes: Axes, *, split: int, join: int) -> jax.Array:
    """Inside: pieces of one dimension sent to the devices along some mesh axes, those received joined on another."""
    return jax.lax.all_to_all(x, axes, split, join, tiled=True) if count(axes) > 1 else x


def passed_on(x: Any, axes: Axes, by: int) -> Any:
    """Inside: every array of a pytree as the device has it that lies `by` places before, round and round the axes."""
    n = count(axes)
    if by % n == 0:
        return x
    route = [(place, (place + by) % n) for place in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, route), x)


def zeros(shape: tuple[int, ...], dtype: Any, *like: jax.Array) -> jax.Array:
    """Inside: zeros that vary over the mesh axes that any of `like` varies over, as the carry of a scan has to."""
    witness = sum(x.ravel()[0].astype(dtype) for x in like)
    return jax.lax.full_like(jax.numpy.asarray(witness), 0, dtype=dtype, shape=shape)


def axes_varied(x: jax.Array) -> Axes:
    """Inside: the mesh axes over which an array varies."""
    return tuple(sorted(jax.typeof(x).manual_axis_type.varying))


def alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Inside: the arrays, each made to vary over the mesh axes that any of them varies over."""
    everywhere = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    return tuple(varying(x, tuple(sorted(everywhere))) for x in arrays)


def varying(x: jax.Array, axes: Axes) -> jax.Array:
    """Inside: an array that varies over some mesh axes, besides those that it varies over already."""
    if n_devices() == 1:
        return x
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x
