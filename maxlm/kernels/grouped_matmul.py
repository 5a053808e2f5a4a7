"""Rows in groups, each group times its own matrix: the products of a mixture of experts (MegaBlocks, arXiv:2211.15841).

On accelerators it is `jax.lax.ragged_dot`. On a CPU that multiplies every row with every matrix, so there tiles of rows
of one group are multiplied in turn. Both are for one device: inside `shard_map`, or without a mesh.

Shape letters: N rows, D and F widths, E groups.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from maxlm.kernels import manual

Implementation = Literal["ragged", "tiled"]

SMALLEST_TILE, LARGEST_TILE = 8, 256
# Tiles at the ends of groups are half empty: of eight tiles a group on average, one.
TILES_PER_GROUP = 8

_ROWS_KEPT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)
_ROWS_CONTRACTED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)


def grouped_matmul(
    x_ND: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """`[N, F]` in x's dtype: the first `group_sizes_E[0]` rows times `w_EDF[0]`, those after them times the next.

    Rows behind the last group are zeros. Products are summed in float32. Differentiable by x and w. Raises ValueError
    on shapes that do not fit.
    """
    if x_ND.ndim != 2 or w_EDF.ndim != 3 or x_ND.shape[1] != w_EDF.shape[1] or group_sizes_E.shape != w_EDF.shape[:1]:
        raise ValueError(
            f"grouped_matmul: {x_ND.shape} by {w_EDF.shape} in groups {group_sizes_E.shape}; need [N, D], [E, D, F] "
            "and [E]"
        )
    if implementation is None:
        implementation = "tiled" if manual.platform() == "cpu" else "ragged"
    x_ND, w_EDF, group_sizes_E = manual.alike(x_ND, w_EDF, group_sizes_E)
    return _grouped(x_ND, w_EDF, group_sizes_E, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x: jax.Array, w: jax.Array, sizes: jax.Array, implementation: Implementation) -> jax.Array:
    return _rows(x, w, sizes, implementation, transposed=False)


def _forward(x, w, sizes, implementation):
    return _grouped(x, w, sizes, implementation), (x, w, sizes)


def _backward(implementation, saved, dy):
    x, w, sizes = saved
    dx = _rows(dy, w, sizes, implementation, transposed=True)
    if implementation == "ragged":
        dw = jax.lax.ragged_dot_general(x, dy, sizes, _ROWS_CONTRACTED, preferred_element_type=jnp.float32)
    else:
        dw = _tiled_gradient(x, dy, sizes)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


_grouped.defvjp(_forward, _backward)


def _rows(x: jax.Array, w: jax.Array, sizes: jax.Array, implementation: Implementation, *, transposed: bool):
    """Each row times its group's matrix, or its transpose."""
    if implementation == "tiled":
        y = _tiled_rows(x, w, sizes, transposed)
    elif transposed:
        y = jax.lax.ragged_dot_general(x, w, sizes, _ROWS_KEPT, preferred_element_type=jnp.float32)
    else:
        y = jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), y, 0).astype(x.dtype)


def tile_rows(n_rows: int, n_groups: int) -> int:
    """Rows of a tile."""
    return min(max(n_rows // (TILES_PER_GROUP * n_groups) // 8 * 8, SMALLEST_TILE), LARGEST_TILE)


def _tiles(sizes: jax.Array, n_rows: int, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each tile its group, its first row and how many rows are its group's; those not needed lie behind all rows.

    They are in order of rows, and so many as any sizes could need.
    """
    n_tiles = n_rows // tile + min(sizes.shape[0], n_rows)
    tiles_E = -(-sizes // tile)
    last_E = jnp.cumsum(tiles_E)
    number_M = jnp.arange(n_tiles, dtype=sizes.dtype)
    group_M = jnp.sum(number_M[:, None] >= last_E[None], axis=1, dtype=sizes.dtype)
    used_M, group_M = group_M < sizes.shape[0], jnp.minimum(group_M, sizes.shape[0] - 1)
    inside_M = (number_M - (last_E - tiles_E)[group_M]) * tile
    first_M = jnp.where(used_M, (jnp.cumsum(sizes) - sizes)[group_M] + inside_M, n_rows)
    return group_M, first_M, jnp.where(used_M, jnp.minimum(sizes[group_M] - inside_M, tile), 0)


def _tiled_rows(x: jax.Array, w: jax.Array, sizes: jax.Array, transposed: bool) -> jax.Array:
    n_rows, tile = x.shape[0], tile_rows(x.shape[0], w.shape[0])
    x = jnp.pad(x, ((0, tile), (0, 0)))
    contracted = ((1,), (1 if transposed else 0,)), ((), ())

    def one(y, each):
        group, first, _ = each
        x_tile = jax.lax.dynamic_slice_in_dim(x, first, tile)
        product = jax.lax.dot_general(x_tile, w[group], contracted, preferred_element_type=jnp.float32)
        # Rows of the next group are written by its own tile, which comes after.
        return jax.lax.dynamic_update_slice_in_dim(y, product.astype(y.dtype), first, axis=0), None

    y = manual.zeros((n_rows + tile, w.shape[1 if transposed else 2]), x.dtype, x, w)
    return jax.lax.scan(one, y, _tiles(sizes, n_rows, tile))[0][:n_rows]


def _tiled_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    n_rows, tile = x.shape[0], tile_rows(x.shape[0], sizes.shape[0])
    x, dy = (jnp.pad(a, ((0, tile), (0, 0))) for a in (x, dy))

    def one(dw, each):
        group, first, n = each
        x_tile, dy_tile = (jax.lax.dynamic_slice_in_dim(a, first, tile) for a in (x, dy))
        x_tile = jnp.where(jnp.arange(tile)[:, None] < n, x_tile, 0)
        product = jax.lax.dot_general(x_tile, dy_tile, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return dw.at[group].add(product), None

    dw = manual.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), jnp.float32, x, dy)
    return jax.lax.scan(one, dw, _tiles(sizes, n_rows, tile))[0]
