"""The transformer: embeddings, stacks of layers, a head; and `Model`, its functional form."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.kernels.attention_bias import Alibi, Bias, RelativeBias
from maxlm.kernels.embedding import embed
from maxlm.models.attention import Angles, Context, LayerCache
from maxlm.models.block import Block, Caches, one_by_one, run_segment
from maxlm.models.config import ModelConfig, PrecisionConfig
from maxlm.models.cross_attention import encoded_caches
from maxlm.models.heads import Head, NextSentence
from maxlm.models.layers import Initializer, model_norm, use
from maxlm.models.mtp import MTPModule, run_module
from maxlm.models.pipeline import run_pipelined
from maxlm.models.positions import alibi_slopes, distance_sinusoids, rope_angles, sinusoids
from maxlm.models.routing import Routing
from maxlm.models.stacks import Segment, longest, places, segments
from maxlm.parallel.axes import activation_spec, constrain, n_stages, shards_of, weight_spec
from maxlm.parallel.pipeline_schedule import PipelineConfig

Params = dict[str, Any]


class Embedding(nnx.Module):
    """Token vectors, and position vectors where positions are learned; their sum normed where the config says so."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer, *, shared: bool = False):
        """`shared`: for the encoder of an encoder-decoder, whose token vectors are the decoder's."""
        self.config, self.dtype = config, dtype
        if not shared:
            self.tokens = init.normal(
                "tokens", (config.padded_vocab_size, config.d_model), ("vocab", "embed"), config.init_std
            )
        if config.positions == "learned":
            shape = (config.position_offset + config.max_seq_len, config.d_model)
            self.positions = init.normal("positions", shape, ("positions", "embed"), config.init_std)
        if config.token_types:
            shape = (config.token_types, config.d_model)
            self.token_types = init.normal("token_types", shape, ("positions", "embed"), config.init_std)
        if config.embedding_norm:
            self.norm = model_norm(config, init.at("norm"))

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        context: Context,
        types_BT: jax.Array | None = None,
        tokens_VD: jax.Array | None = None,
    ) -> jax.Array:
        """Vectors `[B, T, D]` in the compute format, as the residual stream is sharded. Tokens are of type 0 unless
        `types_BT` is given; `tokens_VD` are the token vectors where they are shared."""
        _, length_axis, _ = context.residual
        table_VD = self.tokens[...] if tokens_VD is None else tokens_VD
        x_BTD = embed(table_VD, tokens_BT, dtype=self.dtype, length_axis=length_axis)
        if self.config.embedding_scale:
            x_BTD = x_BTD * self.config.d_model**0.5
        if (factor := self.config.scales.embedding) != 1:
            x_BTD = x_BTD * factor
        if hasattr(self, "positions"):
            table = use(self.positions, self.dtype)
            rows_BT = positions_BT + self.config.position_offset if self.config.position_offset else positions_BT
            x_BTD = x_BTD + table.at[rows_BT].get(out_sharding=activation_spec(*context.residual))
        if self.config.positions == "sinusoidal":
            places_BTD = sinusoids(positions_BT, self.config.d_model).astype(self.dtype)
            x_BTD = x_BTD + constrain(places_BTD, *context.residual)
        if self.config.token_types:
            table = use(self.token_types, self.dtype)
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD = x_BTD + table.at[types_BT].get(out_sharding=activation_spec(*context.residual))
        return self.norm(x_BTD) if self.config.embedding_norm else x_BTD


class Encoded(NamedTuple):
    """An encoder's result as a decoder takes it."""

    x_BSD: jax.Array
    segments_BS: jax.Array


class EncodedCache(NamedTuple):
    """The same for cached decoding: cross-attention's keys and values of all layers; segment 0 is padding."""

    caches: Mapping[str, LayerCache]
    segments_BS: jax.Array


class Transformer(nnx.Module):
    """A decoder, an encoder, or both. It ends at the last norm; `head_input`, `head_weight` and the loss kernels make
    logits of that, a chunk at a time."""

    encoder: nnx.Dict
    decoder: nnx.Dict

    def __init__(
        self,
        config: ModelConfig,
        precision: PrecisionConfig,
        key: jax.Array,
        pipeline: PipelineConfig | None = None,
    ):
        """`pipeline`: how stages take turns, on meshes that have more than one."""
        self.config, self.dtype = config, jnp.dtype(precision.compute)
        self.pipeline = pipeline or PipelineConfig()
        init = Initializer(key, jnp.dtype(precision.parameters))
        self.embedding = Embedding(config, self.dtype, init.at("embedding"))
        for side, kinds in config.sides.items():
            blocks = {
                stack.name: Block(
                    config, stack.kind, self.dtype, init.at(f"{side}/{stack.name}", layers=len(stack.layers))
                )
                for segment in segments(kinds)
                for stack in segment
            }
            setattr(self, side, nnx.Dict(blocks))
        if config.kind == "encoder_decoder":
            self.encoder_embedding = Embedding(config, self.dtype, init.at("encoder_embedding"), shared=True)
        if config.positions == "relative":
            shape, relative = (config.relative_buckets, config.n_heads), init.at("relative")
            self.relative = nnx.Dict(
                {side: relative.normal(side, shape, ("positions", "heads"), config.init_std) for side in config.sides}
            )
        if config.norm_placement != "post":
            self.final_norm = model_norm(config, init.at("final_norm"))
            if config.kind == "encoder_decoder":
                self.encoder_norm = model_norm(config, init.at("encoder_norm"))
        if not config.tied_embeddings or config.head_bias or config.head_transform:
            self.head = Head(config, self.dtype, init.at("head"))
        if config.next_sentence_head:
            self.next_sentence = NextSentence(config, self.dtype, init.at("next_sentence"))
        if config.mtp_layers:
            self.mtp = nnx.Dict(
                {str(k): MTPModule(config, self.dtype, init.at(f"mtp/{k}")) for k in range(config.mtp_layers)}
            )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        *,
        types_BT: jax.Array | None = None,
        encoded: Encoded | None = None,
        prefix_BT: jax.Array | None = None,
    ) -> jax.Array:
        """The normed residual stream `[B, T, D]`; a token attends to tokens of its own segment, in a decoder to earlier
        ones. `types_BT`: of an encoder's tokens, all 0 unless given. `encoded`: for the decoder of an encoder-decoder,
        with `segments_BT`. `prefix_BT` (bool): a decoder's tokens that those before them also see."""
        given: dict[str, Any] = {"types_BT": types_BT, "encoded": encoded, "prefix_BT": prefix_BT}
        return self.with_routing(tokens_BT, positions_BT, segments_BT, **given)[0]

    def with_routing(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        *,
        types_BT: jax.Array | None = None,
        encoded: Encoded | None = None,
        prefix_BT: jax.Array | None = None,
        noise_key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Routing]]:
        """The same, and by stack what the routers of its layers did; nothing of stacks without experts. `noise_key`:
        for the noise of routers that have some in training; without one there is none."""
        further = {"prefix_BS": prefix_BT, "noise_key": noise_key}
        x_BTD, _, routings = self._forward(
            tokens_BT, positions_BT, segments_BT, None, None, types_BT, encoded, **further
        )
        return x_BTD, routings

    def streams(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> list[jax.Array]:
        """The residual stream behind the embedding and behind each layer, and at last what `__call__` gives: for a look
        into models with one side. Layers are not scanned, so the program is as long as the model."""
        side = "encoder" if self.config.kind == "encoder" else "decoder"
        context = Context(*self._angles(positions_BT), segments_BT, bias=self._bias(side))
        found = [self.embedding(tokens_BT, positions_BT, context)]
        for place in places(self.config.layer_kinds):
            graph, stacked = nnx.split(getattr(self, side)[place.stack])
            layer = nnx.merge(graph, jax.tree.map(operator.itemgetter(place.index), stacked))
            found.append(layer(found[-1], context, None)[0])
        return [*found, found[-1] if self.config.norm_placement == "post" else self.final_norm(found[-1])]

    def ahead(
        self,
        x_BTD: jax.Array,
        tokens_BT: Sequence[jax.Array],
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        noise_key: jax.Array | None = None,
    ) -> tuple[list[jax.Array], dict[str, Routing]]:
        """What each module for further tokens gives the head, from what `__call__` gave and, for module k, the token
        that lies k ahead of each position; and by module (`mtp.0`) what its router did, if it has experts."""
        context, found = self._context("decoder", positions_BT, segments_BT), []
        routings: dict[str, Routing] = {}
        for k, tokens in enumerate(tokens_BT):
            embedded_BTD = self.embedding(tokens, positions_BT, context)
            if noise_key is not None:
                context = context._replace(noise_key=jax.random.fold_in(noise_key, self.config.n_layers + k))
            x_BTD, routing = run_module(self.mtp[str(k)], x_BTD, embedded_BTD, context, self.config)
            found.append(x_BTD)
            if routing is not None:
                routings[f"mtp.{k}"] = jax.tree.map(lambda x: x[None], routing)
        return found, routings

    def encode(self, tokens_BS: jax.Array, positions_BS: jax.Array, segments_BS: jax.Array) -> Encoded:
        """The result of an encoder-decoder's encoder."""
        context = self._context("encoder", positions_BS, segments_BS)
        tokens_VD = self.embedding.tokens[...]
        x_BSD = self.encoder_embedding(tokens_BS, positions_BS, context, tokens_VD=tokens_VD)
        for segment in segments(self.config.sides["encoder"]):
            x_BSD, *_ = self._run(segment, "encoder", x_BSD, context)
        if self.config.norm_placement != "post":
            x_BSD = self.encoder_norm(x_BSD)
        return Encoded(x_BSD, segments_BS)

    def encoded_cache(self, encoded: Encoded) -> EncodedCache:
        """What `decode` takes of an encoder's result."""
        return EncodedCache(encoded_caches(self.config.segments, self.decoder, encoded.x_BSD), encoded.segments_BS)

    def take_apart(self) -> None:
        """From here on `decode` alone may be called, for single tokens on a CPU: see `one_by_one`."""
        layers: dict[str, Any] = {}
        for segment in self.config.segments:
            layers |= one_by_one(segment, self.decoder)
        self.decoder = nnx.Dict({name: nnx.List(blocks) for name, blocks in layers.items()})

    def decode(
        self,
        tokens_BT: jax.Array,
        caches: Caches,
        lengths_B: jax.Array,
        encoded: EncodedCache | None = None,
        prefix_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, Caches]:
        """The same for tokens that follow `lengths_B` cached ones in each row, and the caches with them written.
        `prefix_BS` (bool): cached positions, or some of these, that tokens before them also see."""
        positions_BT = lengths_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=lengths_B.dtype)[None, :]
        return self._forward(tokens_BT, positions_BT, None, caches, lengths_B, None, encoded, prefix_BS=prefix_BS)[:2]

    def empty_caches(self, batch: int, length: int) -> Caches:
        """Caches for `batch` rows of up to `length` positions, in the compute format."""
        return {
            stack.name: self.decoder[stack.name].attention.empty_cache(len(stack.layers), batch, length)
            for segment in self.config.segments
            for stack in segment
        }

    def head_input(self, x_BTD: jax.Array) -> jax.Array:
        """What the output projection is applied to, of the result of a call."""
        if self.config.head_transform:
            x_BTD = self.head.transform(x_BTD)
        factor = self.config.logit_scale * self.config.scales.output
        return x_BTD if factor == 1 else x_BTD * factor

    def head_bias(self) -> jax.Array | None:
        """The bias on the logits `[V]`, if there is one."""
        return self.head.bias[...] if self.config.head_bias else None

    def head_weight(self) -> jax.Array:
        """The output projection `[V, D]` as it is stored: the kernels cast it, gather it and scatter its gradient."""
        return (self.embedding.tokens if self.config.tied_embeddings else self.head.kernel)[...]

    def _forward(
        self,
        tokens_BT,
        positions_BT,
        segments_BT,
        caches,
        lengths_B,
        types_BT,
        encoded: Encoded | EncodedCache | None,
        **further: jax.Array | None,
    ) -> tuple[jax.Array, Any, Any]:
        side = "encoder" if self.config.kind == "encoder" else "decoder"
        context = self._context(side, positions_BT, segments_BT, lengths_B, **further)
        made: Mapping[str, LayerCache] | None = None
        if isinstance(encoded, Encoded):
            context = context._replace(encoded_BSD=encoded.x_BSD, encoded_segments_BS=encoded.segments_BS)
        elif encoded is not None:
            made, context = encoded.caches, context._replace(encoded_segments_BS=encoded.segments_BS)
        x_BTD = self.embedding(tokens_BT, positions_BT, context, types_BT)
        written: Caches = {}
        routings: dict[str, Routing] = {}
        for segment in self.config.segments:
            x_BTD, new, routed = self._run(segment, side, x_BTD, context, caches, made)
            written |= new or {}
            routings |= routed
        return x_BTD if self.config.norm_placement == "post" else self.final_norm(x_BTD), written, routings

    def _run(
        self,
        segment: Segment,
        side: str,
        x_BTD: jax.Array,
        context: Context,
        caches: Caches | None = None,
        encoded: Mapping[str, LayerCache] | None = None,
    ) -> tuple[jax.Array, Caches | None, dict[str, Routing]]:
        """A segment of a side: the longest by stages where the mesh has some and rows can be cut into microbatches."""
        blocks, remat = getattr(self, side), self.config.remat
        if caches is None and n_stages() > 1 and segment == longest(segments(self.config.sides[side])):
            cut = (self.pipeline.microbatches or 2 * n_stages()) * shards_of("batch", jax.sharding.get_abstract_mesh())
            if x_BTD.shape[0] % cut == 0:
                x_BTD, routings = run_pipelined(segment, blocks, x_BTD, context, remat, self.pipeline)
                return x_BTD, None, routings
        return run_segment(segment, blocks, x_BTD, context, caches, remat, encoded)

    def _context(
        self, side: str, positions_BT, segments_BT, lengths_B: jax.Array | None = None, **further: jax.Array | None
    ) -> Context:
        """What the layers of a side share."""
        distances_LD = None
        if self.config.positions == "transformer_xl" and lengths_B is None:
            length, causal = positions_BT.shape[1], side == "decoder"
            # Kept, as RoPE's angles are.
            distances_LD = jax.lax.optimization_barrier(
                distance_sinusoids(length, self.config.d_model, self.dtype, causal=causal)
            )
        angles = self._angles(positions_BT)
        return Context(*angles, segments_BT, lengths_B, self._bias(side), distances_LD=distances_LD, **further)

    def _bias(self, side: str) -> Bias | None:
        """What is added to the scores of a side's layers, the same in all."""
        if self.config.positions == "alibi":
            return Alibi(jnp.asarray(alibi_slopes(self.config.n_heads)))
        if self.config.positions != "relative":
            return None
        distance = self.config.relative_max_distance
        return RelativeBias(self.relative[side][...], bidirectional=side == "encoder", max_distance=distance)

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
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    """how stages take turns, on meshes that have more than one"""

    @cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        make = lambda: Transformer(self.config, self.precision, jax.random.key(0), self.pipeline)  # noqa: E731
        return nnx.split(nnx.eval_shape(make))

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
