"""The transformer: embeddings, a stack of layers, a head; and `Model`, its functional form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.kernels.embedding import embed
from maxlm.models.attention import Angles, Context
from maxlm.models.block import Block, Caches, attention_of, run_segment
from maxlm.models.config import ModelConfig, PrecisionConfig
from maxlm.models.layers import Initializer, model_norm, use
from maxlm.models.mtp import MTPModule, run_module
from maxlm.models.positions import rope_angles
from maxlm.models.routing import Routing
from maxlm.parallel.axes import activation_spec, weight_spec

Params = dict[str, Any]


class Embedding(nnx.Module):
    """Token vectors, and position vectors where positions are learned."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer):
        self.dtype = dtype
        self.tokens = init.normal(
            "tokens", (config.padded_vocab_size, config.d_model), ("vocab", "embed"), config.init_std
        )
        if config.positions == "learned":
            shape = (config.max_seq_len, config.d_model)
            self.positions = init.normal("positions", shape, ("positions", "embed"), config.init_std)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, context: Context) -> jax.Array:
        """Vectors `[B, T, D]` in the compute format, as the residual stream is sharded."""
        _, length_axis, _ = context.residual
        x_BTD = embed(self.tokens[...], tokens_BT, dtype=self.dtype, length_axis=length_axis)
        if hasattr(self, "positions"):
            table = use(self.positions, self.dtype)
            x_BTD = x_BTD + table.at[positions_BT].get(out_sharding=activation_spec(*context.residual))
        return x_BTD


class Head(nnx.Module):
    """The output projection, of its own where embeddings are not tied."""

    def __init__(self, config: ModelConfig, init: Initializer):
        shape = (config.padded_vocab_size, config.d_model)
        self.kernel = init.normal("kernel", shape, ("vocab", "embed"), config.init_std)


class Transformer(nnx.Module):
    """A decoder-only transformer. It ends at the last norm; `head_weight` and the loss kernels make logits of that,
    a chunk at a time."""

    def __init__(self, config: ModelConfig, precision: PrecisionConfig, key: jax.Array):
        self.config, self.dtype = config, jnp.dtype(precision.compute)
        init = Initializer(key, jnp.dtype(precision.parameters))
        self.embedding = Embedding(config, self.dtype, init.at("embedding"))
        self.decoder = nnx.Dict(
            {
                stack.name: Block(
                    config, stack.kind, self.dtype, init.at(f"decoder/{stack.name}", layers=len(stack.layers))
                )
                for segment in config.segments
                for stack in segment
            }
        )
        self.final_norm = model_norm(config, init.at("final_norm"))
        if not config.tied_embeddings:
            self.head = Head(config, init.at("head"))
        if config.mtp_layers:
            self.mtp = nnx.Dict(
                {str(k): MTPModule(config, self.dtype, init.at(f"mtp/{k}")) for k in range(config.mtp_layers)}
            )

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """The normed residual stream `[B, T, D]`; a token attends to earlier ones of its own segment."""
        return self.with_routing(tokens_BT, positions_BT, segments_BT)[0]

    def with_routing(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Routing]]:
        """The same, and by stack what the routers of its layers did; nothing of stacks without experts."""
        x_BTD, _, routings = self._forward(tokens_BT, positions_BT, segments_BT, None, None)
        return x_BTD, routings

    def ahead(
        self,
        x_BTD: jax.Array,
        tokens_BT: Sequence[jax.Array],
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
    ) -> tuple[list[jax.Array], dict[str, Routing]]:
        """What each module for further tokens gives the head, from what `__call__` gave and, for module k, the token
        that lies k ahead of each position; and by module (`mtp.0`) what its router did, if it has experts."""
        context, found = Context(*self._angles(positions_BT), segments_BT), []
        routings: dict[str, Routing] = {}
        for k, tokens in enumerate(tokens_BT):
            embedded_BTD = self.embedding(tokens, positions_BT, context)
            x_BTD, routing = run_module(self.mtp[str(k)], x_BTD, embedded_BTD, context, self.config)
            found.append(x_BTD)
            if routing is not None:
                routings[f"mtp.{k}"] = jax.tree.map(lambda x: x[None], routing)
        return found, routings

    def decode(self, tokens_BT: jax.Array, caches: Caches, lengths_B: jax.Array) -> tuple[jax.Array, Caches]:
        """The same for tokens that follow `lengths_B` cached ones in each row, and the caches with them written."""
        positions_BT = lengths_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=lengths_B.dtype)[None, :]
        return self._forward(tokens_BT, positions_BT, None, caches, lengths_B)[:2]

    def head_weight(self) -> jax.Array:
        """The output projection `[V, D]` as it is stored: the kernels cast it, gather it and scatter its gradient."""
        return (self.embedding.tokens if self.config.tied_embeddings else self.head.kernel)[...]

    def _forward(self, tokens_BT, positions_BT, segments_BT, caches, lengths_B) -> tuple[jax.Array, Any, Any]:
        context = Context(*self._angles(positions_BT), segments_BT, lengths_B)
        x_BTD = self.embedding(tokens_BT, positions_BT, context)
        written: Caches = {}
        routings: dict[str, Routing] = {}
        for segment in self.config.segments:
            x_BTD, new, routed = run_segment(segment, self.decoder, x_BTD, context, caches, self.config.remat)
            written |= new or {}
            routings |= routed
        return self.final_norm(x_BTD), written, routings

    def _angles(self, positions_BT: jax.Array) -> tuple[Angles | None, Angles | None]:
        """RoPE's cosines and sines for global and for local layers."""
        config = self.config
        if config.positions != "rope":
            return None, None
        # Kept: TPUs' compiler would make sines and cosines again in every layer, and compile them for ten seconds.
        angles = jax.lax.optimization_barrier(rope_angles(positions_BT, config))
        if config.local_rope_theta is None:
            return angles, angles
        return angles, jax.lax.optimization_barrier(rope_angles(positions_BT, config, local=True))


@dataclass(frozen=True)
class Model:
    """A transformer as pure functions of a parameter tree: a nested dict of arrays with string keys.

    Every method needs a mesh: `with jax.set_mesh(mesh)`.
    """

    config: ModelConfig
    precision: PrecisionConfig

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: Transformer(self.config, self.precision, jax.random.key(0))))

    def init(self, key: jax.Array) -> Params:
        """New parameters; the same for the same key on every mesh. To be jitted."""
        return nnx.to_pure_dict(nnx.split(Transformer(self.config, self.precision, key))[1])

    def bind(self, params: Params) -> Transformer:
        """The module that holds these parameters."""
        return nnx.merge(self._split[0], params)

    def logical_axes(self) -> Params:
        """The parameter tree with each array's logical axes in its place, as tuples."""

        def axes_of(param: nnx.Param):
            logical = param.get_metadata("axes")
            return ("layers", *logical) if param.get_metadata("stacked") else logical

        is_param = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
        return nnx.to_pure_dict(jax.tree.map(axes_of, self._split[1], is_leaf=is_param))

    def abstract_params(self, mesh: jax.sharding.Mesh, *, shard_over_data: bool = False) -> Params:
        """The parameter tree as shapes, formats and shardings."""

        def place(logical, shape):
            spec = weight_spec(logical, shard_over_data=shard_over_data)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=jax.NamedSharding(mesh, spec))

        shapes = nnx.to_pure_dict(self._split[1])
        return jax.tree.map(place, self.logical_axes(), shapes, is_leaf=lambda node: isinstance(node, tuple))

    def empty_caches(self, batch: int, length: int) -> Caches:
        """Caches for `batch` rows of up to `length` positions, zeros, in the compute format."""
        c, dtype = self.config, jnp.dtype(self.precision.compute)
        empty = attention_of(c).empty_cache
        return {
            stack.name: empty(c, len(stack.layers), batch, length, dtype) for segment in c.segments for stack in segment
        }
