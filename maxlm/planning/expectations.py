"""What a compiled step should not contain: the traps of sharding, found in its collectives and its arguments.

The rules are those that `parallel/axes.py` promises: weights rest sharded and are gathered where they are used, by
all-gathers; tensor parallelism keeps the residual stream sharded by position between blocks, and gathers it before
each block's products and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from maxlm.planning.census import Census, Collective

if TYPE_CHECKING:
    from maxlm.config import RunConfig

_PATH = re.compile(r"\['([^']*)'\]")
_LAYER_GATHERS = 2
"""All-gathers of the residual stream that sequence parallelism makes a layer and pass: before attention, before the MLP
(arXiv:2205.05198, section 4.2.2)."""


def unexpected(census: Census, config: RunConfig, sizes: Mapping[str, int]) -> list[str]:
    """What a step does against the rules, a line each, empty if all is well.

    Args:
        census: of the compiled step.
        config: the run's, for the model's sizes and layout.
        sizes: the mesh's axes and sizes.
    """
    return [
        *padded_gathers(census),
        *tensor_gathers(census, config, sizes),
        *replicated_arguments(census, config, sizes),
        *(f"the trip count of loop {name!r} could not be read; it is counted once" for name in census.unknown_loops),
    ]


def padded_gathers(census: Census) -> list[str]:
    """Gathers that became all-reduces of buffers of zeros: twice the bytes, from a topology without its wraparound."""
    return [
        f"an all-reduce of zero-padded shards over {_axes(one)} gathers {one.shape} ({one.bytes:,} bytes, {one.times} "
        f"times a step; {one.what or one.part}): an all-gather would send half"
        for one in census.collectives
        if one.kind == "padded all-reduce"
    ]


def tensor_gathers(census: Census, config: RunConfig, sizes: Mapping[str, int]) -> list[str]:
    """All-gathers of activations over the tensor axis in the layers, beyond those of sequence parallelism.

    A pass over the layers (forward, backward, recomputation) gathers the residual stream at most twice a layer, and
    nothing that is larger; in the backward pass the same of its gradient and, for the weights' gradients, of the
    saved input again: four.
    """
    from maxlm.parallel.axes_table import ACTIVATIONS, TOKENS

    axes = {axis for name in ("mlp", "heads") for axis in ACTIVATIONS[name] if sizes.get(axis, 1) > 1}
    rows = config.train.global_batch_tokens // config.train.seq_len // max(config.train.accumulation, 1)
    shards = math.prod(sizes.get(axis, 1) for axis in TOKENS)
    residual = max(1, rows // shards) * config.train.seq_len * config.model.d_model
    layers = config.model.n_layers * max(config.train.accumulation, 1)
    found = []
    for part, passes in (("layers forward", 1), ("layers recomputed", 1), ("layers backward", 2)):
        gathers = [
            one
            for one in census.collectives
            if one.part == part and one.kind == "all-gather" and axes & set(one.axes) and one.in_loop
        ]
        found += [
            f"{part}: an all-gather over {_axes(one)} of {one.shape}, more than the residual stream "
            f"({residual:,} elements) that sequence parallelism gathers ({one.source or one.what})"
            for one in gathers
            if max(_elements(one)) > residual
        ]
        allowed = _LAYER_GATHERS * passes * layers * residual
        total = sum(sum(_elements(one)) * one.times for one in gathers)
        if total > allowed:
            found.append(
                f"{part}: all-gathers over {_axes(gathers[0])} of {total:,} elements a step, where sequence "
                f"parallelism needs {allowed:,}"
            )
    return found


def replicated_arguments(census: Census, config: RunConfig, sizes: Mapping[str, int]) -> list[str]:
    """Weights and optimizer states that rest larger on a device than `parallel/axes.py` and `mesh.zero` leave them.

    Read from the local sizes of the program's arguments.
    """
    import jax

    from maxlm.models.transformer import Model

    mesh = jax.sharding.AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Explicit,) * len(sizes)
    )
    wanted: dict[str, dict[tuple[str, ...], tuple[int, ...]]] = {}
    with jax.sharding.use_abstract_mesh(mesh):
        model = Model(config.model, config.precision)
        for argument, zero in (("state.params", 3), ("state.opt_state", 1)):
            shapes = model.abstract_params(mesh, shard_over_data=config.mesh.zero >= zero)  # pyright: ignore
            leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
            wanted[argument] = {
                tuple(key.key for key in path): leaf.sharding.shard_shape(leaf.shape) for path, leaf in leaves
            }
    found = []
    for name, dims in census.arguments:
        path = tuple(_PATH.findall(name))
        expected = next((tree.get(path) for argument, tree in wanted.items() if name.startswith(argument)), None)
        if expected is not None and math.prod(dims) > math.prod(expected):
            found.append(
                f"{name} has {math.prod(dims):,} elements on a device ({_by(dims)}); the axes table leaves "
                f"{math.prod(expected):,} of it there ({_by(expected)})"
            )
    return found


def _by(dims: tuple[int, ...]) -> str:
    return " x ".join(map(str, dims))


def _elements(one: Collective) -> list[int]:
    """Elements of each array that a collective moves."""
    return [math.prod(int(size) for size in dims.split(",") if size) for dims in re.findall(r"\[([\d,]*)\]", one.shape)]


def _axes(one: Collective) -> str:
    return " x ".join(one.axes)
