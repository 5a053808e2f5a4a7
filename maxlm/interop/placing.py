"""Tensors from files onto a mesh. On the host there is one tensor at a time: what this process's devices hold of it.

One of our arrays may stack hundreds of their tensors. It is made on the devices, empty, and filled there in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.models.config import ModelConfig
from maxlm.models.families import Family
from maxlm.models.families.table import Tensor
from maxlm.models.transformer import Params

Read = Callable[[str], np.ndarray]
"""A tensor by its name: a view of the file, of which nothing is in memory before it is used."""


def read_params(read: Read, family: Family, config: ModelConfig, abstract: Params) -> Params:
    """The parameters, with the shapes, formats and shardings of `abstract`. Needs the current mesh.

    With many processes all call it, and each reads the parts of the files that its own devices hold.
    """
    params: Params = {}
    fillings = [
        Filling(path, number, tensors, leaf(abstract, path))
        for paths, tensors in _together(family, config).items()
        for number, path in enumerate(paths)
    ]
    arrays = _empty(tuple((f.path, f.target.shape, f.target.dtype, f.sharding) for f in fillings if f.n_steps))()
    for filling in fillings:

        def ours(tensor: Tensor, number: int = filling.number) -> np.ndarray:
            return tensor.weight.read(read(tensor.name), config)[number]

        put(params, filling.path, _fill(filling, ours, arrays.pop(filling.path, None)))
    return params


@dataclass(frozen=True)
class Filling:
    """One of our arrays, and the tensors that fill it; where they leave it empty there are zeros.

    Along the leading axes that no devices share it is filled step by step; a step is one tensor, or, where devices
    share an axis that tensors are stacked on, the tensors along it.
    """

    path: str
    number: int
    """which of those arrays that are one tensor in the files"""
    tensors: Sequence[Tensor]
    target: jax.ShapeDtypeStruct

    @property
    def n_steps(self) -> int:
        """How many of the leading axes are filled step by step."""
        n_stacked, on_device = len(self.tensors[0].index), self.sharding.shard_shape(self.target.shape)
        return next((i for i in range(n_stacked) if on_device[i] < self.target.shape[i]), n_stacked)

    @property
    def sharding(self) -> NamedSharding:
        """That of the whole array."""
        assert isinstance(self.target.sharding, NamedSharding)
        return self.target.sharding


def leaf(tree: Any, path: str) -> Any:
    """What is at a dotted path of a nested dict."""
    for part in path.split("."):
        tree = tree[part]
    return tree


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Puts a value at a dotted path of a nested dict."""
    *parents, last = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _together(family: Family, config: ModelConfig) -> dict[tuple[str, ...], list[Tensor]]:
    """The tensors that fill the same of our arrays."""
    found: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in family.tensors(config).values():
        found.setdefault(tensor.ours, []).append(tensor)
    return found


@cache
def _empty(arrays: tuple[tuple[str, tuple[int, ...], Any, NamedSharding], ...]) -> Callable[[], Any]:
    """A program that makes arrays of zeros of these names, shapes, formats and shardings."""
    shardings = {name: sharding for name, _, _, sharding in arrays}
    return jax.jit(lambda: {name: jnp.zeros(shape, dtype) for name, shape, dtype, _ in arrays}, out_shardings=shardings)


def _fill(filling: Filling, ours: Callable[[Tensor], np.ndarray], array: jax.Array | None) -> jax.Array:
    """The array that `ours` fills; in place of `array`, where it is filled step by step."""
    n_steps, target = filling.n_steps, filling.target
    shape, spec = target.shape[n_steps:], PartitionSpec(*filling.sharding.spec[n_steps:])
    sharding = NamedSharding(filling.sharding.mesh, spec)

    def step(tensors: Sequence[Tensor]) -> jax.Array:
        part = cache(partial(_part, ours, tensors, n_steps, shape, np.dtype(target.dtype)))
        return jax.make_array_from_callback(shape, sharding, lambda index: part(_bounds(index, shape)))

    if array is None:
        return step(filling.tensors)
    filled, tensors = array, sorted(filling.tensors, key=lambda tensor: tensor.index)
    for start, along in groupby(tensors, key=lambda tensor: tensor.index[:n_steps]):
        # Waited for, or many parts would be on the host until their turn comes.
        filled = jax.block_until_ready(_write(filled, step(list(along)), np.asarray(start, np.int32)))
    return filled


Bounds = tuple[tuple[int, int], ...]


def _bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _part(
    ours: Callable[[Tensor], np.ndarray],
    tensors: Sequence[Tensor],
    n_steps: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    bounds: Bounds,
) -> np.ndarray:
    """What lies within `bounds` of an array of `shape` that is filled by `tensors`."""
    part = np.zeros([stop - start for start, stop in bounds], dtype)
    for tensor in tensors:
        place = tensor.index[n_steps:]
        if all(start <= i < stop for i, (start, stop) in zip(place, bounds, strict=False)):
            here = ours(tensor)[tuple(slice(*axis) for axis in bounds[len(place) :])]
            local = tuple(i - start for i, (start, _) in zip(place, bounds, strict=False))
            part[(*local, *(slice(size) for size in here.shape))] = here
    return part


@partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """`array` with `part` at `start` of its leading axes, which are whole on every device; in place."""

    def local(array: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        n_steps = array.ndim - part.ndim
        part = part.reshape((1,) * n_steps + part.shape)
        return jax.lax.dynamic_update_slice(array, part, (*start, *(0,) * (array.ndim - n_steps)))

    spec, part_spec = jax.typeof(array).sharding.spec, jax.typeof(part).sharding.spec
    return jax.shard_map(local, in_specs=(spec, part_spec, PartitionSpec()), out_specs=spec)(array, part, start)
