"""One transformer layer, and stacks of equal ones run by a scan under a remat policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.models.attention import Attention, Context, LayerCache
from maxlm.models.config import ModelConfig, RematConfig
from maxlm.models.cross_attention import CrossAttention
from maxlm.models.latent_attention import LatentAttention, LatentCache
from maxlm.models.layers import Initializer, Norm, model_norm
from maxlm.models.mlp import MLP
from maxlm.models.moe import MoE
from maxlm.models.relative_attention import RelativeAttention, RelativeCache
from maxlm.models.routing import Routing
from maxlm.models.stacks import LayerKind, Segment, Stack
from maxlm.parallel.axes import expert_axes, names_in, token_axes

Cache = LayerCache | RelativeCache | LatentCache
"""What decoding keeps of a layer."""


def attention_of(config: ModelConfig) -> type[Attention] | type[LatentAttention]:
    """The attention that the config chooses."""
    if config.latent is not None:
        return LatentAttention
    return RelativeAttention if config.positions == "transformer_xl" else Attention


class Block(nnx.Module):
    """A layer: attention, in decoders of encoder-decoders attention to the encoder, then the feed-forward block, each
    added to the residual stream with norms where the config places them; in parallel, both of the same x."""

    def __init__(self, config: ModelConfig, kind: LayerKind, dtype: jnp.dtype, init: Initializer):
        self.config, self.kind = config, kind
        self.attention = attention_of(config)(config, kind, dtype, init.at("attention"))
        if kind.experts:
            self.moe = MoE(config, dtype, init.at("moe"))
        else:
            self.mlp = MLP(config, dtype, init.at("mlp"))
        if config.norms_before:
            self.attention_norm = model_norm(config, init.at("attention_norm"))
            self.mlp_norm = model_norm(config, init.at("mlp_norm"))
        if config.norms_after:
            self.attention_out_norm = model_norm(config, init.at("attention_out_norm"))
            self.mlp_out_norm = model_norm(config, init.at("mlp_out_norm"))
        if kind.cross:
            self.cross = CrossAttention(config, dtype, init.at("cross"))
            if config.norms_before:
                self.cross_norm = model_norm(config, init.at("cross_norm"))
            if config.norms_after:
                self.cross_out_norm = model_norm(config, init.at("cross_out_norm"))

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Any, encoded: LayerCache | None = None
    ) -> tuple[jax.Array, Any, Routing | None]:
        """The residual stream after the layer, the layer's cache, and what its router did if it has experts. `encoded`:
        cross-attention's keys and values, where they were made before."""
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        before, after = self.config.norms_before, self.config.norms_after
        y_BTD, cache = self.attention(self.attention_norm(x_BTD) if before else x_BTD, context, cache)
        if self.config.parallel_residual:
            z_BTD, routing = self._feed_forward(x_BTD, context)
            return x_BTD + self._scaled(y_BTD) + self._scaled(z_BTD), cache, routing
        x_BTD = self._add(x_BTD, y_BTD, self.attention_out_norm if after else None)
        if self.kind.cross:
            y_BTD = self.cross.attend(self.cross_norm(x_BTD) if before else x_BTD, context, encoded)
            x_BTD = self._add(x_BTD, y_BTD, self.cross_out_norm if after else None)
        y_BTD, routing = self._feed_forward(x_BTD, context)
        return self._add(x_BTD, y_BTD, self.mlp_out_norm if after else None), cache, routing

    def _feed_forward(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Routing | None]:
        if self.config.norms_before:
            x_BTD = self.mlp_norm(x_BTD)
        return self.moe(x_BTD, context) if self.kind.experts else (self.mlp(x_BTD, context), None)

    def _add(self, x_BTD: jax.Array, y_BTD: jax.Array, norm: Norm | None) -> jax.Array:
        """The residual stream and a block's result."""
        if norm is None:
            return x_BTD + self._scaled(y_BTD)
        return norm(x_BTD + y_BTD) if self.config.norm_placement == "post" else x_BTD + self._scaled(norm(y_BTD))

    def _scaled(self, y_BTD: jax.Array) -> jax.Array:
        """A block's result as deep models with `model.transfer` take it."""
        return y_BTD if (factor := self.config.scales.residual) == 1 else y_BTD * factor


# Products of routed experts that policy `dots` keeps.
EXPERT_PRODUCTS = ("expert_gate", "expert_up")

Caches = dict[str, Cache]
"""The cache of every stack, by its name."""


def run_segment(
    segment: Segment,
    blocks: Mapping[str, Any],
    x_BTD: jax.Array,
    context: Context,
    caches: Caches | None,
    remat: RematConfig,
    encoded: Mapping[str, LayerCache] | None = None,
) -> tuple[jax.Array, Caches | None, dict[str, Routing]]:
    """Runs a segment's layers in order; of `blocks`, parameters (and caches) are stacked over the layers of a stack,
    unless `one_by_one` took them apart. `encoded` are cross-attention's keys and values, where there are caches.

    Returns the residual stream, the caches, and by stack what its routers did, stacked too, where it has experts.
    A scan over the repeats of the pattern, so that neither the program nor its compilation grows with depth.
    """
    names = [stack.name for stack in segment]
    if caches is not None and not isinstance(blocks[names[0]], Block):
        x_BTD, written = _run_one_by_one(segment, blocks, x_BTD, context, caches, encoded)
        return x_BTD, written, {}
    graphs, stacked = zip(*(nnx.split(blocks[name]) for name in names), strict=True)

    def layer(graph, x_BTD, params, cache, encoded, noise_key=None):
        return nnx.merge(graph, params)(x_BTD, context._replace(noise_key=noise_key), cache, encoded)

    if caches is None:
        # `prevent_cse` guards against XLA merging the recomputation with the forward pass; a scan already does.
        trained = jax.checkpoint(layer, policy=remat_policy(remat), prevent_cse=False, static_argnums=0)

        def pattern(x_BTD, inputs):
            routed = []
            for graph, own, noise_key in zip(graphs, *inputs, strict=True):
                x_BTD, _, routing = trained(graph, x_BTD, own, None, None, noise_key)
                routed.append(routing)
            return x_BTD, tuple(routed)

        noise_keys = tuple(layer_keys(context.noise_key, stack.layers) for stack in segment)
        x_BTD, routed = jax.lax.scan(pattern, x_BTD, (stacked, noise_keys))
        return x_BTD, None, {name: one for name, one in zip(names, routed, strict=True) if one is not None}

    def cached_pattern(carry, inputs):
        """Each layer's cache is taken from its stack and put back. As inputs and outputs of the scan, the stacks would
        be there twice, and be copied whole with every token."""
        (x_BTD, caches), (number, params, encoded) = carry, inputs
        written = {}
        for name, graph, own, made in zip(names, graphs, params, encoded, strict=True):
            cache = jax.tree.map(
                lambda stack: jax.lax.dynamic_index_in_dim(stack, number, keepdims=False), caches[name]
            )
            x_BTD, cache, _ = layer(graph, x_BTD, own, cache, made)
            put = partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
            written[name] = jax.tree.map(put, caches[name], cache)
        return (x_BTD, written), None

    numbers = jnp.arange(len(segment[0].layers), dtype=jnp.int32)
    stacked_encoded = tuple(None if encoded is None else encoded[name] for name in names)
    carry = (x_BTD, {name: caches[name] for name in names})
    (x_BTD, written), _ = jax.lax.scan(cached_pattern, carry, (numbers, stacked, stacked_encoded))
    return x_BTD, written, {}


def one_by_one(segment: Segment, blocks: Mapping[str, Block]) -> dict[str, list[Block]]:
    """A segment's layers with arrays of their own. Out of a stack, XLA's CPU backend copies a layer's weights before
    each product: three times the traffic of memory, which for single tokens is all the work there is."""

    def layers(stack: Stack) -> list[Block]:
        graph, stacked = nnx.split(blocks[stack.name])
        return [nnx.merge(graph, _layer_of(stacked, number)) for number in range(len(stack.layers))]

    return {stack.name: layers(stack) for stack in segment}


def _layer_of(stacked: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x[number], stacked)


def _run_one_by_one(
    segment: Segment,
    blocks: Mapping[str, Sequence[Block]],
    x_BTD: jax.Array,
    context: Context,
    caches: Caches,
    encoded: Mapping[str, LayerCache] | None,
) -> tuple[jax.Array, Caches]:
    written = {stack.name: caches[stack.name] for stack in segment}
    for number in range(len(segment[0].layers)):
        put = partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        for name in written:
            made = None if encoded is None else _layer_of(encoded[name], number)
            x_BTD, cache, _ = blocks[name][number](x_BTD, context, _layer_of(written[name], number), made)
            written[name] = jax.tree.map(put, written[name], cache)
    return x_BTD, written


def layer_keys(noise_key: jax.Array | None, layers: Sequence[int]) -> jax.Array | None:
    """The keys of layers' noise, by their numbers in the model; None without one."""
    if noise_key is None:
        return None
    return jax.vmap(partial(jax.random.fold_in, noise_key))(jnp.asarray(layers, jnp.uint32))


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
        if primitive.name == "all_gather" and set(params["axis_name"]) <= set(token_axes()) - set(expert_axes()):
            return False  # of experts' weights
        if remat.policy == "dots" and primitive.name == "name" and params["name"] in EXPERT_PRODUCTS:
            return True  # they are not made by one plain dot
        return keep(primitive, *inputs, **params)

    return policy


def _batch_axes_in(spec: jax.sharding.PartitionSpec) -> set[str]:
    return {axis for entry in spec for axis in names_in(entry)} & set(token_axes())
