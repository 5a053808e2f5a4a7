"""Additions to attention's scores that depend on the distance between query and key alone, a number a head.

A distance is `kv_index - q_index`, negative for keys in the past. Letters: H query heads, N buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.tree_util.register_dataclass, data_fields=["slopes_H"], meta_fields=[])
@dataclass(frozen=True)
class Alibi:
    """`slope * (kv_index - q_index)` (ALiBi, arXiv:2108.12409, section 3; BLOOM's `slope * kv_index` is equal to it
    under softmax)."""

    slopes_H: jax.Array

    def of(self, distance: jax.Array) -> jax.Array:
        """The bias at integer distances of any shape, `[H, *shape]` in float32."""
        slopes_H = self.slopes_H.astype(jnp.float32)
        return slopes_H.reshape(-1, *[1] * distance.ndim) * distance.astype(jnp.float32)


@partial(jax.tree_util.register_dataclass, data_fields=["table_NH"], meta_fields=["bidirectional", "max_distance"])
@dataclass(frozen=True)
class RelativeBias:
    """A learned number for each bucket of distances and each head (T5, arXiv:1910.10683, section 2.1).

    The nearest half of the buckets holds a distance each, the rest grow with its logarithm up to `max_distance`, beyond
    which all share the last. `bidirectional` halves the buckets between past and future keys; else all future keys
    share the bucket of distance 0.
    """

    table_NH: jax.Array
    bidirectional: bool = field(default=True, kw_only=True)
    max_distance: int = field(default=128, kw_only=True)

    def of(self, distance: jax.Array) -> jax.Array:
        """The bias at integer distances of any shape, `[H, *shape]` in float32."""
        buckets = bucket(distance, self.table_NH.shape[0], self.max_distance, bidirectional=self.bidirectional)
        rows = self.table_NH.astype(jnp.float32).at[buckets].get(mode="promise_in_bounds")
        return jnp.moveaxis(rows, -1, 0)


Bias = Alibi | RelativeBias


def bucket(distance: jax.Array, n_buckets: int, max_distance: int, *, bidirectional: bool) -> jax.Array:
    """T5's bucket of each distance `kv_index - q_index`, int32 from 0 to `n_buckets` - 1.

    Raises ValueError if the buckets do not reach from single distances to `max_distance`.
    """
    n = n_buckets // 2 if bidirectional else n_buckets
    starts = _starts(n, max_distance)
    away = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    far = jnp.searchsorted(jnp.asarray(starts), away, side="right", method="compare_all")
    buckets = jnp.minimum(away, n // 2).astype(jnp.int32) + far.astype(jnp.int32)
    return buckets + jnp.where(distance > 0, n, 0).astype(jnp.int32) if bidirectional else buckets


def _starts(n: int, max_distance: int) -> np.ndarray:
    """The least distance of each bucket of more than one, but the first such, of `n` buckets in one direction.

    In float32 throughout, as the public implementations round.
    """
    exact = n // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"a relative bias of {n} buckets a direction, {exact} of them of single distances, does not reach to a "
            f"distance of {max_distance}; give at least 2 buckets a direction and a max_distance of {exact + 1} or more"
        )
    far = np.arange(exact, max_distance + 1).astype(np.float32)
    log = np.log(far / np.float32(exact)) / np.float32(math.log(max_distance / exact)) * np.float32(n - exact)
    wanted = np.arange(1, n - exact)
    return exact + np.searchsorted(log.astype(np.int32), wanted, side="left").astype(np.int32)


def spread_over_diagonals(lines_HL: jax.Array, rows: int) -> jax.Array:
    """A matrix `[H, rows, L - rows]` whose diagonals have one number each, the lower left corner's first.

    Element (i, j) is `lines[j - i + rows - 1]`; the last number is not used. Repeated end to end and cut into rows of
    L - 1, a line moves on by one each row, so nothing is looked up.
    """
    H, L = lines_HL.shape
    repeated = jnp.broadcast_to(lines_HL[:, None], (H, rows, L)).reshape(H, rows * L)
    return repeated[:, : rows * (L - 1)].reshape(H, rows, L - 1)[:, :, rows - 1 :]


def diagonal_sums(x_HQK: jax.Array) -> jax.Array:
    """The sum of each diagonal of matrices, `[H, Q + K]`: the transpose of `spread_over_diagonals`."""
    H, Q, K = x_HQK.shape
    rows = jnp.pad(x_HQK, ((0, 0), (0, 0), (Q - 1, 0))).reshape(H, Q * (Q + K - 1))
    return jnp.pad(rows, ((0, 0), (0, Q))).reshape(H, Q, Q + K).sum(axis=1)
