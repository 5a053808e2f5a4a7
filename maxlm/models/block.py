"""One transformer layer, and stacks of equal ones run by a scan under a remat policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.models.attention import Attention, Context, LayerCache
from maxlm.models.config import ModelConfig, RematConfig
from maxlm.models.latent_attention import LatentAttention, LatentCache
from maxlm.models.layers import Initializer, model_norm
from maxlm.models.mlp import MLP
from maxlm.models.moe import MoE
from maxlm.models.routing import Routing
from maxlm.models.stacks import LayerKind, Segment
from maxlm.parallel.axes import mesh_axes, names_in

Cache = LayerCache | LatentCache
"""What decoding keeps of a layer."""


def attention_of(config: ModelConfig) -> type[Attention] | type[LatentAttention]:
    """The attention that the config chooses."""
    return Attention if config.latent is None else LatentAttention


class Block(nnx.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)); in parallel, both of the same x."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: jnp.dtype, init: Initializer):
        self.parallel = config.parallel_residual
        self.attention_norm = model_norm(config, init.at("attention_norm"))
        self.attention = attention_of(config)(config, kind, dtype, init.at("attention"))
        self.mlp_norm = model_norm(config, init.at("mlp_norm"))
        if kind.experts:
            self.moe = MoE(config, dtype, init.at("moe"))
        else:
            self.mlp = MLP(config, dtype, init.at("mlp"))

    def __call__(self, x_BTD: jax.Array, context: Context, cache: Any) -> tuple[jax.Array, Any, Routing | None]:
        """The residual stream after the layer, the layer's cache, and what its router did if it has experts."""
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), context, cache)
        if self.parallel:
            z_BTD, routing = self._feed_forward(x_BTD, context)
            return x_BTD + y_BTD + z_BTD, cache, routing
        x_BTD = x_BTD + y_BTD
        z_BTD, routing = self._feed_forward(x_BTD, context)
        return x_BTD + z_BTD, cache, routing

    def _feed_forward(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Routing | None]:
        x_BTD = self.mlp_norm(x_BTD)
        return self.moe(x_BTD, context) if hasattr(self, "moe") else (self.mlp(x_BTD, context), None)


# Products of routed experts that policy `dots` keeps.
EXPERT_PRODUCTS = ("expert_gate", "expert_up")

Caches = dict[str, Cache]
"""The cache of every stack, by its name."""


def run_segment(
    segment: Segment,
    blocks: Mapping[str, Block],
    x_BTD: jax.Array,
    context: Context,
    caches: Caches | None,
    remat: RematConfig,
) -> tuple[jax.Array, Caches | None, dict[str, Routing]]:
    """Runs a segment's layers in order; of `blocks`, parameters (and caches) are stacked over the layers of a stack.

    Returns the residual stream, the caches, and by stack what its routers did, stacked too, where it has experts.
    A scan over the repeats of the pattern, so that neither the program nor its compilation grows with depth.
    """
    names = [stack.name for stack in segment]
    graphs, stacked = zip(*(nnx.split(blocks[name]) for name in names), strict=True)
    stacked_caches = (None,) * len(names) if caches is None else tuple(caches[name] for name in names)

    def layer(graph, x_BTD, params, cache):
        return nnx.merge(graph, params)(x_BTD, context, cache)

    if caches is None:
        # `prevent_cse` guards against XLA merging the recomputation with the forward pass; a scan already does.
        layer = jax.checkpoint(layer, policy=remat_policy(remat), prevent_cse=False, static_argnums=0)

    def pattern(x_BTD, inputs):
        written, routed = [], []
        for graph, params, cache in zip(graphs, *inputs, strict=True):
            x_BTD, cache, routing = layer(graph, x_BTD, params, cache)
            written.append(cache)
            routed.append(routing)
        return x_BTD, (tuple(written), tuple(routed))

    x_BTD, (written, routed) = jax.lax.scan(pattern, x_BTD, (stacked, stacked_caches))
    routings = {name: routing for name, routing in zip(names, routed, strict=True) if routing is not None}
    return x_BTD, None if caches is None else dict(zip(names, written, strict=True)), routings


def remat_policy(remat: RematConfig) -> Callable[..., Any]:
    """The policy for `jax.checkpoint`. Gathered and cast weights are never kept, whatever the policy: kept, they would
    be a second, whole copy of the model on every device."""
    policies = jax.checkpoint_policies
    keep = {
        "none": policies.everything_saveable,
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(remat.names),
            names_which_can_be_offloaded=list(remat.offload),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat.policy]

    def policy(primitive: Any, *inputs: Any, **params: Any) -> Any:
        if primitive.name == "convert_element_type":
            return False
        if primitive.name == "reshard" and not _batch_axes_in(params["dst_sharding"].spec):
            return False
        if primitive.name == "pvary":
            return False  # the same array
        if primitive.name == "all_gather" and set(params["axis_name"]) <= set(mesh_axes("batch")):
            return False  # of experts' weights
        if remat.policy == "dots" and primitive.name == "name" and params["name"] in EXPERT_PRODUCTS:
            return True  # they are not made by one plain dot
        return keep(primitive, *inputs, **params)

    return policy


def _batch_axes_in(spec: jax.sharding.PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in names_in(entry)} & set(mesh_axes("batch"))
