"""Rotary position embeddings (RoPE, arXiv:2104.09864), in the half-split layout of the public Llama weights; sinusoidal
ones, of positions and of distances; and the slopes of ALiBi (arXiv:2108.12409)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.models.config import ModelConfig


def rope_frequencies(config: ModelConfig, *, local: bool = False) -> tuple[np.ndarray, float]:
    """The angle by which each channel pair turns from one position to the next, `[rope_width / 2]` float32, and the
    factor on its cosines and sines (1 but for YaRN). `local`: in local layers, by `local_rope_theta` if given.

    In float32 and in the order of transformers' operations: public weights were trained with these very numbers.
    """
    width, theta, scaling = config.rope_width, config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        return _unscaled(config.local_rope_theta, width), 1.0
    if scaling is None:
        return _unscaled(theta, width), 1.0
    numbers = scaling.filled_in.model_dump(exclude={"kind", "mscale", "mscale_all_dim"}, exclude_none=True)
    return {"linear": _linear, "ntk": _ntk, "yarn": _yarn, "llama3": _llama3}[scaling.kind](theta, width, **numbers)


def _unscaled(theta: float, width: int) -> np.ndarray:
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1) / np.float32(theta) ** exponents


def _linear(theta: float, width: int, factor: float) -> tuple[np.ndarray, float]:
    return _unscaled(theta, width) / np.float32(factor), 1.0


def _ntk(theta: float, width: int, factor: float) -> tuple[np.ndarray, float]:
    """By the base whose longest wavelength is `factor` times as long (arXiv:2309.00071, "NTK-aware")."""
    return _unscaled(theta * factor ** (width / (width - 2)), width), 1.0


def _llama3(
    theta: float,
    width: int,
    factor: float,
    original_max_seq_len: int,
    low_freq_factor: float,
    high_freq_factor: float,
) -> tuple[np.ndarray, float]:
    """Long wavelengths stretched, short ones kept, and between them a mean of both by where between they lie
    (`apply_scaling` of Llama 3.1's code)."""
    plain = _unscaled(theta, width)
    stretched = plain / np.float32(factor)
    wavelengths = np.float32(2 * math.pi) / plain
    periods = np.float32(original_max_seq_len) / wavelengths
    kept = (periods - np.float32(low_freq_factor)) / np.float32(high_freq_factor - low_freq_factor)
    between = (1 - kept) * stretched + kept * plain
    short = wavelengths < original_max_seq_len / high_freq_factor
    return np.where(
        wavelengths > original_max_seq_len / low_freq_factor, stretched, np.where(short, plain, between)
    ), 1.0


def _yarn(
    theta: float,
    width: int,
    factor: float,
    original_max_seq_len: int,
    beta_fast: float,
    beta_slow: float,
    attention_factor: float,
    truncate: bool,
) -> tuple[np.ndarray, float]:
    """Pairs that turn often in the original length kept, those that turn seldom stretched, and a ramp between them
    (arXiv:2309.00071, "NTK-by-parts"), whose ends are whole pairs as in YaRN's code where `truncate` says so."""

    def pair_of(turns: float) -> float:
        """The pair, not a whole number, that turns so often in the original length."""
        return width * math.log(original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    rise = last - first or 0.001
    share = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(first)) / np.float32(rise), 0, 1)
    plain = _unscaled(theta, width)
    return plain / np.float32(factor) * share + plain * (1 - share), attention_factor


def rope_angles(positions_BT: jax.Array, config: ModelConfig, *, local: bool = False) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, 1, rope_width / 2]`, float32, of each position times each frequency."""
    frequencies, factor = rope_frequencies(config, local=local)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return factor * jnp.cos(angles)[:, :, None, :], factor * jnp.sin(angles)[:, :, None, :]


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns channel pairs (i, i + R/2) of the first R of every head by its position's angles, where there are R / 2 of
    them; computed in float32."""
    half = cos.shape[-1]
    x = x_BTHK.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x_BTHK.dtype)


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Sines, then cosines, of each position at `width` / 2 wavelengths from 2 pi to 20,000 pi, `[B, T, width]` float32
    (arXiv:1706.03762, section 3.5, which has them in turn; its code has them so)."""
    frequencies = (10_000.0 ** -(np.arange(0, width, 2) / width)).astype(np.float32)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def distance_sinusoids(length: int, width: int, dtype: jnp.dtype, *, causal: bool) -> jax.Array:
    """The same of every distance `query - key` in rows of `length`, `[L, width]` (Transformer-XL, arXiv:1901.02860,
    section 3.3): from the farthest key behind the query to itself, or, where not causal, to the farthest ahead."""
    distance_L = length - 1 - jnp.arange(length if causal else 2 * length - 1, dtype=jnp.int32)
    return sinusoids(distance_L[None], width)[0].astype(dtype)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """By how much each head lowers a score for every position between query and key, `[n_heads]` float32 (ALiBi,
    arXiv:2108.12409, section 3).

    Powers of 2^(-8 / n) for n heads, a power of two; for other numbers those of the next lower power of two, and then
    every second of those of the next higher, as in the paper's code.
    """
    lower = 2 ** (n_heads.bit_length() - 1)
    exponents = [8 * i / lower for i in range(1, lower + 1)]
    exponents += [8 * i / (2 * lower) for i in range(1, 2 * (n_heads - lower), 2)]
    return np.exp2(-np.array(exponents)).astype(np.float32)
