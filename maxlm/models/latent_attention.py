"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Shape letters besides those of `layers.py`: C width of the latent of keys and values, R channels that RoPE turns, N
those that it leaves alone (K = N + R), W width of a value head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels.attention import attention
from maxlm.models.attention import Context, write_rows
from maxlm.models.config import ModelConfig
from maxlm.models.layers import Initializer, Norm, project, use
from maxlm.models.masking import mask_of
from maxlm.models.positions import rotate
from maxlm.models.stacks import LayerKind
from maxlm.parallel.axes import activation_spec, constrain

# DeepSeek's code and transformers' leave the eps of these norms at their default, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class LatentCache(NamedTuple):
    """The normed latents and turned shared keys of one layer (or, stacked, of all), by position."""

    latent_BSC: jax.Array
    rope_BSR: jax.Array


class LatentAttention(nnx.Module):
    """Keys and values of all heads out of one latent, and a key that all share for RoPE.

    Without a cache keys and values are expanded, and the usual kernels attend. With one, queries go into the latent
    space instead, where a latent is key and value of all heads at once: nothing of a head is kept or made again.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: jnp.dtype, init: Initializer):
        assert config.latent is not None
        self.config, self.latent, self.kind, self.dtype = config, config.latent, kind, dtype
        self.mask = mask_of(config, kind)
        scaling = config.rope_scaling
        self.scale = self.latent.qk_head_dim**-0.5 * (1.0 if scaling is None else scaling.score_factor)
        d, h, std = config.d_model, config.n_heads, config.init_std
        c, k, w = self.latent.kv_rank, self.latent.qk_head_dim, self.latent.v_head_dim
        out_std = config.residual_init_std
        if self.latent.q_rank is None:
            self.q = init.normal("q", (d, h, k), ("embed", "heads", "head_dim"), std)
        else:
            q_rank = self.latent.q_rank
            self.q_down = init.normal("q_down", (d, q_rank), ("embed", "latent"), std)
            self.q_norm = Norm(q_rank, "rms", LATENT_NORM_EPS, init.at("q_norm"))
            self.q_up = init.normal("q_up", (q_rank, h, k), ("rank", "heads", "head_dim"), std)
        self.kv_down = init.normal("kv_down", (d, self.latent.cached_width), ("embed", "latent"), std)
        self.kv_norm = Norm(c, "rms", LATENT_NORM_EPS, init.at("kv_norm"))
        heads = (c, h, self.latent.nope_head_dim + w)
        self.kv_up = init.normal("kv_up", heads, ("rank", "heads", "head_dim"), std)
        self.o = init.normal("o", (h, w, d), ("heads", "head_dim", "embed"), out_std)
        if config.attention_out_bias:
            self.o_bias = init.full((d,), ("norm",), 0.0)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LatentCache | None
    ) -> tuple[jax.Array, LatentCache | None]:
        """Attention's addition to the residual stream, and the cache with these positions written."""
        x_BTD = constrain(x_BTD, "batch", "length", "embed")
        q_BTHN, q_BTHR = self._queries(x_BTD, context)
        latent_BTC, rope_BTR = self._latents(x_BTD, context)
        if cache is None:
            o_BTHW = self._attend(q_BTHN, q_BTHR, latent_BTC, rope_BTR, context)
        else:
            cache = LatentCache(
                write_rows(cache.latent_BSC, latent_BTC, context.lengths_B, "latent"),
                write_rows(cache.rope_BSR, rope_BTR, context.lengths_B, "head_dim"),
            )
            o_BTHW = self._attend_cached(q_BTHN, q_BTHR, cache, context)
        y_BTD = project(o_BTHW, self.o, self.dtype, *context.residual)
        if self.config.attention_out_bias:
            y_BTD = y_BTD + use(self.o_bias, self.dtype)
        return checkpoint_name(y_BTD, "attention_out"), cache

    def empty_cache(self, layers: int, batch: int, length: int) -> LatentCache:
        """Zeros for the `layers` layers that are stacked here and `batch` rows of up to `length` positions."""

        def zeros(width: int, name: str) -> jax.Array:
            spec = activation_spec(None, "batch", "length", name)
            return jnp.zeros((layers, batch, length, width), self.dtype, out_sharding=spec)

        return LatentCache(zeros(self.latent.kv_rank, "latent"), zeros(self.latent.rope_head_dim, "head_dim"))

    def _queries(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Channels that RoPE leaves alone, and those that it has turned (equations 37 to 39)."""
        if self.latent.q_rank is None:
            q_BTHK = project(x_BTD, self.q, self.dtype)
        else:
            latent = checkpoint_name(project(x_BTD, self.q_down, self.dtype), "q_latent")
            q_BTHK = project(self.q_norm(latent), self.q_up, self.dtype)
        q_BTHK, n = checkpoint_name(q_BTHK, "q"), self.latent.nope_head_dim
        return q_BTHK[..., :n], self._turn(q_BTHK[..., n:], context)

    def _latents(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """All that later positions need of these: the normed latent and the shared, turned key (41, 43)."""
        down = checkpoint_name(project(x_BTD, self.kv_down, self.dtype), "kv_latent")
        c = self.latent.kv_rank
        return self.kv_norm(down[..., :c]), self._turn(down[..., None, c:], context)[:, :, 0]

    def _turn(self, x_BTHR: jax.Array, context: Context) -> jax.Array:
        angles = context.angles(self.kind)
        assert angles is not None
        return rotate(x_BTHR, *angles)

    def _attend(self, q_BTHN, q_BTHR, latent_BTC, rope_BTR, context: Context) -> jax.Array:
        """By keys and values of every head (equations 40 to 46): for training, where they are needed once."""
        kv_BTHX, n = project(latent_BTC, self.kv_up, self.dtype), self.latent.nope_head_dim
        spec = activation_spec("batch", "length", "heads", "head_dim")
        shared = jnp.broadcast_to(rope_BTR[:, :, None], q_BTHR.shape, out_sharding=spec)
        q_BTHK = jnp.concatenate([q_BTHN, q_BTHR], axis=-1)
        k_BTHK = jnp.concatenate([checkpoint_name(kv_BTHX[..., :n], "k"), shared], axis=-1)
        return attention(
            q_BTHK,
            k_BTHK,
            checkpoint_name(kv_BTHX[..., n:], "v"),
            mask=self.mask,
            segments_BT=context.segments_BT,
            prefix_BS=context.prefix_BS,
            softcap=self.config.attention_softcap,
            scale=self.scale,
            implementation=self.config.attention_implementation,
            context=self.config.context_attention,
        )

    def _attend_cached(self, q_BTHN, q_BTHR, cache: LatentCache, context: Context) -> jax.Array:
        """By the latents themselves: a head's score with a latent is that of its query, multiplied by the head's key
        projection, and its output the mean latent, multiplied by its value projection (the matrices that section
        2.1.2 absorbs)."""
        assert context.lengths_B is not None
        up_CHX, n = use(self.kv_up, self.dtype), self.latent.nope_head_dim
        q_BTHC = jnp.einsum("bthn,chn->bthc", q_BTHN, up_CHX[..., :n])
        s_BHTS = jnp.einsum("bthc,bsc->bhts", q_BTHC, cache.latent_BSC, preferred_element_type=jnp.float32)
        s_BHTS += jnp.einsum("bthr,bsr->bhts", q_BTHR, cache.rope_BSR, preferred_element_type=jnp.float32)
        s_BHTS *= self.scale
        if (softcap := self.config.attention_softcap) is not None:
            s_BHTS = softcap * jnp.tanh(s_BHTS / softcap)
        T, S = s_BHTS.shape[2:]
        q_index_BT1 = jnp.arange(T)[None, :, None] + context.lengths_B[:, None, None]
        kv_index_11S = jnp.arange(S)[None, None, :]
        allowed_BTS = self.mask.allows(q_index_BT1, kv_index_11S)
        if context.prefix_BS is not None:
            ahead_BTS = self.mask.both_ways.allows(q_index_BT1, kv_index_11S)
            allowed_BTS = allowed_BTS | (context.prefix_BS[:, None, :] & ahead_BTS)
        p_BHTS = jax.nn.softmax(jnp.where(allowed_BTS[:, None], s_BHTS, -jnp.inf), axis=-1)
        o_BTHC = jnp.einsum("bhts,bsc->bthc", p_BHTS, cache.latent_BSC.astype(jnp.float32)).astype(self.dtype)
        return jnp.einsum("bthc,chw->bthw", o_BTHC, up_CHX[..., n:])
