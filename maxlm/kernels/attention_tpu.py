"""Attention on a TPU core, by JAX's splash attention (Pallas, Mosaic): tiles that the mask empties are never visited.

Global arrays' kernel contract is in `attention.py`; here is one device's share. Elsewhere than on a TPU the kernel is
interpreted, which is for tests. Shape letters as in `attention_reference.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from maxlm.kernels.attention_extras import Extras
from maxlm.kernels.masks import Mask

LANES = 128
# Lengths of the tiles that a step of the kernel's grid works on, of which the largest that divides is taken, and of the
# pieces of keys that it multiplies at a time.
TILES = (1024, 512, 256, 128)
PIECE = 512


def refusal(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, extras: Extras, mask: Mask) -> str | None:
    """Why the kernel does not take this call, or None if it does."""
    if extras.bias is not None:
        return "a bias of the scores"
    if extras.relative is not None:
        return "scores of queries with distances"
    if extras.prefix_BS is not None:
        return "a prefix"
    if mask.global_tokens:
        return f"{mask.global_tokens} global tokens"
    if mask.chunk is not None and (mask.window is not None or not mask.causal):
        return f"chunks of {mask.chunk} {'with a window' if mask.causal else 'without a causal mask'}"
    if (mask.window is not None or mask.chunk is not None) and q_BTHK.shape[1] > k_BSGK.shape[1]:
        return f"{q_BTHK.shape[1]} queries of {k_BSGK.shape[1]} keys under a window or in chunks"
    for name, length in (("queries", q_BTHK.shape[1]), ("keys", k_BSGK.shape[1])):
        if length % LANES:
            return f"{length} {name} are not a multiple of {LANES}"
    if q_BTHK.shape[-1] != v_BSGV.shape[-1]:
        return f"values of width {v_BSGV.shape[-1]} with queries of width {q_BTHK.shape[-1]}"
    if q_BTHK.shape[-1] % 64:
        return f"heads of width {q_BTHK.shape[-1]} are not a multiple of 64"
    return None


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    extras: Extras,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
    own_segments: bool,
    interpret: bool,
) -> jax.Array:
    """The output `[B, T, H, V]` in q's dtype, differentiable; its output and log-sum-exp are named `flash_out`.

    `own_segments` says that queries and keys are of the same positions, so that each query at least sees itself.
    """
    kernel = _kernel(q_BTHK.shape[1], k_BSGK.shape[1], q_BTHK.shape[2], mask, softcap, interpret)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTHK * jnp.asarray(scale, q_BTHK.dtype), k_BSGK, v_BSGV))
    # The kernel's type says that it might return residuals too.
    run: Any = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    if extras.segments_BT is None or extras.kv_segments_BS is None:
        return run(q, k, v, None, extras.sinks_H).swapaxes(1, 2)
    o_BHTV = run(q, k, v, splash.SegmentIds(q=extras.segments_BT, kv=extras.kv_segments_BS), extras.sinks_H)
    # Padding (segment 0) attends to padding in there, a query without keys to others', and to nothing by contract.
    attends_BT = extras.segments_BT != 0
    if not own_segments:
        allowed_TS = mask.allows(jnp.arange(q_BTHK.shape[1])[:, None], jnp.arange(k_BSGK.shape[1])[None, :])
        same_BTS = extras.segments_BT[:, :, None] == extras.kv_segments_BS[:, None, :]
        attends_BT = attends_BT & jnp.any(allowed_TS & same_BTS, axis=2)
    return jnp.where(attends_BT[:, :, None, None], o_BHTV.swapaxes(1, 2), 0)


def _kernel(T: int, S: int, n_heads: int, mask: Mask, softcap: float | None, interpret: bool):
    if mask.chunk is not None:
        one = splash_mask.ChunkedCausalMask((T, S), mask.chunk)
    elif mask.window is not None:
        one = splash_mask.LocalMask((T, S), (mask.window - 1, 0 if mask.causal else mask.window - 1), 0)
    else:
        one = splash_mask.CausalMask((T, S)) if mask.causal else splash_mask.FullMask((T, S))
    q_tile, kv_tile = _tile(T), _tile(S)
    piece = min(PIECE, kv_tile)
    blocks = splash.BlockSizes(
        block_q=q_tile,
        block_kv=kv_tile,
        block_kv_compute=piece,
        block_q_dkv=q_tile,
        block_kv_dkv=kv_tile,
        block_kv_dkv_compute=piece,
        block_q_dq=q_tile,
        block_kv_dq=kv_tile,
    )
    return splash.make_splash_mha(
        splash_mask.MultiHeadMask([one] * n_heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="flash_out",
        interpret=interpret,
    )


def _tile(length: int) -> int:
    return next(tile for tile in TILES if length % tile == 0)
