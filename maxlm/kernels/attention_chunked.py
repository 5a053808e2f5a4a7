"""Attention by tiles with an online softmax, on one device's share: memory grows with the length, not with its square.

The algorithm is FlashAttention-2's (arXiv:2307.08691, algorithms 1 and 2), in plain JAX: a scan over the tiles of the
score matrix that the mask does not empty. Forward keeps, per query, the running maximum, the running sum and the
unscaled output; the log of the partition (`lse`) is all that backward needs to make each tile's probabilities again.
Shape letters as in `attention_reference.py`; what is done with a tile is in `attention_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from maxlm.kernels import attention_tiles
from maxlm.kernels.attention_bias import Bias
from maxlm.kernels.attention_extras import Extras
from maxlm.kernels.attention_relative import Relative
from maxlm.kernels.attention_tiles import Chunking, Given, Shape
from maxlm.kernels.masks import Mask, Tile, TileKind


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    extras: Extras,
    *,
    how: Chunking,
) -> tuple[jax.Array, jax.Array]:
    """The output `[B, T, H, V]` in q's dtype and `lse` `[B, T, H]` float32, +inf with nothing to attend to.

    A sink is in `lse` as any score is.
    """
    shape = Shape.of(q_BTHK, k_BSGK, how)
    q, k, v = shape.tile_q(q_BTHK), shape.tile_kv(k_BSGK), shape.tile_kv(v_BSGV)
    given = Given.of(extras, shape)
    carry = attention_tiles.forward_start(q_BTHK, v.shape[-1], extras.sinks_H, shape)
    carry = _scan_tiles(attention_tiles.forward_body(q, k, v, given, shape, how), carry, shape, how, given)
    return attention_tiles.forward_end(carry, q_BTHK.dtype, shape)


def backward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    extras: Extras,
    o_BTHV: jax.Array,
    lse_BTH: jax.Array,
    do_BTHV: jax.Array,
    *,
    how: Chunking,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Bias | None, Relative | None]:
    """Gradients of q, k, v, sinks, bias and relative, in their dtypes, accumulated in float32; of what all rows share,
    over all devices."""
    shape = Shape.of(q_BTHK, k_BSGK, how)
    q, k, v = shape.tile_q(q_BTHK), shape.tile_kv(k_BSGK), shape.tile_kv(v_BSGV)
    given = Given.of(extras, shape)
    queries = attention_tiles.Queries.of(q, o_BTHV, lse_BTH, do_BTHV, shape)
    dq, dbias, dpositions = attention_tiles.backward_start(q_BTHK, queries, given)
    carry = (dq, *(attention_tiles.filled(q_BTHK, x.shape, 0.0) for x in (k, v)), dbias, dpositions)
    carry = _scan_tiles(attention_tiles.backward_body(queries, k, v, given, shape, how), carry, shape, how, given)
    dq, dk, dv, dbias, dpositions = carry
    return (
        shape.untile_q(dq.swapaxes(-1, -2).astype(q_BTHK.dtype)),
        shape.untile_kv(dk.astype(k_BSGK.dtype)),
        shape.untile_kv(dv.astype(v_BSGV.dtype)),
        *attention_tiles.shared_gradients(extras, lse_BTH, queries.delta_BTH, dbias, dpositions, shape, how),
    )


def _scan_tiles(body: Callable, carry: tuple, shape: Shape, how: Chunking, given: Given) -> tuple:
    """Runs `body(masked, carry, (row, column))` over the tiles that are not empty: the full ones, then the others."""
    full, partial_ = [], []
    for tile in how.mask.tiles(shape.n_q, shape.n_kv, shape.tq, shape.tk):
        padded = (tile.column + 1) * shape.tk > shape.S
        kind = tile.kind if given.prefix is None else _kind_with_prefix(tile, shape, how.mask)
        if kind != "empty":
            (full if kind == "full" and not padded and given.segments is None else partial_).append(tile[:2])
    for masked, tiles in ((False, full), (True, partial_)):
        if tiles:
            rows, columns = np.asarray(tiles, np.int32).T
            carry, _ = jax.lax.scan(partial(body, masked), carry, (rows, columns))
    return carry


def _kind_with_prefix(tile: Tile, shape: Shape, mask: Mask) -> TileKind:
    """Any key may be of a prefix: only what the mask leaves without one is sure, and only what both leave out empty."""
    if tile.kind == "full":
        return "full"
    both_ways = mask.both_ways.tile_kind(tile.row, tile.column, shape.tq, shape.tk)
    return "empty" if both_ways == "empty" else "partial"
