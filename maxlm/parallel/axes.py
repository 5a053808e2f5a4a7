"""The one table from logical axes to mesh axes. Nothing else in the code names a mesh axis, kernels and pipeline aside.

A weight's logical axes stand beside its shape (`("embed", "mlp")`), an activation's at the line that constrains it
(`("batch", "residual_length", "embed")`). Two tables, because one name means two things: a weight's `embed` is sharded
over `fsdp` where it rests, an activation's is whole. The tables are in `axes_table.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec, reshard

from maxlm.parallel.axes_table import ACTIVATIONS, DATA, IF_SEVERAL, PIPELINE, SEQUENCE, STORAGE_NAMES, TOKENS, WEIGHTS

LogicalAxes = Sequence[str | None]


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes over which an activation's logical axis is sharded."""
    return _here(ACTIVATIONS[name])


def _here(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The axes that a sharding names on the current mesh: those of stages and of positions only where it has several,
    so that rows that are whole are so by their type too, and may be cut."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in axes if axis not in IF_SEVERAL or shape.get(axis, 1) > 1)


def n_stages() -> int:
    """Stages of the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(PIPELINE, 1)


def inside_stage() -> bool:
    """Whether what is traced runs on each stage by itself: no sharding may name their axis there; collectives may."""
    return PIPELINE in jax.sharding.get_abstract_mesh().manual_axes


def token_axes() -> tuple[str, ...]:
    """The mesh axes that each have other tokens: those of the batch and of the length."""
    return _here(TOKENS)


def expert_axes() -> tuple[str, ...]:
    """The mesh axes over which experts are spread. For all else they have other tokens."""
    return WEIGHTS["experts"]


def sequence_axes(length: str = "residual_length") -> tuple[str, ...]:
    """The mesh axes over which positions are gathered from that logical axis to `length`, and scattered back."""
    return SEQUENCE if length == "residual_length" else ()


def activation_spec(*logical: str | None) -> PartitionSpec:
    """The sharding of an activation by its logical axes; None is an axis that no device shares."""
    inside = inside_stage()

    def sharing(name: str) -> tuple[str, ...]:
        return tuple(axis for axis in mesh_axes(name) if not (inside and axis == PIPELINE))

    return PartitionSpec(*(_entry(sharing(name)) if name else None for name in logical))


def weight_spec(logical: LogicalAxes, *, shard_over_data: bool = False) -> PartitionSpec:
    """The sharding of a weight at rest on the current mesh; `shard_over_data` adds the `data` axis (see `mesh.zero`).

    Raises ValueError without a mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        raise ValueError("weights lie on a mesh, and there is none: `with jax.set_mesh(mesh)`")
    entries = []
    for name in logical:
        axes = WEIGHTS[name] if name else ()
        if shard_over_data and name in STORAGE_NAMES:
            axes = (*DATA, *axes)
        entries.append(_entry(_here(axes)))
    return PartitionSpec(*entries)


def gathered_spec(logical: LogicalAxes) -> PartitionSpec:
    """The sharding of a weight where it is used: without the axes that only store it."""
    used = (name if name not in STORAGE_NAMES else None for name in logical)
    return PartitionSpec(*(_entry(WEIGHTS[name]) if name else None for name in used))


def gather(weight: jax.Array, logical: LogicalAxes) -> jax.Array:
    """Brings a stored weight together where it is used: FSDP's all-gather. Its transpose scatters the gradient."""
    return reshard(weight, gathered_spec(logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Moves an activation to the sharding of its logical axes. Raises ValueError on a rank that does not match."""
    if x.ndim != len(logical):
        raise ValueError(f"an array of shape {x.shape} constrained by {len(logical)} logical axes {logical}")
    return reshard(x, activation_spec(*logical))


def shards_of(name: str, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Into how many pieces the mesh cuts an activation's logical axis."""
    return math.prod(mesh.shape[axis] for axis in ACTIVATIONS[name])


def names_in(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if not axes:
        return None
    return axes[0] if len(axes) == 1 else axes
