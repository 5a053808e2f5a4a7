"""A decoder's attention to the result of its encoder (arXiv:1706.03762, section 3.2.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.attention import attention
from maxlm.models.attention import Attention, Context, LayerCache
from maxlm.models.config import ModelConfig
from maxlm.models.layers import Initializer, project, use
from maxlm.models.stacks import LayerKind, Segment
from maxlm.parallel.axes import constrain


class CrossAttention(Attention):
    """The parameters of self-attention; queries are the decoder's, keys and values the encoder's, without positions."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer):
        super().__init__(config, LayerKind(causal=False), dtype, init)

    def keys_and_values(self, encoded_BSD: jax.Array) -> LayerCache:
        """Of all positions of the encoder's result."""
        encoded_BSD = constrain(encoded_BSD, "batch", "length", "embed")
        k_BSGK, v_BSGK = project(encoded_BSD, self.k, self.dtype), project(encoded_BSD, self.v, self.dtype)
        if self.config.attention_bias:
            k_BSGK = k_BSGK + use(self.k_bias, self.dtype)
            v_BSGK = v_BSGK + use(self.v_bias, self.dtype)
        return LayerCache(k_BSGK if self.config.qk_norm == "none" else self.k_norm(k_BSGK), v_BSGK)

    def attend(self, x_BTD: jax.Array, context: Context, cached: LayerCache | None) -> jax.Array:
        """The addition to the residual stream. `cached` are the keys and values where they were made before.

        A token attends to the encoder's tokens of its own segment; one of a cached row, to all that are no padding.
        """
        decoding = cached is not None
        if cached is None:
            if context.encoded_BSD is None:
                raise ValueError("a decoder that attends to an encoder was called without the encoder's result")
            cached = self.keys_and_values(context.encoded_BSD)
        k_BSGK, v_BSGK = cached
        q_BTHK = project(constrain(x_BTD, "batch", "length", "embed"), self.q, self.dtype)
        if self.config.attention_bias:
            q_BTHK = q_BTHK + use(self.q_bias, self.dtype)
        q_BTHK = checkpoint_name(q_BTHK if self.config.qk_norm == "none" else self.q_norm(q_BTHK), "q")
        segments_BT, kv_segments_BS = context.segments_BT, context.encoded_segments_BS
        if decoding:
            segments_BT, kv_segments_BS = jnp.ones_like(x_BTD[..., 0], jnp.int32), (kv_segments_BS != 0).astype("int32")
        o_BTHK = attention(
            q_BTHK,
            checkpoint_name(k_BSGK, "k"),
            checkpoint_name(v_BSGK, "v"),
            mask=self.mask,
            segments_BT=segments_BT,
            kv_segments_BS=kv_segments_BS,
            softcap=self.config.attention_softcap,
            scale=self.config.score_scale,
            implementation="reference" if decoding else self.config.attention_implementation,
            context=self.config.context_attention,
        )
        y_BTD = project(o_BTHK, self.o, self.dtype, *context.residual)
        if self.config.attention_out_bias:
            y_BTD = y_BTD + use(self.o_bias, self.dtype)
        return checkpoint_name(y_BTD, "attention_out")


def encoded_caches(
    segments: Sequence[Segment], blocks: Mapping[str, Any], encoded_BSD: jax.Array
) -> dict[str, LayerCache]:
    """The cross-attention keys and values of every layer, by stack, made once for all tokens to come."""

    def of(stack: str) -> LayerCache:
        graph, stacked = nnx.split(blocks[stack].cross)
        return jax.lax.map(lambda params: nnx.merge(graph, params).keys_and_values(encoded_BSD), stacked)

    return {stack.name: of(stack.name) for segment in segments for stack in segment}
