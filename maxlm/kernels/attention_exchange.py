"""Positions exchanged for heads before attention and back behind it, where devices share rows by position: every device
then has whole rows of fewer heads (DeepSpeed-Ulysses, arXiv:2309.14509). Shape letters as in `attention_reference.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from maxlm.kernels import manual
from maxlm.kernels.attention_extras import Extras, Layout
from maxlm.parallel.axes import mesh_axes

EXCHANGED = Layout(None, "exchanged_heads", "exchanged_heads")
"""Whole rows, of heads shared by the devices of tensor parallelism and of the context axis."""


def repeats(q_heads: int, kv_heads: int, devices: int) -> int:
    """How often each key head is repeated so that the devices share key heads evenly, each next to its query heads.

    Raises ValueError where the devices do not divide the query heads.
    """
    if q_heads % devices:
        raise ValueError(
            f"attention: {q_heads} query heads of a device are not a multiple of {devices} to exchange with"
        )
    group = q_heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % devices == 0)


def exchange(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, extras: Extras
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Extras]:
    """Queries, keys and values with whole rows, as `EXCHANGED` lays them; key heads repeated where there are fewer than
    devices. So are the queries of `extras.relative`."""
    own, axes = Layout(), mesh_axes("length")
    tensor = manual.count(mesh_axes("heads"))
    n = repeats(q_BTHK.shape[2] // tensor, k_BSGK.shape[2] // tensor, manual.count(axes))
    to_heads = partial(manual.exchanged, axes=axes, split=2, join=1)

    def keys(x: jax.Array) -> jax.Array:
        return to_heads(x if n == 1 else jnp.repeat(x, n, axis=2))

    queries = manual.on_each_device(to_heads, (own.queries,), EXCHANGED.queries)
    of_keys = manual.on_each_device(keys, (own.keys,), EXCHANGED.keys)
    if (relative := extras.relative) is not None:
        q_of_distances = queries(manual.bring(relative.q_BTHK, own.queries))
        extras = extras._replace(relative=replace(relative, q_BTHK=q_of_distances))
    return (queries(q_BTHK), of_keys(k_BSGK), of_keys(v_BSGV)), extras


def exchange_back(o_BTHV: jax.Array) -> jax.Array:
    """The output with its positions shared, and all heads of tensor parallelism's share, on each device."""
    back = partial(manual.exchanged, axes=mesh_axes("length"), split=1, join=2)
    return manual.on_each_device(back, (EXCHANGED.queries,), Layout().queries)(o_BTHV)
