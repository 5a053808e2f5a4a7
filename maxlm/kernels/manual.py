"""From global arrays to each device's share: the one place where kernels enter `shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def on_each_device(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f` on every device's share of its arguments, manual over the whole current mesh; `f` itself where there is none."""
    if jax.sharding.get_abstract_mesh().empty:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs)


def bring(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Moves an array to a sharding of the current mesh, if it is not there and there is a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, spec)


def platform() -> str:
    """`cpu`, `gpu` (as `cuda` or `rocm`) or `tpu`: of the current mesh's devices, which need not be the host's own.

    Only where there is no mesh is it the default backend's: then the computation runs there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def size_of(axes: tuple[str, ...]) -> int:
    """The product of the sizes of some mesh axes; 1 where there is no mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    size = 1
    for axis in axes:
        size *= shape.get(axis, 1)
    return size
