"""The device mesh: six named axes, slowest network first, all of them explicit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from maxlm.errors import ClusterError, ConfigError
from maxlm.section import Section, key

if TYPE_CHECKING:
    import jax

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
SLICE_AXES = AXES[:3]
"""Those that may be spread over TPU slices, their collectives being few and large: the first that the slices divide."""


class MeshConfig(Section):
    """How many devices each kind of parallelism gets. The product is the number of devices; one axis may be -1."""

    pipeline: int = key(1, "stages of the pipeline", unit="devices", ge=-1)
    data: int = key(1, "replicas that each see other rows of the batch", unit="devices", ge=-1)
    fsdp: int = key(
        -1, "as data, with weights, gradients and optimizer state sharded too (ZeRO-3)", ge=-1, unit="devices"
    )
    expert: int = key(1, "groups of experts", unit="devices", ge=-1)
    context: int = key(1, "pieces of each sequence inside attention", unit="devices", ge=-1)
    tensor: int = key(
        1, "pieces of each matrix, with residuals sharded by sequence between them", unit="devices", ge=-1
    )
    zero: Literal[0, 1, 3] = key(
        0, "what the `data` axis shards besides the batch: 0 nothing, 1 the optimizer state, 3 the weights as well"
    )

    @model_validator(mode="after")
    def _sizes_can_be(self) -> MeshConfig:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if none := [axis for axis, size in sizes.items() if size == 0]:
            raise ValueError(f"{none[0]} = 0; every axis is at least 1, or -1 to fill up")
        if len(both := [axis for axis, size in sizes.items() if size == -1]) > 1:
            raise ValueError(f"{' and '.join(both)} are both -1 (fsdp is by default); at most one axis may fill up")
        return self


def resolve_sizes(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """The size of every axis on `n_devices` devices, the one that is -1 filled up.

    Raises ClusterError when the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and n_devices % fixed == 0:
        sizes[open_axes[0]] = n_devices // fixed
    if math.prod(sizes.values()) != n_devices:
        raise ClusterError(
            f"mesh {_show(sizes)} needs {'a multiple of ' if open_axes else ''}{fixed} devices and there are "
            f"{n_devices}; "
            "change the axis sizes (mesh.AXIS=N), or give one of them -1 to fill up"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (all of the cluster's by default), laid along the physical network where there is one.

    Devices in several TPU slices are spread over them by one axis, see `axis_over_slices`.
    """
    import jax
    from jax.experimental import mesh_utils

    devices = list(jax.devices() if devices is None else devices)
    sizes = resolve_sizes(config, len(devices))
    n_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if n_slices == 1:
        array = mesh_utils.create_device_mesh(tuple(sizes.values()), devices=devices, allow_split_physical_axes=True)
    else:
        between = dict.fromkeys(AXES, 1) | {axis_over_slices(sizes, n_slices): n_slices}
        within = tuple(sizes[axis] // between[axis] for axis in AXES)
        array = mesh_utils.create_hybrid_device_mesh(
            within, tuple(between.values()), devices=devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def axis_over_slices(sizes: dict[str, int], n_slices: int) -> str:
    """The mesh axis whose communication crosses the network between slices: the first that they divide.

    Raises ConfigError where none of pipeline, data and fsdp is a multiple of the number of slices.
    """
    for axis in SLICE_AXES:
        if sizes[axis] % n_slices == 0:
            return axis
    raise ConfigError(
        f"mesh {_show(sizes)} cannot be spread over {n_slices} slices: none of "
        f"{', '.join(f'mesh.{axis}' for axis in SLICE_AXES)} is a multiple of {n_slices}; set mesh.data={n_slices}"
    )


def _show(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "of one device"
