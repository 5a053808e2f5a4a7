"""Stages of a pipeline on the mesh: where code runs on each stage by itself, and what stages pass on to each other.

The axis of stages alone is manual there (`on_each_stage`); over the other axes arrays stay global, and kernels enter
`shard_map` over those. What varies by stage is not checked: a nested `shard_map` that checks it leaves residuals that
JAX 0.10 cannot lower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from maxlm.parallel.axes import n_stages, names_in
from maxlm.parallel.axes_table import PIPELINE


def on_each_stage(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f` on each stage by itself. Specs are trees of `by_stage(dimension)`, and `by_stage()` for what all have."""
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names={PIPELINE}, check_vma=False)


def by_stage(dimension: int | None = None) -> PartitionSpec:
    """An array of which each stage has a piece along a dimension; or the whole."""
    return PartitionSpec() if dimension is None else PartitionSpec(*(None,) * dimension, PIPELINE)


def stage_number() -> jax.Array:
    """Inside: which stage this is."""
    return jax.lax.axis_index(PIPELINE)


def to_next(x: jax.Array) -> jax.Array:
    """Inside: what the stage before has; the first gets what the last has."""
    return jax.lax.ppermute(x, PIPELINE, [(i, (i + 1) % n_stages()) for i in range(n_stages())])


def to_previous(x: jax.Array) -> jax.Array:
    """Inside: what the next stage has; the last gets what the first has."""
    return jax.lax.ppermute(x, PIPELINE, [((i + 1) % n_stages(), i) for i in range(n_stages())])


def from_stage(x: Any, number: int) -> Any:
    """Inside: what one stage has, on all of them, for every array of a pytree."""
    here = stage_number() == number
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(here, x, jnp.zeros_like(x)), PIPELINE), x)


def total_over_stages(x: Any) -> Any:
    """Inside: the sum over stages, of every array of a pytree."""
    return jax.tree.map(lambda x: jax.lax.psum(x, PIPELINE), x)


def whole_on_stages(x: jax.Array) -> jax.Array:
    """A stored weight as all stages use it: without the pieces over stages, the other axes as they are."""
    return jax.sharding.reshard(x, PartitionSpec(*_without_stages(x)))


def cut_by_stage(x: jax.Array, dimension: int) -> jax.Array:
    """The same with a dimension cut by stage, stages outermost."""
    entries = _without_stages(x)
    entries[dimension] = (PIPELINE, *names_in(entries[dimension]))
    return jax.sharding.reshard(x, PartitionSpec(*entries))


def laid_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """An array moved to the sharding of another."""
    return jax.sharding.reshard(x, jax.typeof(like).sharding.spec)


def in_turns(stack: jax.Array, repeats: int, stages: int, per_turn: int) -> jax.Array:
    """Units stacked `[n, ...]` as `[V, P, l, ...]`, the stages cut; units of zeros fill up.

    Stage s runs in its v-th repeat units `(v P + s) l` and on, so that a microbatch meets all in order. Pieces over
    stages become innermost first, a permutation; then they change their dimension, an all-to-all.
    """
    missing = repeats * stages * per_turn - stack.shape[0]
    if missing:
        stack = jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1))
    stack = jax.sharding.reshard(stack, PartitionSpec(*_innermost(stack)))
    spec = PartitionSpec(None, None, *_entries(stack))
    return cut_by_stage(stack.reshape(repeats, stages, per_turn, *stack.shape[1:], out_sharding=spec), 1)


def in_a_row(turns: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse: `[V, P, l, ...]` as `[n, ...]`, shaped and laid as the stack that it came from."""
    spec = PartitionSpec(None, None, *_innermost(like))
    turns = jax.sharding.reshard(turns, spec)
    flat = turns.reshape(-1, *turns.shape[3:], out_sharding=PartitionSpec(*spec[2:]))
    return laid_as(flat[: like.shape[0]], like)


def split_rows(x: jax.Array, n: int) -> jax.Array:
    """Rows `[B, ...]` as microbatches `[n, B / n, ...]`. Microbatch i has every n-th row from the i-th, so that each
    device cuts its own rows and none travel."""
    entries = _entries(x)
    spec = PartitionSpec(entries[0], None, *entries[1:])
    return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:], out_sharding=spec), 0, 1)


def join_rows(x: jax.Array) -> jax.Array:
    """The inverse: microbatches `[n, B / n, ...]` as rows `[B, ...]`."""
    x = jnp.swapaxes(x, 0, 1)
    entries = _entries(x)
    return x.reshape(-1, *x.shape[2:], out_sharding=PartitionSpec(entries[0], *entries[2:]))


def _entries(x: jax.Array) -> list[Any]:
    spec = jax.typeof(x).sharding.spec
    return [*spec, *(None,) * (x.ndim - len(spec))]


def _innermost(x: jax.Array) -> list[Any]:
    entries = (names_in(entry) for entry in _entries(x))
    return [tuple(sorted(axes, key=lambda axis: axis == PIPELINE)) or None for axes in entries]


def _without_stages(x: jax.Array) -> list[Any]:
    kept = (tuple(axis for axis in names_in(entry) if axis != PIPELINE) for entry in _entries(x))
    return [axes or None for axes in kept]
