"""Scaled dot-product attention over global arrays: one call, whose implementation the mesh's devices decide.

Shape letters as in `attention_reference.py`. Batches are shared over the mesh's batch axes and heads over its tensor
axis, so that every device attends with whole rows of its own heads and nothing travels; unless the mesh shares rows by
position too, see `context`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels import attention_chunked, attention_tpu, ring_attention
from maxlm.kernels.attention_bias import Bias
from maxlm.kernels.attention_exchange import EXCHANGED, exchange, exchange_back
from maxlm.kernels.attention_extras import Extras, Layout
from maxlm.kernels.attention_reference import attention_reference
from maxlm.kernels.attention_relative import Relative
from maxlm.kernels.attention_tiles import Chunking
from maxlm.kernels.manual import bring, count, on_each_device, platform
from maxlm.kernels.masks import Mask
from maxlm.parallel.axes import activation_spec, mesh_axes

IMPLEMENTATIONS = ("auto", "reference", "chunked", "pallas")
CONTEXTS = ("ring", "all_to_all")

# Lengths of the tiles of the score matrix. On a CPU they should stay in the caches: of 64 to 512, 128 x 128 was the
# fastest (docs/performance-log.md). Elsewhere a step of the scan has to be worth its launches.
CPU_TILE, ACCELERATOR_TILE = 128, 512


def attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    *,
    mask: Mask,
    segments_BT: jax.Array | None = None,
    kv_segments_BS: jax.Array | None = None,
    prefix_BS: jax.Array | None = None,
    sinks_H: jax.Array | None = None,
    bias: Bias | None = None,
    relative: Relative | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_offset_B: jax.Array | None = None,
    implementation: str = "auto",
    context: str = "ring",
) -> jax.Array:
    """Each query's average of the values, weighted by softmax of its scores with the keys that it may attend to.

    Each of the G key and value heads serves H / G query heads in order (arXiv:2305.13245). A query attends to keys
    that `mask` allows and, with segments, that have its own segment number, which is not 0. Queries with nothing to
    attend to give 0. Scores are `softcap * tanh(scale q.k / softcap)` (arXiv:2408.00118), scale 1 / sqrt(K) unless
    given, plus `bias` at the distance of key and query in their rows; with `relative`, its product of query and
    distance is added to q.k (Transformer-XL). Softmax and sums are in float32 whatever the dtypes.

    `kv_segments_BS` is `segments_BT` unless given. `prefix_BS` (bool) marks keys that may lie after the query: for
    them the mask counts without its causal part (prefix language models, arXiv:1910.10683, section 3.2.1). `sinks_H`
    has a score a head that takes its share of every query's softmax and has no value (GPT-OSS, arXiv:2508.10925).
    `q_offset_B` (int32) places query t of row b at position t + q_offset_B[b] among the keys, for decoding with a
    cache, and always runs the reference. Backward of the chunked implementation needs what is named `flash_out` and
    `flash_lse`, for remat policies that save by name.

    Where the mesh shares rows by position, `context` says how a query meets all keys of its row. `ring`: keys travel,
    rows lie in the order of `ring_plan.zigzag`, and the implementation is the chunked one. `all_to_all`: rows lie
    in their own order, and devices exchange positions for heads before and after (arXiv:2309.14509).

    Returns `[B, T, H, V]` in q's dtype, differentiable in q, k, v, sinks and the arrays of bias and relative.
    Raises ValueError on shapes that do not fit or an unknown implementation.
    """
    own_segments = kv_segments_BS is None or kv_segments_BS is segments_BT
    if segments_BT is not None and kv_segments_BS is None:
        kv_segments_BS = segments_BT
    extras = Extras(segments_BT, kv_segments_BS, prefix_BS, sinks_H, bias, relative)
    _check(q_BTHK, k_BSGK, v_BSGV, extras)
    factor: float = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    tile = CPU_TILE if platform() == "cpu" else ACCELERATOR_TILE
    how = Chunking(mask=mask, scale=factor, softcap=softcap, q_tile=tile, kv_tile=tile)
    layout, shared = Layout(), count(mesh_axes("length")) > 1
    q_BTHK, k_BSGK, v_BSGV = bring(q_BTHK, layout.queries), bring(k_BSGK, layout.keys), bring(v_BSGV, layout.keys)
    if not shared:
        return _attend(q_BTHK, k_BSGK, v_BSGV, extras, layout, how, implementation, own_segments, q_offset_B)
    if context not in CONTEXTS or q_offset_B is not None:
        raise ValueError(
            f"attention context {context!r} is not one of {', '.join(CONTEXTS)}"
            if q_offset_B is None
            else "cached decoding keeps rows whole: set mesh.context = 1"
        )
    if context == "ring":
        if implementation not in ("auto", "chunked"):
            raise ValueError(f"attention implementation {implementation!r} does not go with a ring; use 'auto'")
        return _chunked(q_BTHK, k_BSGK, v_BSGV, extras.brought(layout), how, layout)
    whole, extras = exchange(q_BTHK, k_BSGK, v_BSGV, extras)
    o_BTHV = _attend(*whole, extras, EXCHANGED, how, implementation, own_segments, None)
    return exchange_back(o_BTHV)


def _attend(
    q_BTHK,
    k_BSGK,
    v_BSGV,
    extras: Extras,
    layout: Layout,
    how: Chunking,
    implementation: str,
    own_segments: bool,
    q_offset_B,
) -> jax.Array:
    """The same with whole rows on every device."""
    extras = extras.brought(layout)
    refusal = attention_tpu.refusal(q_BTHK, k_BSGK, v_BSGV, extras, how.mask)
    chosen = choose(implementation, refusal, cached=q_offset_B is not None)
    if chosen == "reference":
        if q_offset_B is not None:
            q_offset_B = bring(q_offset_B, activation_spec("batch"))
        local = partial(attention_reference, mask=how.mask, scale=how.scale, softcap=how.softcap)
        specs = (*_specs(extras, layout), activation_spec("batch"))
        return on_each_device(local, specs, layout.queries)(q_BTHK, k_BSGK, v_BSGV, extras, q_offset_B)
    if chosen == "pallas":
        local = partial(
            attention_tpu.attend,
            mask=how.mask,
            scale=how.scale,
            softcap=how.softcap,
            own_segments=own_segments,
            interpret=platform() != "tpu",
        )
        run = on_each_device(local, _specs(extras, layout), layout.queries, checked=False)
        return run(q_BTHK, k_BSGK, v_BSGV, extras)
    return _chunked(q_BTHK, k_BSGK, v_BSGV, extras, how, layout)


def choose(implementation: str, pallas_refusal: str | None, *, cached: bool) -> str:
    """The implementation that a call runs: the asked one, except that cached decoding has only the reference.

    `auto` is the Pallas kernel on a TPU, where it takes the shapes, and the chunked one elsewhere. A ring does not come
    here: it needs the log-sum-exp of keys at an offset that only the device knows, which that kernel does not give.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if cached:
        return "reference"
    if implementation == "pallas" and pallas_refusal:
        raise ValueError(f"attention implementation 'pallas': {pallas_refusal}; use 'auto' or 'chunked'")
    if implementation == "auto":
        return "pallas" if platform() == "tpu" and pallas_refusal is None else "chunked"
    return implementation


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(q, k, v, extras: Extras, how: Chunking, layout: Layout) -> jax.Array:
    return _chunked_forward(q, k, v, extras, how, layout)[0]


def _chunked_forward(q, k, v, extras: Extras, how: Chunking, layout: Layout):
    if extras.segments_BT is not None or extras.prefix_BS is not None:
        # Tied to q, or partial evaluation of a scan over layers finds that the masks of all tiles are the same in every
        # layer and makes them ahead, all at once: gigabytes.
        q, segments, kv_segments, prefix = jax.lax.optimization_barrier((q, *extras[:3]))
        extras = extras._replace(segments_BT=segments, kv_segments_BS=kv_segments, prefix_BS=prefix)
    local = partial(_kernel(layout).forward, how=how)
    o, lse = on_each_device(local, _specs(extras, layout), (layout.queries, layout.lse))(q, k, v, extras)
    o, lse = checkpoint_name(o, "flash_out"), checkpoint_name(lse, "flash_lse")
    return o, (q, k, v, extras, o, lse)


def _chunked_backward(how: Chunking, layout: Layout, residuals, do):
    specs = _specs(residuals[3], layout)
    q_spec, kv_spec, _, extras_specs = specs
    out_specs = (q_spec, kv_spec, kv_spec, extras_specs.sinks_H, extras_specs.bias, extras_specs.relative)
    local = partial(_kernel(layout).backward, how=replace(how, token_axes=layout.token_axes))
    run = on_each_device(local, (*specs, q_spec, layout.lse, q_spec), out_specs)
    dq, dk, dv, dsinks, dbias, drelative = run(*residuals, bring(do, q_spec))
    return dq, dk, dv, Extras(sinks_H=dsinks, bias=dbias, relative=drelative)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _kernel(layout: Layout):
    """The one for rows that are whole on each device, or for those that devices share by position."""
    return ring_attention if layout.length and count(mesh_axes(layout.length)) > 1 else attention_chunked


def _specs(extras: Extras, layout: Layout):
    """Shardings of q, k, v and the extras."""
    return layout.queries, layout.keys, layout.keys, extras.specs(layout)


def _check(q, k, v, extras: Extras) -> None:
    B, _, H, K = q.shape
    S, G = k.shape[1], k.shape[2]
    problems = []
    if k.shape != (B, S, G, K):
        problems.append(f"keys {k.shape} do not fit queries {q.shape}")
    if v.shape[:3] != (B, S, G):
        problems.append(f"values {v.shape} do not fit keys {k.shape}")
    if H % G:
        problems.append(f"{H} query heads are not a multiple of {G} key heads")
    problems += extras.problems(q, k)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            problems.append(f"{name} has dtype {x.dtype}, which is not floating point")
    if problems:
        raise ValueError("attention: " + "; ".join(problems))
