"""Self-attention with the relative positions of Transformer-XL (arXiv:1901.02860, section 3.3), which Gopher and
Chinchilla have (arXiv:2112.11446, section 2.1).

The score of a query at i with a key at j is `(q_i + u) . k_j + (q_i + v) . (W_R R_(i-j))`: R has sines and cosines of
the distance as the original Transformer of positions, W_R is a second projection of keys, and u and v are trained
vectors of each head. Nothing is known of positions themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from maxlm.kernels.attention_relative import Relative
from maxlm.models.attention import Attention, Context, LayerCache
from maxlm.models.config import ModelConfig
from maxlm.models.layers import Initializer, use
from maxlm.models.positions import distance_sinusoids
from maxlm.models.stacks import LayerKind
from maxlm.parallel.axes import activation_spec


class RelativeCache(NamedTuple):
    """The keys and values of one layer (or, stacked, of all) by position, and the projected distances, which all rows
    share."""

    k_BSGK: jax.Array
    v_BSGK: jax.Array
    r_LHK: jax.Array


class RelativeAttention(Attention):
    """Attention whose scores have a product of query and distance beside that of query and key."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: jnp.dtype, init: Initializer):
        super().__init__(config, kind, dtype, init)
        d, h, k, std = config.d_model, config.n_heads, config.head_width, config.init_std
        self.r = init.normal("r", (d, h, k), ("embed", "heads", "head_dim"), std)
        self.content_bias = init.normal("content_bias", (h, k), ("heads", "head_dim"), std)
        self.position_bias = init.normal("position_bias", (h, k), ("heads", "head_dim"), std)

    def empty_cache(self, layers: int, batch: int, length: int) -> RelativeCache:
        """Zeros for keys and values, and the distances that decoding meets, projected once for all tokens to come."""
        graph, stacked = nnx.split(self)
        table_LD = distance_sinusoids(length, self.config.d_model, self.dtype, causal=self.kind.causal)
        r_LHK = jax.lax.map(lambda params: nnx.merge(graph, params)._projected(table_LD), stacked)
        empty = super().empty_cache(layers, batch, length)
        return RelativeCache(empty.k_BSGK, empty.v_BSGK, r_LHK)

    def _attend(
        self,
        q_BTHK: jax.Array,
        k_BSGK: jax.Array,
        v_BSGK: jax.Array,
        context: Context,
        cache: LayerCache | RelativeCache | None,
        relative: Relative | None = None,
    ) -> jax.Array:
        if isinstance(cache, RelativeCache):
            r_LHK = cache.r_LHK
        else:
            assert context.distances_LD is not None
            r_LHK = checkpoint_name(self._projected(context.distances_LD), "r")
        behind = r_LHK.shape[0] - 1 if self.kind.causal else r_LHK.shape[0] // 2
        relative = Relative(q_BTHK + use(self.position_bias, self.dtype), r_LHK, behind=behind)
        q_BTHK = q_BTHK + use(self.content_bias, self.dtype)
        return super()._attend(q_BTHK, k_BSGK, v_BSGK, context, cache, relative)

    def _projected(self, table_LD: jax.Array) -> jax.Array:
        """Distances, those that the window leaves, times W_R: `[L, H, K]`.

        The weight is not gathered: each device multiplies the rows that it stores by their sines and cosines, and the
        products, which are fewer than the weights, are summed. All rows of a batch share them.
        """
        behind = table_LD.shape[0] - 1 if self.kind.causal else table_LD.shape[0] // 2
        if (window := self.mask.window) is not None and window <= behind:
            table_LD = table_LD[behind + 1 - window : behind + window]
        stored = jax.typeof(self.r[...]).sharding.spec
        table_LD = jax.sharding.reshard(table_LD, PartitionSpec(None, *stored[:1]))
        spec = activation_spec(None, "heads", None)
        weight = self.r[...].astype(self.dtype)
        r_LHK = jnp.einsum("ld,dhk->lhk", table_LD, weight, preferred_element_type=jnp.float32, out_sharding=spec)
        return r_LHK.astype(self.dtype)
