"""Tokens sorted by the expert that they go to, and what the experts made of them put together again.

Both take rows by a permutation, and so do their gradients: no two rows are ever added into one by a scatter, which is
slow, and on GPUs gives other sums each time. For one device: inside `shard_map`, or without a mesh.

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


def _spread_forward(x_ND, order):
    return spread(x_ND, order), order


def _spread_backward(order: Order, dy_RD):
    total = jnp.sum(dy_RD[order.place_NA].astype(jnp.float32), axis=1)
    return total.astype(dy_RD.dtype), None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(y_RD: jax.Array, order: Order) -> jax.Array:
    """Sorted rows by token and choice: `[N, A, D]`."""
    return y_RD[order.place_NA]


def _collect_forward(y_RD, order):
    return collect(y_RD, order), order


def _collect_backward(order: Order, dx_NAD):
    return dx_NAD.reshape(-1, dx_NAD.shape[-1])[order.choice_R], None


collect.defvjp(_collect_forward, _collect_backward)
