"""One transformer layer, and stacks of equal ones run by a scan under a remat policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.models.attention import Attention, Context, LayerCache
from maxlm.models.config import ModelConfig, RematConfig
from maxlm.models.layers import Initializer, model_norm
from maxlm.models.mlp import MLP
from maxlm.models.stacks import LayerKind, Segment
from maxlm.parallel.axes import mesh_axes, names_in


class Block(nnx.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)); in parallel, both of the same x."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: jnp.dtype, init: Initializer):
        self.parallel = config.parallel_residual
        self.attention_norm = model_norm(config, init.at("attention_norm"))
        self.attention = Attention(config, kind, dtype, init.at("attention"))
        self.mlp_norm = model_norm(config, init.at("mlp_norm"))
        self.mlp = MLP(config, dtype, init.at("mlp"))

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The residual stream after the layer, and the layer's cache."""
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), context, cache)
        if self.parallel:
            return x_BTD + y_BTD + self.mlp(self.mlp_norm(x_BTD), context), cache
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), context), cache


Caches = dict[str, LayerCache]
"""The cache of every stack, by its name."""


def run_segment(
    segment: Segment,
    blocks: Mapping[str, Block],
    x_BTD: jax.Array,
    context: Context,
    caches: Caches | None,
    remat: RematConfig,
) -> tuple[jax.Array, Caches | None]:
    """Runs a segment's layers in order; of `blocks`, parameters (and caches) are stacked over the layers of a stack.

    A scan over the repeats of the pattern, so that neither the program nor its compilation grows with depth.
    """
    names = [stack.name for stack in segment]
    graphs, stacked = zip(*(nnx.split(blocks[name]) for name in names), strict=True)

    def layer(graph, x_BTD, params, cache):
        return nnx.merge(graph, params)(x_BTD, context, cache)

    if caches is None:
        # `prevent_cse` guards against XLA merging the recomputation with the forward pass; a scan already does.
        trained = jax.checkpoint(layer, policy=remat_policy(remat), prevent_cse=False, static_argnums=0)

        def pattern(x_BTD, params):
            for graph, own in zip(graphs, params, strict=True):
                x_BTD, _ = trained(graph, x_BTD, own, None)
            return x_BTD, None

        return jax.lax.scan(pattern, x_BTD, stacked)[0], None

    def cached_pattern(carry, inputs):
        """Each layer's cache is taken from its stack and put back. As inputs and outputs of the scan, the stacks would
        be there twice, and be copied whole with every token."""
        (x_BTD, caches), (number, params) = carry, inputs
        written = {}
        for name, graph, own in zip(names, graphs, params, strict=True):
            cache = jax.tree.map(
                lambda stack: jax.lax.dynamic_index_in_dim(stack, number, keepdims=False), caches[name]
            )
            x_BTD, cache = layer(graph, x_BTD, own, cache)
            put = partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
            written[name] = jax.tree.map(put, caches[name], cache)
        return (x_BTD, written), None

    numbers = jnp.arange(len(segment[0].layers), dtype=jnp.int32)
    carry = (x_BTD, {name: caches[name] for name in names})
    return jax.lax.scan(cached_pattern, carry, (numbers, stacked))[0]


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
        return keep(primitive, *inputs, **params)

    return policy


def _batch_axes_in(spec: jax.sharding.PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in names_in(entry)} & set(mesh_axes("batch"))
