"""Attention in plain jnp, on one device's share: the whole score matrix, and the truth that other implementations meet.

Shape letters: B batch, T queries, S keys, H query heads, G key and value heads, R query heads a key head (H = G R),
K width of queries and keys, V width of values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from maxlm.kernels.attention_extras import Extras
from maxlm.kernels.masks import Mask


def attention_reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    extras: Extras,
    q_offset_B: jax.Array | None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """`softmax(mask(softcap(scale q k) + bias)) v`, `[B, T, H, V]` in q's dtype; arguments as of `attention.attention`.

    With q k stand products of queries and distances. A sink is one more score of each query, whose value is 0.
    """
    B, T, H, K = q_BTHK.shape
    S, G, V = k_BSGK.shape[1], k_BSGK.shape[2], v_BSGV.shape[3]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    q_index = jnp.arange(T)[None, :, None]
    if q_offset_B is not None:
        q_index = q_index + q_offset_B[:, None, None]
    kv_index = jnp.arange(S)[None, None, :]
    s_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    if extras.relative is not None:
        s_BGRTS = s_BGRTS + extras.relative.scores(kv_index - q_index).reshape(s_BGRTS.shape)
    s_BGRTS = scale * s_BGRTS
    if softcap is not None:
        s_BGRTS = softcap * jnp.tanh(s_BGRTS / softcap)
    if extras.bias is not None:
        bias_BHTS = extras.bias.of(kv_index - q_index).swapaxes(0, 1)
        s_BGRTS = s_BGRTS + bias_BHTS.reshape(-1, G, H // G, T, S)
    allowed = _allowed(mask, extras, q_index, kv_index)[:, None, None]
    # The floor keeps a row of -inf from giving inf - inf: it becomes a row of zeros.
    top = jnp.maximum(jnp.max(jnp.where(allowed, s_BGRTS, -jnp.inf), axis=-1, keepdims=True), -1e30)
    if extras.sinks_H is not None:
        sinks_GR11 = extras.sinks_H.astype(jnp.float32).reshape(G, H // G, 1, 1)
        top = jnp.maximum(top, sinks_GR11)
    p_BGRTS = jnp.where(allowed, jnp.exp(jnp.where(allowed, s_BGRTS, top) - jax.lax.stop_gradient(top)), 0.0)
    total = jnp.sum(p_BGRTS, axis=-1, keepdims=True)
    if extras.sinks_H is not None:
        total = total + jnp.exp(sinks_GR11 - jax.lax.stop_gradient(top))
    p_BGRTS = p_BGRTS / jnp.where(total == 0.0, 1.0, total)
    o_BTGRV = jnp.einsum("bgrts,bsgv->btgrv", p_BGRTS, v_BSGV.astype(jnp.float32), preferred_element_type=jnp.float32)
    return o_BTGRV.reshape(B, T, H, V).astype(q_BTHK.dtype)


def _allowed(mask: Mask, extras: Extras, q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
    """Which query may attend to which key, `[B or 1, T, S]`."""
    allowed_BTS = mask.allows(q_index, kv_index)
    if extras.prefix_BS is not None:
        allowed_BTS = allowed_BTS | (extras.prefix_BS[:, None, :] & mask.both_ways.allows(q_index, kv_index))
    if extras.segments_BT is not None and extras.kv_segments_BS is not None:
        same_BTS = extras.segments_BT[:, :, None] == extras.kv_segments_BS[:, None, :]
        allowed_BTS = allowed_BTS & same_BTS & (extras.kv_segments_BS != 0)[:, None, :]
    return allowed_BTS
