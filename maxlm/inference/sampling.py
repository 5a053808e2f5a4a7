"""Choosing the next token: greedy, temperature, top-k, top-p. Pure functions of float32 logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from maxlm.errors import ConfigError
from maxlm.parallel.axes import activation_spec, constrain

# Logits over a temperature below this would leave float32.
COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in this order: temperature, then the `top_k` likeliest, then of those the fewest that make
    up `top_p` of the probability (nucleus sampling, arXiv:1904.09751).

    Temperature 0 is greedy: always the likeliest token, of equals the one of the lower id. Raises ConfigError for a
    setting out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not (self.temperature == 0 or COLDEST <= self.temperature < math.inf):
            raise ConfigError(
                f"temperature = {self.temperature}: give 0 for the likeliest token, or at least {COLDEST:g} to sample"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k}: at least 1 token must be left")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: a probability above 0 and at most 1")


def filtered(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """What may be sampled: logits over the temperature, less the row's largest, -inf where filtered out; and tokens.

    Both `[B, V]`, or `[B, top_k]`, likeliest first, where `top_k` or `top_p` is set. The temperature is above 0.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / sampling.temperature
    n_tokens = scaled_BV.shape[-1]
    # Rounding must not take the last tokens from all of the probability.
    top_p = None if sampling.top_p == 1 else sampling.top_p
    if sampling.top_k is None and top_p is None:
        return scaled_BV, jnp.broadcast_to(jnp.arange(n_tokens, dtype=jnp.int32), scaled_BV.shape)
    values_BC, tokens_BC = jax.lax.top_k(scaled_BV, min(sampling.top_k or n_tokens, n_tokens))
    if top_p is not None:
        probabilities_BC = jax.nn.softmax(values_BC, axis=-1)
        before_BC = jnp.cumsum(probabilities_BC, axis=-1) - probabilities_BC
        # The likeliest token stays, however small top_p is: nothing is before it.
        keep_BC = (before_BC < top_p) | (jnp.arange(values_BC.shape[-1]) == 0)
        values_BC = jnp.where(keep_BC, values_BC, -jnp.inf)
    return values_BC, tokens_BC


def sample(
    logits_BV: jax.Array, sampling: Sampling, seed: jax.Array, rows_B: jax.Array, positions_B: jax.Array
) -> jax.Array:
    """The next token of each row, int32 `[B]`; under a mesh, in a jitted function.

    The random numbers of a token come from (`seed`, its row, its position) alone, so they do not depend on what else is
    in the batch, nor on the mesh.
    """

    def local(logits_BV, seed, rows_B, positions_B):
        if sampling.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        values_BC, tokens_BC = filtered(logits_BV, sampling)

        def one(values_C, tokens_C, row, position):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
            return tokens_C[jax.random.categorical(key, values_C)]

        return jax.vmap(one)(values_BC, tokens_BC, rows_B, positions_B)

    rows = activation_spec("batch")
    logits_BV = constrain(logits_BV, "batch", None)
    rows_B, positions_B = constrain(rows_B, "batch"), constrain(positions_B, "batch")
    return jax.shard_map(local, in_specs=(activation_spec("batch", None), PartitionSpec(), rows, rows), out_specs=rows)(
        logits_BV, seed, rows_B, positions_B
    )
