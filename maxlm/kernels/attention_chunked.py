"""Attention by tiles with an online softmax, on one device's share: memory grows with the length, not with its square.

The algorithm is FlashAttention-2's (arXiv:2307.08691, algorithms 1 and 2), in plain JAX: a scan over the tiles of the
score matrix that the mask does not empty. Forward keeps, per query, the running maximum, the running sum and the
unscaled output; the log of the partition (`lse`) is all that backward needs to make each tile's probabilities again.

Tiles of queries lie as `[n, N, R tq, K]`, tiles of keys as `[n, N, tk, K]`, with N = B G and the R query heads that
share a key head as rows of one matrix: each product is a batch of N contiguous matrices, and no key is ever repeated.
Shape letters as in `attention_reference.py`; tq and tk are the lengths of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.kernels.masks import Mask

# Below any real score, and finite, so that a row of masked scores (-inf) gives exp(-inf) = 0 and never inf - inf.
FLOOR = -1e30


@dataclass(frozen=True)
class Chunking:
    """What is static in one call: the mask, the numbers in the score, and the tile lengths."""

    mask: Mask
    scale: float
    softcap: float | None
    q_tile: int
    kv_tile: int


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    *,
    how: Chunking,
) -> tuple[jax.Array, jax.Array]:
    """The output `[B, T, H, V]` in q's dtype and `lse` `[B, T, H]` float32, +inf with nothing to attend to."""
    shape = _Shape.of(q_BTHK, k_BSGK, v_BSGV, how)
    q, k, v = shape.tile_q(q_BTHK), shape.tile_kv(k_BSGK), shape.tile_kv(v_BSGV)
    segments = shape.tile_segments(segments_BT, kv_segments_BS)

    def body(masked: bool, carry, tile):
        row, column = tile
        top, total, o = (_get(part, row) for part in carry)
        s = _scores(q, k, segments, row, column, masked, shape, how)
        new_top = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.exp(s - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(p, axis=-1)
        o = o * shrink[..., None] + _dot(p.astype(v.dtype), _get(v, column), "nts,nsv->ntv")
        return tuple(_set(part, row, new) for part, new in zip(carry, (new_top, total, o), strict=True)), None

    rows_shape = q.shape[:-1]
    carry = (
        _filled(q_BTHK, rows_shape, FLOOR),
        _filled(q_BTHK, rows_shape, 0.0),
        _filled(q_BTHK, (*rows_shape, v.shape[-1]), 0.0),
    )
    top, total, o = _scan_tiles(body, carry, shape, how, segments is not None)
    o = o / jnp.where(total == 0.0, 1.0, total)[..., None]
    lse = jnp.where(total == 0.0, jnp.inf, top + jnp.log(total))
    return shape.untile_q(o.astype(q_BTHK.dtype)), shape.untile_q(lse[..., None])[..., 0]


def backward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    segments_BT: jax.Array | None,
    kv_segments_BS: jax.Array | None,
    o_BTHV: jax.Array,
    lse_BTH: jax.Array,
    do_BTHV: jax.Array,
    *,
    how: Chunking,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their dtypes, accumulated in float32."""
    shape = _Shape.of(q_BTHK, k_BSGK, v_BSGV, how)
    q, k, v = shape.tile_q(q_BTHK), shape.tile_kv(k_BSGK), shape.tile_kv(v_BSGV)
    segments = shape.tile_segments(segments_BT, kv_segments_BS)
    do = shape.tile_q(do_BTHV)
    delta_BTH = jnp.sum(do_BTHV.astype(jnp.float32) * o_BTHV.astype(jnp.float32), axis=-1)
    delta = shape.tile_q(delta_BTH[..., None])[..., 0]
    lse = shape.tile_q(lse_BTH[..., None], fill=jnp.inf)[..., 0]

    def body(masked: bool, carry, tile):
        row, column = tile
        dq, dk, dv = carry
        k_tile, v_tile, q_tile, do_tile = _get(k, column), _get(v, column), _get(q, row), _get(do, row)
        s = _scores(q, k, segments, row, column, masked, shape, how, keys_first=True)
        p = jnp.exp(s - _get(lse, row)[:, None])
        ds = p * (_dot(v_tile, do_tile, "nsv,ntv->nst") - _get(delta, row)[:, None])
        if how.softcap is not None:
            # d tanh; a masked score is -inf, and 0 * inf is not 0.
            ds = ds * (1.0 - jnp.square(jnp.where(s == -jnp.inf, 0.0, s) / how.softcap))
        ds, p = (ds * how.scale).astype(q.dtype), p.astype(do.dtype)
        dq = _set(dq, row, _get(dq, row) + _dot(k_tile, ds, "nsk,nst->nkt"))
        dk = _set(dk, column, _get(dk, column) + _dot(ds, q_tile, "nst,ntk->nsk"))
        dv = _set(dv, column, _get(dv, column) + _dot(p, do_tile, "nst,ntv->nsv"))
        return (dq, dk, dv), None

    # Scores stand keys first and dq lies transposed: then no product contracts the first axis of a tile of scores,
    # which is slow on a CPU (backward takes about half the time; docs/performance-log.md).
    shapes = (q.swapaxes(-1, -2).shape, k.shape, v.shape)
    carry = tuple(_filled(q_BTHK, part, 0.0) for part in shapes)
    dq, dk, dv = _scan_tiles(body, carry, shape, how, segments is not None)
    return (
        shape.untile_q(dq.swapaxes(-1, -2).astype(q_BTHK.dtype)),
        shape.untile_kv(dk.astype(k_BSGK.dtype)),
        shape.untile_kv(dv.astype(v_BSGV.dtype)),
    )


@dataclass(frozen=True)
class _Shape:
    """Sizes of one call, and the way of its arrays into tiles and back."""

    B: int
    T: int
    S: int
    G: int
    R: int
    tq: int
    tk: int

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array, how: Chunking) -> _Shape:
        (B, T, H, _), (_, S, G, _) = q.shape, k.shape
        return cls(B, T, S, G, H // G, _even(T, how.q_tile), _even(S, how.kv_tile))

    @property
    def n_q(self) -> int:
        return -(-self.T // self.tq)

    @property
    def n_kv(self) -> int:
        return -(-self.S // self.tk)

    def tile_q(self, x: jax.Array, fill: float = 0.0) -> jax.Array:
        """`[B, T, H, W]` to `[n_q, B G, R tq, W]`, padded with `fill`."""
        x = _pad(x, self.n_q * self.tq, fill).reshape(self.B, self.n_q, self.tq, self.G, self.R, -1)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(self.n_q, self.B * self.G, self.R * self.tq, -1)

    def untile_q(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.n_q, self.B, self.G, self.R, self.tq, -1).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.B, self.n_q * self.tq, self.G * self.R, -1)[:, : self.T]

    def tile_kv(self, x: jax.Array) -> jax.Array:
        """`[B, S, G, W]` to `[n_kv, B G, tk, W]`, padded with zeros."""
        x = _pad(x, self.n_kv * self.tk, 0.0).reshape(self.B, self.n_kv, self.tk, self.G, -1)
        return x.transpose(1, 0, 3, 2, 4).reshape(self.n_kv, self.B * self.G, self.tk, -1)

    def untile_kv(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.n_kv, self.B, self.G, self.tk, -1).transpose(1, 0, 3, 2, 4)
        return x.reshape(self.B, self.n_kv * self.tk, self.G, -1)[:, : self.S]

    def tile_segments(self, q: jax.Array | None, kv: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        """`[n_q, B, tq]` and `[n_kv, B, tk]`; padding has segment 0, which nothing attends to."""
        if q is None or kv is None:
            return None
        q_tiles = _pad(q, self.n_q * self.tq, 0).reshape(self.B, self.n_q, self.tq)
        kv_tiles = _pad(kv, self.n_kv * self.tk, 0).reshape(self.B, self.n_kv, self.tk)
        return q_tiles.transpose(1, 0, 2), kv_tiles.transpose(1, 0, 2)


def _scan_tiles(body: Callable, carry, shape: _Shape, how: Chunking, has_segments: bool):
    """Runs `body(masked, carry, (row, column))` over the tiles that are not empty: the full ones, then the others."""
    full, partial_ = [], []
    for tile in how.mask.tiles(shape.n_q, shape.n_kv, shape.tq, shape.tk):
        padded = (tile.column + 1) * shape.tk > shape.S
        if tile.kind != "empty":
            (full if tile.kind == "full" and not padded and not has_segments else partial_).append(tile[:2])
    for masked, tiles in ((False, full), (True, partial_)):
        if tiles:
            rows, columns = np.asarray(tiles, np.int32).T
            carry, _ = jax.lax.scan(partial(body, masked), carry, (rows, columns))
    return carry


def _scores(q, k, segments, row, column, masked: bool, shape: _Shape, how: Chunking, keys_first=False) -> jax.Array:
    """One tile of scores, `[N, R tq, tk]` (or `[N, tk, R tq]`, keys first) float32, -inf where masked."""
    q_tile, k_tile = _get(q, row), _get(k, column)
    s = how.scale * (_dot(k_tile, q_tile, "nsk,ntk->nst") if keys_first else _dot(q_tile, k_tile, "ntk,nsk->nts"))
    if how.softcap is not None:
        s = how.softcap * jnp.tanh(s / how.softcap)
    if not masked:
        return s
    q_index = row * shape.tq + jnp.arange(shape.tq)
    kv_index = column * shape.tk + jnp.arange(shape.tk)
    allowed = how.mask.allows(q_index[:, None], kv_index[None, :]) & (kv_index < shape.S)[None, :]
    allowed = allowed[None]
    if segments is not None:
        q_segments, kv_segments = _get(segments[0], row)[:, :, None], _get(segments[1], column)[:, None, :]
        allowed = allowed & (q_segments == kv_segments) & (kv_segments != 0)
    if keys_first:
        allowed = allowed.swapaxes(1, 2)[:, None, :, None]
        tiled = s.reshape(shape.B, shape.G, shape.tk, shape.R, shape.tq)
    else:
        allowed = allowed[:, None, None]
        tiled = s.reshape(shape.B, shape.G, shape.R, shape.tq, shape.tk)
    return jnp.where(allowed, tiled, -jnp.inf).reshape(s.shape)


def _even(length: int, tile: int) -> int:
    """The tile length, at most `tile` rounded up to 8, that cuts `length` into equal pieces with least padding."""
    pieces = -(-length // tile)
    piece = -(-length // pieces)
    return piece if pieces == 1 else -(-piece // 8) * 8


def _dot(a: jax.Array, b: jax.Array, subscripts: str) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _get(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _set(x: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, axis=0)


def _pad(x: jax.Array, length: int, fill: float) -> jax.Array:
    widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return x if length == x.shape[1] else jnp.pad(x, widths, constant_values=fill)


def _filled(like: jax.Array, shape: tuple[int, ...], value: float) -> jax.Array:
    """A constant that varies over the mesh axes of `like`, as a scan inside `shard_map` asks of its carry."""
    return jax.lax.full_like(like, value, dtype=jnp.float32, shape=shape)
