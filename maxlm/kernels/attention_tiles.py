"""What attention does with one tile of the score matrix, forward and backward: the inside of `attention_chunked.py`'s
and `ring_attention.py`'s loops over tiles.

Tiles of queries lie as `[n, N, R tq, K]`, tiles of keys as `[n, N, tk, K]`, with N = B G and the R query heads that
share a key head as rows of one matrix: each product is a batch of N contiguous matrices, and no key is ever repeated.
Shape letters as in `attention_reference.py`; tq and tk are the lengths of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.kernels import manual
from maxlm.kernels.attention_bias import Bias, diagonal_sums, spread_over_diagonals
from maxlm.kernels.attention_extras import Extras
from maxlm.kernels.attention_relative import Relative, at_distances, by_distance, under_keys
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
    token_axes: tuple[str, ...] = ()
    """mesh axes that each have other queries: gradients of what all queries share are summed over them"""


@dataclass(frozen=True)
class Shape:
    """Sizes of one device's share, and the way of its arrays into tiles and back.

    Rows that are whole are one piece. Of rows that `devices` share, each has `pieces` runs of positions one after the
    other, and no tile reaches from one into another.
    """

    B: int
    T: int
    S: int
    G: int
    R: int
    tq: int
    tk: int
    pieces: int = 1
    devices: int = 1

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, how: Chunking, pieces: int = 1, devices: int = 1) -> Shape:
        (B, T, H, _), (_, S, G, _) = q.shape, k.shape
        tq, tk = _even(T // pieces, how.q_tile), _even(S // pieces, how.kv_tile)
        return cls(B, T, S, G, H // G, tq, tk, pieces, devices)

    @property
    def n_q(self) -> int:
        return self.pieces * -(-self.T // self.pieces // self.tq)

    @property
    def n_kv(self) -> int:
        return self.pieces * -(-self.S // self.pieces // self.tk)

    @property
    def padded_keys(self) -> bool:
        """Whether the last tile of keys of a piece has fewer keys than places."""
        return self.n_kv * self.tk != self.S

    def tile_q(self, x: jax.Array, fill: float = 0.0) -> jax.Array:
        """`[B, T, H, W]` to `[n_q, B G, R tq, W]`, padded with `fill`."""
        x = self._pad(x, self.n_q * self.tq, fill).reshape(self.B, self.n_q, self.tq, self.G, self.R, -1)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(self.n_q, self.B * self.G, self.R * self.tq, -1)

    def untile_q(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.n_q, self.B, self.G, self.R, self.tq, -1).transpose(1, 0, 4, 2, 3, 5)
        return self._trim(x.reshape(self.B, self.n_q * self.tq, self.G * self.R, -1), self.T)

    def tile_kv(self, x: jax.Array) -> jax.Array:
        """`[B, S, G, W]` to `[n_kv, B G, tk, W]`, padded with zeros."""
        x = self._pad(x, self.n_kv * self.tk, 0.0).reshape(self.B, self.n_kv, self.tk, self.G, -1)
        return x.transpose(1, 0, 3, 2, 4).reshape(self.n_kv, self.B * self.G, self.tk, -1)

    def untile_kv(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.n_kv, self.B, self.G, self.tk, -1).transpose(1, 0, 3, 2, 4)
        return self._trim(x.reshape(self.B, self.n_kv * self.tk, self.G, -1), self.S)

    def tile_segments(self, q: jax.Array | None, kv: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
        """`[n_q, B, tq]` and `[n_kv, B, tk]`; padding has segment 0, which nothing attends to."""
        if q is None or kv is None:
            return None
        return self.tile_rows(q, self.n_q, self.tq), self.tile_rows(kv, self.n_kv, self.tk)

    def tile_rows(self, x: jax.Array, n: int, length: int) -> jax.Array:
        """`[B, T]` or `[B, S]` to `[n, B, length]`, padded with 0."""
        return self._pad(x, n * length, 0).reshape(self.B, n, length).transpose(1, 0, 2)

    def _pad(self, x: jax.Array, length: int, fill: float) -> jax.Array:
        """`[B, T, ...]` to `[B, length, ...]`, every piece padded alike."""
        if length == x.shape[1]:
            return x
        missing = (length - x.shape[1]) // self.pieces
        if self.pieces > 1:
            x = x.reshape(x.shape[0], self.pieces, -1, *x.shape[2:])
        widths = [(0, 0)] * min(self.pieces, 2) + [(0, missing)]
        x = jnp.pad(x, widths + [(0, 0)] * (x.ndim - len(widths)), constant_values=fill)
        return x.reshape(x.shape[0], length, *x.shape[len(widths) :])

    def _trim(self, x: jax.Array, length: int) -> jax.Array:
        """The same backwards."""
        if self.pieces == 1 or length == x.shape[1]:
            return x[:, :length]
        pieces = x.reshape(x.shape[0], self.pieces, -1, *x.shape[2:])[:, :, : length // self.pieces]
        return pieces.reshape(x.shape[0], length, *x.shape[2:])

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
        """One more than the padded score matrix of whole rows has."""
        return self._reach(self.n_q, self.tq, self.T) + self._reach(self.n_kv, self.tk, self.S)

    @property
    def first_distance(self) -> int:
        """`kv_index - q_index` of its lower left corner."""
        return 1 - self._reach(self.n_q, self.tq, self.T)

    def _reach(self, n: int, tile: int, length: int) -> int:
        """How far tiles may reach from a row's first position on; the last of a row in pieces may begin anywhere."""
        return n * tile if self.devices == 1 else self.devices * length + tile

    def distances(self) -> jax.Array:
        """`kv_index - q_index` of every diagonal of the padded score matrix, from the lower left corner on."""
        return jnp.arange(self.n_diagonals, dtype=jnp.int32) + self.first_distance


class Places(NamedTuple):
    """Where tiles begin in their rows, `[n_q]` and `[n_kv]` int32, where they do not lie one after the other."""

    q: jax.Array
    kv: jax.Array


class Positions(NamedTuple):
    """A call's `Relative`: its queries in tiles, and the vector of each of `Shape.distances`."""

    q: jax.Array
    r_DHK: jax.Array

    @classmethod
    def of(cls, relative: Relative, shape: Shape) -> Positions:
        r_DHK = at_distances(relative.r_LHK, relative.behind, shape.first_distance, shape.n_diagonals)
        return cls(shape.tile_q(relative.q_BTHK), r_DHK)


class Given(NamedTuple):
    """A call's extras, in tiles, and where tiles lie; `bias_HD` is the bias of each head at each of
    `Shape.distances`."""

    segments: tuple[jax.Array, jax.Array] | None
    prefix: jax.Array | None
    bias_HD: jax.Array | None
    positions: Positions | None
    places: Places | None = None

    @classmethod
    def of(cls, extras: Extras, shape: Shape) -> Given:
        return cls(
            shape.tile_segments(extras.segments_BT, extras.kv_segments_BS),
            None if extras.prefix_BS is None else shape.tile_rows(extras.prefix_BS, shape.n_kv, shape.tk),
            None if extras.bias is None else extras.bias.of(shape.distances()),
            None if extras.relative is None else Positions.of(extras.relative, shape),
        )

    def diagonal(self, row: jax.Array, column: jax.Array, shape: Shape) -> jax.Array:
        """The place among `Shape.distances` of a tile's lower left corner."""
        if self.places is None:
            return column * shape.tk + (shape.n_q - 1 - row) * shape.tq
        return self.places.kv[column] - self.places.q[row] - (shape.tq - 1) - shape.first_distance

    def indices(self, row: jax.Array, column: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array | int]:
        """Where a tile's queries `[tq, 1]` and keys `[1, tk]` lie in their rows, and where its real keys end."""
        if self.places is None:
            q_index = (row * shape.tq + jnp.arange(shape.tq))[:, None]
            return q_index, (column * shape.tk + jnp.arange(shape.tk))[None, :], shape.S
        kv_start, n = self.places.kv[column], shape.n_kv // shape.pieces
        piece_start = kv_start - column % n * shape.tk
        q_index = (self.places.q[row] + jnp.arange(shape.tq))[:, None]
        return q_index, (kv_start + jnp.arange(shape.tk))[None, :], piece_start + shape.S // shape.pieces


def forward_body(q: jax.Array, k: jax.Array, v: jax.Array, given: Given, shape: Shape, how: Chunking) -> Callable:
    """`body(masked, carry, (row, column))` of a scan: the running maximum, sum and unscaled output after one more tile.

    `masked` says whether anything of the tile is masked.
    """

    def body(masked: bool, carry, tile):
        row, column = tile
        top, total, o = (get(part, row) for part in carry)
        s = _scores(q, k, given, row, column, masked, shape, how)[0]
        new_top = jnp.maximum(top, jnp.max(s, axis=-1))
        p = jnp.exp(s - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(p, axis=-1)
        o = o * shrink[..., None] + _dot(p.astype(v.dtype), get(v, column), "nts,nsv->ntv")
        return tuple(put(part, row, new) for part, new in zip(carry, (new_top, total, o), strict=True)), None

    return body


def forward_start(q_BTHK: jax.Array, v_width: int, sinks_H: jax.Array | None, shape: Shape) -> tuple[jax.Array, ...]:
    """What `forward_body` carries before any key."""
    rows_shape = shape.n_q, shape.B * shape.G, shape.R * shape.tq
    start = _before_any_key(q_BTHK, rows_shape, sinks_H, shape)
    return (*start, filled(q_BTHK, (*rows_shape, v_width), 0.0))


def forward_end(carry: tuple[jax.Array, ...], dtype: jnp.dtype, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """The output `[B, T, H, V]` and `lse` `[B, T, H]` of what `forward_body` carried over all tiles."""
    top, total, o = carry
    o = o / jnp.where(total == 0.0, 1.0, total)[..., None]
    lse = jnp.where(total == 0.0, jnp.inf, top + jnp.log(total))
    return shape.untile_q(o.astype(dtype)), shape.untile_q(lse[..., None])[..., 0]


class Queries(NamedTuple):
    """What backward needs of each query, in tiles; `delta` is the product of its output and that's gradient."""

    q: jax.Array
    do: jax.Array
    delta_BTH: jax.Array
    delta: jax.Array
    lse: jax.Array

    @classmethod
    def of(cls, q: jax.Array, o_BTHV: jax.Array, lse_BTH: jax.Array, do_BTHV: jax.Array, shape: Shape) -> Queries:
        do = shape.tile_q(do_BTHV)
        delta_BTH = jnp.sum(do_BTHV.astype(jnp.float32) * o_BTHV.astype(jnp.float32), axis=-1)
        delta = shape.tile_q(delta_BTH[..., None])[..., 0]
        return cls(q, do, delta_BTH, delta, shape.tile_q(lse_BTH[..., None], fill=jnp.inf)[..., 0])


def backward_body(queries: Queries, k: jax.Array, v: jax.Array, given: Given, shape: Shape, how: Chunking) -> Callable:
    """The same for backward, which carries the gradients of q (transposed), k, v, the bias and `Positions`.

    Scores stand keys first and dq lies transposed: then no product contracts the first axis of a tile of scores,
    which is slow on a CPU (backward takes about half the time; docs/performance-log.md).
    """
    q, do = queries.q, queries.do

    def body(masked: bool, carry, tile):
        row, column = tile
        dq, dk, dv, dbias, dpositions = carry
        k_tile, v_tile, q_tile, do_tile = get(k, column), get(v, column), get(q, row), get(do, row)
        s, capped = _scores(q, k, given, row, column, masked, shape, how, keys_first=True)
        p = jnp.exp(s - get(queries.lse, row)[:, None])
        ds = p * (_dot(v_tile, do_tile, "nsv,ntv->nst") - get(queries.delta, row)[:, None])
        if dbias is not None:
            dbias = _add_bias_gradient(dbias, given, ds, row, column, shape)
        if how.softcap is not None:
            ds = ds * (1.0 - jnp.square(capped / how.softcap))
        ds, p = (ds * how.scale).astype(q.dtype), p.astype(do.dtype)
        dq = put(dq, row, get(dq, row) + _dot(k_tile, ds, "nsk,nst->nkt"))
        dk = put(dk, column, get(dk, column) + _dot(ds, q_tile, "nst,ntk->nsk"))
        dv = put(dv, column, get(dv, column) + _dot(p, do_tile, "nst,ntv->nsv"))
        if given.positions is not None and dpositions is not None:
            dpositions = _add_position_gradients(dpositions, given, given.positions, ds, row, column, shape)
        return (dq, dk, dv, dbias, dpositions), None

    return body


def backward_start(q_BTHK: jax.Array, queries: Queries, given: Given) -> tuple:
    """The gradients that stay with the queries, before any key: of q, the bias and `Positions`."""
    dbias = None if given.bias_HD is None else filled(q_BTHK, given.bias_HD.shape, 0.0)
    dpositions = None
    if given.positions is not None:
        dpositions = Positions(*(filled(q_BTHK, part.shape, 0.0) for part in given.positions))
    return filled(q_BTHK, queries.q.swapaxes(-1, -2).shape, 0.0), dbias, dpositions


def _scores(
    q, k, given: Given, row, column, masked: bool, shape: Shape, how: Chunking, keys_first=False
) -> tuple[jax.Array, jax.Array]:
    """One tile of scores, `[N, R tq, tk]` (or `[N, tk, R tq]`, keys first) float32, -inf where masked.

    With it the same scores before bias and mask.
    """
    q_tile, k_tile = get(q, row), get(k, column)
    tiled = shape.keys_first if keys_first else shape.q_first
    s = _dot(k_tile, q_tile, "nsk,ntk->nst") if keys_first else _dot(q_tile, k_tile, "ntk,nsk->nts")
    if given.positions is not None:
        by_position = _position_scores(given, given.positions, row, column, shape)
        by_position = by_position.transpose(0, 1, 4, 2, 3) if keys_first else by_position
        s = (s.reshape(tiled) + by_position).reshape(s.shape)
    s = how.scale * s
    if how.softcap is not None:
        s = how.softcap * jnp.tanh(s / how.softcap)
    capped = s
    if given.bias_HD is not None:
        lines_HL = jax.lax.dynamic_slice_in_dim(
            given.bias_HD, given.diagonal(row, column, shape), shape.tq + shape.tk, axis=1
        )
        bias = spread_over_diagonals(lines_HL, shape.tq).reshape(shape.q_first[1:])
        bias = bias.transpose(0, 3, 1, 2) if keys_first else bias
        s = (s.reshape(tiled) + bias).reshape(s.shape)
    if not masked:
        return s, capped
    allowed = _allowed(given, row, column, shape, how.mask)
    allowed = allowed.swapaxes(1, 2)[:, None, :, None] if keys_first else allowed[:, None, None]
    return jnp.where(allowed, s.reshape(tiled), -jnp.inf).reshape(s.shape), capped


def _position_scores(given: Given, positions: Positions, row, column, shape: Shape) -> jax.Array:
    """One tile of products of queries and distances, `[B, G, R, tq, tk]` float32."""
    q, r = _position_tiles(given, positions, row, column, shape)
    return under_keys(_dot(q, r, "bgrtk,lgrk->bgrtl"))


def _position_tiles(given: Given, positions: Positions, row, column, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """The queries `[B, G, R, tq, K]` and the vectors of distances `[tq + tk, G, R, K]` of one tile."""
    r = jax.lax.dynamic_slice_in_dim(positions.r_DHK, given.diagonal(row, column, shape), shape.tq + shape.tk)
    return get(positions.q, row).reshape(*shape.q_first[:-1], -1), r.reshape(-1, shape.G, shape.R, r.shape[-1])


def _allowed(given: Given, row, column, shape: Shape, mask: Mask) -> jax.Array:
    """Which queries of one tile may attend to which keys, `[B or 1, tq, tk]`."""
    q_index, kv_index, stop = given.indices(row, column, shape)
    allowed = mask.allows(q_index, kv_index)[None]
    if given.prefix is not None:
        allowed = allowed | (get(given.prefix, column)[:, None, :] & mask.both_ways.allows(q_index, kv_index))
    allowed = allowed & (kv_index < stop)
    if given.segments is not None:
        q_segments = get(given.segments[0], row)[:, :, None]
        kv_segments = get(given.segments[1], column)[:, None, :]
        allowed = allowed & (q_segments == kv_segments) & (kv_segments != 0)
    return allowed


def _before_any_key(
    like: jax.Array, rows_shape: tuple[int, ...], sinks_H: jax.Array | None, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """The running maximum and the running sum of every query before its first key: those of its sink alone."""
    top, total = filled(like, rows_shape, FLOOR), filled(like, rows_shape, 0.0)
    if sinks_H is None:
        return top, total
    sinks = jnp.broadcast_to(
        sinks_H.astype(jnp.float32).reshape(shape.G, shape.R, 1), (shape.n_q, shape.B, shape.G, shape.R, shape.tq)
    ).reshape(rows_shape)
    top = jnp.maximum(top, sinks)
    return top, jnp.exp(sinks - top)


def shared_gradients(
    extras: Extras, lse_BTH, delta_BTH, dbias_HD, dpositions: Positions | None, shape: Shape, how: Chunking
) -> tuple[jax.Array | None, Bias | None, Relative | None]:
    """Gradients of sinks, bias and relative, those of what all queries share summed over all devices."""
    return (
        None if extras.sinks_H is None else _sinks_gradient(extras.sinks_H, lse_BTH, delta_BTH, how),
        None if extras.bias is None else _bias_gradient(extras.bias, dbias_HD, shape.distances(), how),
        None
        if extras.relative is None or dpositions is None
        else _relative_gradient(extras.relative, dpositions, shape, how),
    )


def _sinks_gradient(sinks_H: jax.Array, lse_BTH: jax.Array, delta_BTH: jax.Array, how: Chunking) -> jax.Array:
    """A sink's gradient is that of a score whose value is 0: `-p delta`, of all queries of all devices."""
    p_BTH = jnp.exp(sinks_H.astype(jnp.float32) - lse_BTH)
    d_H = manual.total(-jnp.sum(p_BTH * delta_BTH, axis=(0, 1)), how.token_axes)
    return d_H.astype(sinks_H.dtype)


def _add_bias_gradient(dbias_HD: jax.Array, given: Given, ds: jax.Array, row, column, shape: Shape) -> jax.Array:
    """Adds the score gradients of one tile, keys first, to those of their distances."""
    ds_HQK = jnp.sum(ds.reshape(shape.keys_first), axis=0)
    ds_HQK = ds_HQK.transpose(0, 2, 3, 1).reshape(-1, shape.tq, shape.tk)
    start, length = given.diagonal(row, column, shape), shape.tq + shape.tk
    lines_HL = jax.lax.dynamic_slice_in_dim(dbias_HD, start, length, axis=1) + diagonal_sums(ds_HQK)
    return jax.lax.dynamic_update_slice_in_dim(dbias_HD, lines_HL, start, axis=1)


def _add_position_gradients(found: Positions, given: Given, positions: Positions, ds, row, column, shape: Shape):
    """Adds what the score gradients of one tile, keys first, give its queries and its distances."""
    q, r = _position_tiles(given, positions, row, column, shape)
    dp = by_distance(ds.reshape(shape.keys_first).transpose(0, 1, 3, 4, 2))
    dq = _dot(dp, r, "bgrtl,lgrk->bgrtk").reshape(found.q.shape[1:])
    dr = _dot(dp, q, "bgrtl,bgrtk->lgrk").reshape(-1, *found.r_DHK.shape[1:])
    start = given.diagonal(row, column, shape)
    dr = jax.lax.dynamic_slice_in_dim(found.r_DHK, start, len(dr)) + dr
    return Positions(
        put(found.q, row, get(found.q, row) + dq),
        jax.lax.dynamic_update_slice_in_dim(found.r_DHK, dr, start, axis=0),
    )


def _relative_gradient(relative: Relative, found: Positions, shape: Shape, how: Chunking) -> Relative:
    """From tiles and diagonals to the arrays as they were given, that of distances over all devices that share it."""
    r = relative.r_LHK
    varying = r.astype(jnp.float32) + manual.zeros(r.shape, jnp.float32, found.r_DHK, r)
    _, pull_back = jax.vjp(lambda r: at_distances(r, relative.behind, shape.first_distance, shape.n_diagonals), varying)
    (dr,) = manual.total(pull_back(found.r_DHK), how.token_axes)
    return replace(relative, q_BTHK=shape.untile_q(found.q.astype(relative.q_BTHK.dtype)), r_LHK=dr.astype(r.dtype))


def _bias_gradient(bias: Bias, dbias_HD: jax.Array, distances_D: jax.Array, how: Chunking) -> Bias:
    """From the gradient at every distance to that of the bias's own array, over all devices that share it."""
    varying = jax.tree.map(lambda x: x.astype(jnp.float32) + manual.zeros(x.shape, jnp.float32, dbias_HD, x), bias)
    _, pull_back = jax.vjp(lambda bias: bias.of(distances_D), varying)
    (gradient,) = manual.total(pull_back(dbias_HD), how.token_axes)
    return jax.tree.map(lambda d, x: d.astype(x.dtype), gradient, bias)


def _even(length: int, tile: int) -> int:
    """The tile length, at most `tile` rounded up to 8, that cuts `length` into equal pieces with least padding."""
    pieces = -(-length // tile)
    piece = -(-length // pieces)
    return piece if pieces == 1 else -(-piece // 8) * 8


def _dot(a: jax.Array, b: jax.Array, subscripts: str) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def get(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def put(x: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, axis=0)


def filled(like: jax.Array, shape: tuple[int, ...], value: float) -> jax.Array:
    """A constant that varies over the mesh axes of `like`, as a scan inside `shard_map` asks of its carry."""
    return jax.lax.full_like(like, value, dtype=jnp.float32, shape=shape)
