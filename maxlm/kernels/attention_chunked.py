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
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.kernels import manual
from maxlm.kernels.attention_bias import Bias, diagonal_sums, spread_over_diagonals
from maxlm.kernels.attention_extras import Extras
from maxlm.kernels.attention_relative import Relative, at_distances, by_distance, under_keys
from maxlm.kernels.masks import Mask, Tile, TileKind
from maxlm.parallel.axes import token_axes

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
    extras: Extras,
    *,
    how: Chunking,
) -> tuple[jax.Array, jax.Array]:
    """The output `[B, T, H, V]` in q's dtype and `lse` `[B, T, H]` float32, +inf with nothing to attend to.

    A sink is in `lse` as any score is.
    """
    shape = _Shape.of(q_BTHK, k_BSGK, v_BSGV, how)
    q, k, v = shape.tile_q(q_BTHK), shape.tile_kv(k_BSGK), shape.tile_kv(v_BSGV)
    given = _Given.of(extras, shape)

    def body(masked: bool, carry, tile):
        row, column = tile
        top, total, o = (_get(part, row) for part in carry)
        s = _scores(q, k, given, row, column, masked, shape, how)[0]
        new_top = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.exp(s - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(p, axis=-1)
        o = o * shrink[..., None] + _dot(p.astype(v.dtype), _get(v, column), "nts,nsv->ntv")
        return tuple(_set(part, row, new) for part, new in zip(carry, (new_top, total, o), strict=True)), None

    rows_shape = q.shape[:-1]
    carry = (
        *_before_any_key(q_BTHK, rows_shape, extras.sinks_H, shape),
        _filled(q_BTHK, (*rows_shape, v.shape[-1]), 0.0),
    )
    top, total, o = _scan_tiles(body, carry, shape, how, given)
    o = o / jnp.where(total == 0.0, 1.0, total)[..., None]
    lse = jnp.where(total == 0.0, jnp.inf, top + jnp.log(total))
    return shape.untile_q(o.astype(q_BTHK.dtype)), shape.untile_q(lse[..., None])[..., 0]


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
    shape = _Shape.of(q_BTHK, k_BSGK, v_BSGV, how)
    q, k, v = shape.tile_q(q_BTHK), shape.tile_kv(k_BSGK), shape.tile_kv(v_BSGV)
    given = _Given.of(extras, shape)
    do = shape.tile_q(do_BTHV)
    delta_BTH = jnp.sum(do_BTHV.astype(jnp.float32) * o_BTHV.astype(jnp.float32), axis=-1)
    delta = shape.tile_q(delta_BTH[..., None])[..., 0]
    lse = shape.tile_q(lse_BTH[..., None], fill=jnp.inf)[..., 0]

    def body(masked: bool, carry, tile):
        row, column = tile
        dq, dk, dv, dbias, dpositions = carry
        k_tile, v_tile, q_tile, do_tile = _get(k, column), _get(v, column), _get(q, row), _get(do, row)
        s, capped = _scores(q, k, given, row, column, masked, shape, how, keys_first=True)
        p = jnp.exp(s - _get(lse, row)[:, None])
        ds = p * (_dot(v_tile, do_tile, "nsv,ntv->nst") - _get(delta, row)[:, None])
        if dbias is not None:
            dbias = _add_bias_gradient(dbias, ds, row, column, shape)
        if how.softcap is not None:
            ds = ds * (1.0 - jnp.square(capped / how.softcap))
        ds, p = (ds * how.scale).astype(q.dtype), p.astype(do.dtype)
        dq = _set(dq, row, _get(dq, row) + _dot(k_tile, ds, "nsk,nst->nkt"))
        dk = _set(dk, column, _get(dk, column) + _dot(ds, q_tile, "nst,ntk->nsk"))
        dv = _set(dv, column, _get(dv, column) + _dot(p, do_tile, "nst,ntv->nsv"))
        if given.positions is not None and dpositions is not None:
            dpositions = _add_position_gradients(dpositions, given.positions, ds, row, column, shape)
        return (dq, dk, dv, dbias, dpositions), None

    # Scores stand keys first and dq lies transposed: then no product contracts the first axis of a tile of scores,
    # which is slow on a CPU (backward takes about half the time; docs/performance-log.md).
    shapes = (q.swapaxes(-1, -2).shape, k.shape, v.shape)
    dbias = None if given.bias_HD is None else _filled(q_BTHK, given.bias_HD.shape, 0.0)
    dpositions = None
    if given.positions is not None:
        dpositions = _Positions(*(_filled(q_BTHK, part.shape, 0.0) for part in given.positions))
    carry = (*(_filled(q_BTHK, part, 0.0) for part in shapes), dbias, dpositions)
    dq, dk, dv, dbias, dpositions = _scan_tiles(body, carry, shape, how, given)
    return (
        shape.untile_q(dq.swapaxes(-1, -2).astype(q_BTHK.dtype)),
        shape.untile_kv(dk.astype(k_BSGK.dtype)),
        shape.untile_kv(dv.astype(v_BSGV.dtype)),
        None if extras.sinks_H is None else _sinks_gradient(extras.sinks_H, lse_BTH, delta_BTH),
        None if extras.bias is None else _bias_gradient(extras.bias, dbias, shape.distances()),
        None if extras.relative is None else _relative_gradient(extras.relative, dpositions, shape),
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
        return self.tile_rows(q, self.n_q, self.tq), self.tile_rows(kv, self.n_kv, self.tk)

    def tile_rows(self, x: jax.Array, n: int, length: int) -> jax.Array:
        """`[B, T]` or `[B, S]` to `[n, B, length]`, padded with 0."""
        return _pad(x, n * length, 0).reshape(self.B, n, length).transpose(1, 0, 2)

    @property
    def q_first(self) -> tuple[int, int, int, int, int]:
        """The axes of one tile of scores with its queries first."""
        return self.B, self.G, self.R, self.tq, self.tk

    @property
    def keys_first(self) -> tuple[int, int, int, int, int]:
        """The same with its keys first."""
        return self.B, self.G, self.tk, self.R, self.tq

    @property
    def n_diagonals(self) -> int:
        """One more than the padded score matrix has."""
        return self.n_q * self.tq + self.n_kv * self.tk

    @property
    def first_distance(self) -> int:
        """`kv_index - q_index` of its lower left corner."""
        return 1 - self.n_q * self.tq

    def distances(self) -> jax.Array:
        """`kv_index - q_index` of every diagonal of the padded score matrix, from the lower left corner on."""
        return jnp.arange(self.n_diagonals, dtype=jnp.int32) + self.first_distance

    def diagonal(self, row: jax.Array, column: jax.Array) -> jax.Array:
        """The place among `distances` of a tile's lower left corner."""
        return column * self.tk + (self.n_q - 1 - row) * self.tq


class _Positions(NamedTuple):
    """A call's `Relative`: its queries in tiles, and the vector of each of `_Shape.distances`."""

    q: jax.Array
    r_DHK: jax.Array

    @classmethod
    def of(cls, relative: Relative, shape: _Shape) -> _Positions:
        r_DHK = at_distances(relative.r_LHK, relative.behind, shape.first_distance, shape.n_diagonals)
        return cls(shape.tile_q(relative.q_BTHK), r_DHK)


class _Given(NamedTuple):
    """A call's extras, in tiles; `bias_HD` is the bias of each head at each of `_Shape.distances`."""

    segments: tuple[jax.Array, jax.Array] | None
    prefix: jax.Array | None
    bias_HD: jax.Array | None
    positions: _Positions | None

    @classmethod
    def of(cls, extras: Extras, shape: _Shape) -> _Given:
        return cls(
            shape.tile_segments(extras.segments_BT, extras.kv_segments_BS),
            None if extras.prefix_BS is None else shape.tile_rows(extras.prefix_BS, shape.n_kv, shape.tk),
            None if extras.bias is None else extras.bias.of(shape.distances()),
            None if extras.relative is None else _Positions.of(extras.relative, shape),
        )


def _scan_tiles(body: Callable, carry: tuple, shape: _Shape, how: Chunking, given: _Given) -> tuple:
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


def _kind_with_prefix(tile: Tile, shape: _Shape, mask: Mask) -> TileKind:
    """Any key may be of a prefix: only what the mask leaves without one is sure, and only what both leave out empty."""
    if tile.kind == "full":
        return "full"
    both_ways = mask.both_ways.tile_kind(tile.row, tile.column, shape.tq, shape.tk)
    return "empty" if both_ways == "empty" else "partial"


def _scores(
    q, k, given: _Given, row, column, masked: bool, shape: _Shape, how: Chunking, keys_first=False
) -> tuple[jax.Array, jax.Array]:
    """One tile of scores, `[N, R tq, tk]` (or `[N, tk, R tq]`, keys first) float32, -inf where masked.

    With it the same scores before bias and mask.
    """
    q_tile, k_tile = _get(q, row), _get(k, column)
    tiled = shape.keys_first if keys_first else shape.q_first
    s = _dot(k_tile, q_tile, "nsk,ntk->nst") if keys_first else _dot(q_tile, k_tile, "ntk,nsk->nts")
    if given.positions is not None:
        by_position = _position_scores(given.positions, row, column, shape)
        by_position = by_position.transpose(0, 1, 4, 2, 3) if keys_first else by_position
        s = (s.reshape(tiled) + by_position).reshape(s.shape)
    s = how.scale * s
    if how.softcap is not None:
        s = how.softcap * jnp.tanh(s / how.softcap)
    capped = s
    if given.bias_HD is not None:
        lines_HL = jax.lax.dynamic_slice_in_dim(given.bias_HD, shape.diagonal(row, column), shape.tq + shape.tk, axis=1)
        bias = spread_over_diagonals(lines_HL, shape.tq).reshape(shape.q_first[1:])
        bias = bias.transpose(0, 3, 1, 2) if keys_first else bias
        s = (s.reshape(tiled) + bias).reshape(s.shape)
    if not masked:
        return s, capped
    allowed = _allowed(given, row, column, shape, how.mask)
    allowed = allowed.swapaxes(1, 2)[:, None, :, None] if keys_first else allowed[:, None, None]
    return jnp.where(allowed, s.reshape(tiled), -jnp.inf).reshape(s.shape), capped


def _position_scores(positions: _Positions, row, column, shape: _Shape) -> jax.Array:
    """One tile of products of queries and distances, `[B, G, R, tq, tk]` float32."""
    q, r = _position_tiles(positions, row, column, shape)
    return under_keys(_dot(q, r, "bgrtk,lgrk->bgrtl"))


def _position_tiles(positions: _Positions, row, column, shape: _Shape) -> tuple[jax.Array, jax.Array]:
    """The queries `[B, G, R, tq, K]` and the vectors of distances `[tq + tk, G, R, K]` of one tile."""
    r = jax.lax.dynamic_slice_in_dim(positions.r_DHK, shape.diagonal(row, column), shape.tq + shape.tk)
    return _get(positions.q, row).reshape(*shape.q_first[:-1], -1), r.reshape(-1, shape.G, shape.R, r.shape[-1])


def _allowed(given: _Given, row, column, shape: _Shape, mask: Mask) -> jax.Array:
    """Which queries of one tile may attend to which keys, `[B or 1, tq, tk]`."""
    q_index = (row * shape.tq + jnp.arange(shape.tq))[:, None]
    kv_index = (column * shape.tk + jnp.arange(shape.tk))[None, :]
    allowed = mask.allows(q_index, kv_index)[None]
    if given.prefix is not None:
        allowed = allowed | (_get(given.prefix, column)[:, None, :] & mask.both_ways.allows(q_index, kv_index))
    allowed = allowed & (kv_index < shape.S)
    if given.segments is not None:
        q_segments = _get(given.segments[0], row)[:, :, None]
        kv_segments = _get(given.segments[1], column)[:, None, :]
        allowed = allowed & (q_segments == kv_segments) & (kv_segments != 0)
    return allowed


def _before_any_key(
    like: jax.Array, rows_shape: tuple[int, ...], sinks_H: jax.Array | None, shape: _Shape
) -> tuple[jax.Array, jax.Array]:
    """The running maximum and the running sum of every query before its first key: those of its sink alone."""
    top, total = _filled(like, rows_shape, FLOOR), _filled(like, rows_shape, 0.0)
    if sinks_H is None:
        return top, total
    sinks = jnp.broadcast_to(
        sinks_H.astype(jnp.float32).reshape(shape.G, shape.R, 1), (shape.n_q, shape.B, shape.G, shape.R, shape.tq)
    ).reshape(rows_shape)
    top = jnp.maximum(top, sinks)
    return top, jnp.exp(sinks - top)


def _sinks_gradient(sinks_H: jax.Array, lse_BTH: jax.Array, delta_BTH: jax.Array) -> jax.Array:
    """A sink's gradient is that of a score whose value is 0: `-p delta`, of all queries of all devices."""
    p_BTH = jnp.exp(sinks_H.astype(jnp.float32) - lse_BTH)
    d_H = manual.total(-jnp.sum(p_BTH * delta_BTH, axis=(0, 1)), token_axes())
    return d_H.astype(sinks_H.dtype)


def _add_bias_gradient(dbias_HD: jax.Array, ds: jax.Array, row, column, shape: _Shape) -> jax.Array:
    """Adds the score gradients of one tile, keys first, to those of their distances."""
    ds_HQK = jnp.sum(ds.reshape(shape.keys_first), axis=0)
    ds_HQK = ds_HQK.transpose(0, 2, 3, 1).reshape(-1, shape.tq, shape.tk)
    start, length = shape.diagonal(row, column), shape.tq + shape.tk
    lines_HL = jax.lax.dynamic_slice_in_dim(dbias_HD, start, length, axis=1) + diagonal_sums(ds_HQK)
    return jax.lax.dynamic_update_slice_in_dim(dbias_HD, lines_HL, start, axis=1)


def _add_position_gradients(found: _Positions, positions: _Positions, ds, row, column, shape: _Shape) -> _Positions:
    """Adds what the score gradients of one tile, keys first, give its queries and its distances."""
    q, r = _position_tiles(positions, row, column, shape)
    dp = by_distance(ds.reshape(shape.keys_first).transpose(0, 1, 3, 4, 2))
    dq = _dot(dp, r, "bgrtl,lgrk->bgrtk").reshape(found.q.shape[1:])
    dr = _dot(dp, q, "bgrtl,bgrtk->lgrk").reshape(-1, *found.r_DHK.shape[1:])
    start = shape.diagonal(row, column)
    dr = jax.lax.dynamic_slice_in_dim(found.r_DHK, start, len(dr)) + dr
    return _Positions(
        _set(found.q, row, _get(found.q, row) + dq),
        jax.lax.dynamic_update_slice_in_dim(found.r_DHK, dr, start, axis=0),
    )


def _relative_gradient(relative: Relative, found: _Positions, shape: _Shape) -> Relative:
    """From tiles and diagonals to the arrays as they were given, that of distances over all devices that share it."""
    r = relative.r_LHK
    varying = r.astype(jnp.float32) + manual.zeros(r.shape, jnp.float32, found.r_DHK, r)
    _, pull_back = jax.vjp(lambda r: at_distances(r, relative.behind, shape.first_distance, shape.n_diagonals), varying)
    (dr,) = manual.total(pull_back(found.r_DHK), token_axes())
    return replace(relative, q_BTHK=shape.untile_q(found.q.astype(relative.q_BTHK.dtype)), r_LHK=dr.astype(r.dtype))


def _bias_gradient(bias: Bias, dbias_HD: jax.Array, distances_D: jax.Array) -> Bias:
    """From the gradient at every distance to that of the bias's own array, over all devices that share it."""
    varying = jax.tree.map(lambda x: x.astype(jnp.float32) + manual.zeros(x.shape, jnp.float32, dbias_HD, x), bias)
    _, pull_back = jax.vjp(lambda bias: bias.of(distances_D), varying)
    (gradient,) = manual.total(pull_back(dbias_HD), token_axes())
    return jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, bias)


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
