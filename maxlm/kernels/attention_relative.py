"""The part of attention's scores that is a query's product with a vector of the distance to the key (Transformer-XL,
arXiv:1901.02860, section 3.3), and the shift that brings products by distance under their keys (its appendix B).

A distance is `kv_index - q_index`, negative for keys in the past. Letters as in `attention_reference.py`, and L
distances.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.tree_util.register_dataclass, data_fields=["q_BTHK", "r_LHK"], meta_fields=["behind"])
@dataclass(frozen=True)
class Relative:
    """`q[t] . r[distance]` beside `q[t] . k[s]`, with queries of its own.

    Row l of `r_LHK` is of the distance `l - behind`; distances before the first or after the last row have that one's
    vector (the `clamp_len` of Transformer-XL's code), so that what a mask hides needs no rows.
    """

    q_BTHK: jax.Array
    r_LHK: jax.Array
    behind: int = field(kw_only=True)

    def scores(self, distance: jax.Array) -> jax.Array:
        """At distances `[B or 1, T, S]`, the products `[B, H, T, S]` in float32."""
        p_BHTL = jnp.einsum("bthk,lhk->bhtl", self.q_BTHK, self.r_LHK, preferred_element_type=jnp.float32)
        place_B1TS = jnp.clip(distance + self.behind, 0, self.r_LHK.shape[0] - 1)[:, None]
        return jnp.take_along_axis(p_BHTL, place_B1TS, axis=-1, mode="promise_in_bounds")

    def problems(self, q_BTHK: jax.Array) -> list[str]:
        """What does not fit the queries of keys, in words."""
        found = []
        if self.q_BTHK.shape != q_BTHK.shape:
            found.append(f"queries of distances {self.q_BTHK.shape} do not fit queries {q_BTHK.shape}")
        if self.r_LHK.ndim != 3 or self.r_LHK.shape[1:] != q_BTHK.shape[2:]:
            found.append(f"vectors of distances {self.r_LHK.shape} do not fit queries {q_BTHK.shape}")
        elif not 0 <= self.behind < self.r_LHK.shape[0]:
            found.append(f"of {self.r_LHK.shape[0]} vectors of distances, number {self.behind} is not of distance 0")
        return found


def at_distances(r_LHK: jax.Array, behind: int, first: int, count: int) -> jax.Array:
    """The vectors of the `count` distances from `first` on, `[count, H, K]`: a slice, its ends repeated."""
    place = np.clip(np.arange(first, first + count) + behind, 0, r_LHK.shape[0] - 1)
    start, stop = int(place[0]), int(place[-1]) + 1
    before, after = int(np.sum(place == start)) - 1, int(np.sum(place == stop - 1)) - 1
    ends = (before, after) if stop - start > 1 else (before, 0)
    return jnp.pad(r_LHK[start:stop], (ends, (0, 0), (0, 0)), mode="edge")


def under_keys(p: jax.Array) -> jax.Array:
    """From products by distance `[..., Q, Q + K]` to those by key, `[..., Q, K]`.

    Element (i, j) is `p[i, j - i + Q - 1]`; the last column is not used. Every row begins one earlier than the one
    above it, so one reshape moves them all.
    """
    *lead, Q, L = p.shape
    flat = p.reshape(*lead, Q * L)[..., Q - 1 : Q - 1 + Q * (L - 1)]
    return flat.reshape(*lead, Q, L - 1)[..., : L - Q]


def by_distance(s: jax.Array) -> jax.Array:
    """From what stands under keys, `[..., Q, K]`, to its places by distance, `[..., Q, Q + K]`, among zeros: the
    transpose of `under_keys`."""
    *lead, Q, K = s.shape
    none = [(0, 0)] * len(lead)
    flat = jnp.pad(s, [*none, (0, 0), (0, Q - 1)]).reshape(*lead, Q * (Q + K - 1))
    return jnp.pad(flat, [*none, (Q - 1, 1)]).reshape(*lead, Q, Q + K)
