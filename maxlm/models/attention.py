"""Multi-head, grouped-query and multi-query self-attention, with or without a key-value cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.attention import attention
from maxlm.kernels.attention_bias import Bias
from maxlm.kernels.attention_relative import Relative
from maxlm.models.config import ModelConfig
from maxlm.models.layers import HeadsNorm, Initializer, Norm, project, use
from maxlm.models.masking import mask_of
from maxlm.models.positions import rotate
from maxlm.models.stacks import LayerKind
from maxlm.parallel.axes import activation_spec, constrain

Angles = tuple[jax.Array, jax.Array]


class LayerCache(NamedTuple):
    """The keys and values of one layer (or, stacked, of all) for the positions seen so far, by position."""

    k_BSGK: jax.Array
    v_BSGK: jax.Array


class Context(NamedTuple):
    """What every layer of a forward pass shares. `lengths_B` is given when decoding: positions already in the cache."""

    rope: Angles | None
    """cosines and sines for global layers"""
    local_rope: Angles | None
    """for local layers"""
    segments_BT: jax.Array | None
    lengths_B: jax.Array | None = None
    bias: Bias | None = None
    """added to the scores of self-attention"""
    encoded_BSD: jax.Array | None = None
    """the encoder's result, which a decoder attends to"""
    encoded_segments_BS: jax.Array | None = None
    prefix_BS: jax.Array | None = None
    """bool: keys that self-attention also sees from before them"""
    noise_key: jax.Array | None = None
    """in training, what routers' noise is made from: the step's, and within a layer the layer's"""
    distances_LD: jax.Array | None = None
    """sinusoids of distances between query and key, where positions are Transformer-XL's and nothing is cached"""

    def angles(self, kind: LayerKind) -> Angles | None:
        """Cosines and sines for a layer, where positions are RoPE's."""
        return self.local_rope if kind.local else self.rope

    @property
    def residual(self) -> tuple[str, str, str]:
        """Logical axes of the residual stream: single tokens of a decoding step cannot be spread over devices."""
        return ("batch", "residual_length" if self.lengths_B is None else "length", "embed")


class Attention(nnx.Module):
    """Projections, optional q and k norms, RoPE, and the attention kernel."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: jnp.dtype, init: Initializer):
        self.config, self.kind, self.dtype = config, kind, dtype
        self.mask = mask_of(config, kind)
        d, h, g, k = config.d_model, config.n_heads, config.kv_heads, config.head_width
        out_std = config.residual_init_std
        self.q = init.normal("q", (d, h, k), ("embed", "heads", "head_dim"), config.hidden_init_std)
        self.k = init.normal("k", (d, g, k), ("embed", "kv_heads", "head_dim"), config.hidden_init_std)
        self.v = init.normal("v", (d, g, k), ("embed", "kv_heads", "head_dim"), config.hidden_init_std)
        self.o = init.normal("o", (h, k, d), ("heads", "head_dim", "embed"), out_std)
        if config.attention_bias:
            self.q_bias = init.full((h, k), ("heads", "head_dim"), 0.0)
            self.k_bias = init.full((g, k), ("kv_heads", "head_dim"), 0.0)
            self.v_bias = init.full((g, k), ("kv_heads", "head_dim"), 0.0)
        if config.attention_out_bias:
            self.o_bias = init.full((d,), ("norm",), 0.0)
        if config.attention_sinks:
            self.sinks = init.full((h,), ("heads",), 0.0)
        if config.qk_norm == "head":
            offset = config.norm_unit_offset
            self.q_norm = Norm(k, "rms", config.norm_eps, init.at("q_norm"), unit_offset=offset)
            self.k_norm = Norm(k, "rms", config.norm_eps, init.at("k_norm"), unit_offset=offset)
        if config.qk_norm == "all":
            self.q_norm = HeadsNorm(h, "heads", config, init.at("q_norm"))
            self.k_norm = HeadsNorm(g, "kv_heads", config, init.at("k_norm"))

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any]:
        """Attention's addition to the residual stream, and the cache with these positions written."""
        x_BTD = constrain(x_BTD, "batch", "length", "embed")
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD, context)
        q_BTHK, k_BTGK, v_BTGK = (
            checkpoint_name(value, name) for value, name in ((q_BTHK, "q"), (k_BTGK, "k"), (v_BTGK, "v"))
        )
        if cache is not None:
            cache = cache._replace(
                k_BSGK=write_rows(cache.k_BSGK, k_BTGK, context.lengths_B, "kv_heads", "head_dim"),
                v_BSGK=write_rows(cache.v_BSGK, v_BTGK, context.lengths_B, "kv_heads", "head_dim"),
            )
            k_BTGK, v_BTGK = cache.k_BSGK, cache.v_BSGK
        o_BTHK = self._attend(q_BTHK, k_BTGK, v_BTGK, context, cache)
        y_BTD = project(o_BTHK, self.o, self.dtype, *context.residual)
        if self.config.attention_out_bias:
            y_BTD = y_BTD + use(self.o_bias, self.dtype)
        return checkpoint_name(y_BTD, "attention_out"), cache

    def empty_cache(self, layers: int, batch: int, length: int) -> Any:
        """Zeros for the `layers` layers that are stacked here and `batch` rows of up to `length` positions."""
        spec = activation_spec(None, "batch", "length", "kv_heads", "head_dim")
        shape = (layers, batch, length, self.config.kv_heads, self.config.head_width)
        zeros = jnp.zeros(shape, self.dtype, out_sharding=spec)
        return LayerCache(zeros, zeros)

    def _attend(
        self, q_BTHK, k_BSGK, v_BSGK, context: Context, cache: Any, relative: Relative | None = None
    ) -> jax.Array:
        """Each query's average of the values; with a cache, keys and values are what it holds."""
        return attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            mask=self.mask,
            segments_BT=context.segments_BT,
            prefix_BS=context.prefix_BS,
            bias=context.bias,
            relative=relative,
            sinks_H=use(self.sinks, jnp.float32) if self.config.attention_sinks else None,
            softcap=self.config.attention_softcap,
            scale=self.config.score_scale,
            q_offset_B=context.lengths_B,
            implementation=self.config.attention_implementation,
            context=self.config.context_attention,
        )

    def _project(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_BTHK = project(x_BTD, self.q, self.dtype)
        k_BTGK = project(x_BTD, self.k, self.dtype)
        v_BTGK = project(x_BTD, self.v, self.dtype)
        if self.config.attention_bias:
            q_BTHK = q_BTHK + use(self.q_bias, self.dtype)
            k_BTGK = k_BTGK + use(self.k_bias, self.dtype)
            v_BTGK = v_BTGK + use(self.v_bias, self.dtype)
        if self.config.qk_norm != "none":
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        angles = context.angles(self.kind)
        if angles is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *angles), rotate(k_BTGK, *angles)
        return q_BTHK, k_BTGK, v_BTGK


def write_rows(cached_BS: jax.Array, new_BT: jax.Array, lengths_B: jax.Array | None, *logical: str) -> jax.Array:
    """Writes new positions of each row behind the `lengths_B` that it already has; `logical` names the axes after B, S.

    `cached_BS [B, S, ...]`, `new_BT [B, T, ...]`.
    """

    def local(cached_BS, new_BT, lengths_B):
        def row(cached, new, length):
            return jax.lax.dynamic_update_slice(cached, new, (length, *(0,) * len(logical)))

        return jax.vmap(row)(cached_BS, new_BT.astype(cached_BS.dtype), lengths_B)

    spec = activation_spec("batch", "length", *logical)
    write = jax.shard_map(local, in_specs=(spec, spec, activation_spec("batch")), out_specs=spec)
    return write(cached_BS, new_BT, lengths_B)
