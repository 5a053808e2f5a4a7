"""Tokens sorted by the expert that they go to, and what the experts made of them put together again.

Rows are taken by a permutation, in gradients too: no two are ever added into one by a scatter, which is slow, and on
GPUs gives other sums each time. For one device: inside `shard_map`, or without a mesh.

Shape letters: N tokens, A experts of a token, D d_model, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """Choices sorted by expert: those of one expert by token, and the experts' after one another."""

    choice_R: jax.Array
    """of each sorted row, the choice: token * A + its number among the token's"""
    place_NA: jax.Array
    """of each choice, its sorted row"""
    sizes_E: jax.Array
    """rows of each expert; rows behind them are of choices that go nowhere"""


def order_by_expert(experts_NA: jax.Array, n_experts: int) -> Order:
    """Sorts choices of experts; a choice of `n_experts` goes nowhere."""
    flat = experts_NA.reshape(-1)
    number = jnp.arange(flat.shape[0], dtype=jnp.int32)
    sorted_experts, choice = jax.lax.sort((flat, number), num_keys=1, is_stable=True)
    _, place = jax.lax.sort((choice, number), num_keys=1)
    ends = jnp.searchsorted(sorted_experts, jnp.arange(n_experts, dtype=flat.dtype), side="right").astype(jnp.int32)
    sizes = jnp.diff(ends, prepend=jnp.zeros((), jnp.int32))
    return Order(choice, place.reshape(experts_NA.shape), sizes)


@jax.custom_vjp
def spread(x_ND: jax.Array, order: Order) -> jax.Array:
    """The tokens in sorted order, each as often as it chose: `[R, D]`."""
    return x_ND[order.choice_R // order.place_NA.shape[1]]


@jax.custom_vjp
def collect(y_RD: jax.Array, order: Order) -> jax.Array:
    """The sum of each token's rows, in float32 and then in their format: `[N, D]`."""
    return jnp.sum(y_RD[order.place_NA].astype(jnp.float32), axis=1).astype(y_RD.dtype)


@jax.custom_vjp
def spread_choices(weights_NA: jax.Array, order: Order) -> jax.Array:
    """A number of each choice in sorted order: `[R]`."""
    return weights_NA.reshape(-1)[order.choice_R]


spread.defvjp(lambda x_ND, order: (spread(x_ND, order), order), lambda order, dy_RD: (collect(dy_RD, order), None))
collect.defvjp(lambda y_RD, order: (collect(y_RD, order), order), lambda order, dx_ND: (spread(dx_ND, order), None))
spread_choices.defvjp(
    lambda weights_NA, order: (spread_choices(weights_NA, order), order),
    lambda order, dw_R: (dw_R[order.place_NA], None),
)
