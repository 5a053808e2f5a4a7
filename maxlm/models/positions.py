"""Rotary position embeddings (RoPE, arXiv:2104.09864), in the half-split layout of the public Llama weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_angles(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, 1, head_dim / 2]`, float32, of each position times each wavelength's frequency."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions_BT[..., None].astype(jnp.float32) / theta**exponents
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns channel pairs (i, i + K/2) of every head by its position's angles; computed in float32."""
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)
