"""Every parameter of a model with its shape and its logical axes, without making the model and without JAX.

Counts of parameters and FLOPs and the planner's bytes are read from here. The shapes are those of the modules beside
this file and the axes those of `parallel/axes_table.py`; tests compare both with what `Program.abstract_state` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from maxlm.models.config import ModelConfig
from maxlm.models.latent_config import LatentConfig
from maxlm.models.moe_config import MoEConfig
from maxlm.models.stacks import LayerKind, segments
from maxlm.parallel.axes_table import DATA, STORAGE_NAMES, WEIGHTS


@dataclass(frozen=True)
class Weight:
    """One array of the parameter tree; `layers` of them are stacked where it belongs to a layer."""

    part: str
    """embedding, attention, distances, mlp, norm or head"""
    shape: tuple[int, ...]
    logical: tuple[str, ...]
    layers: int = 1
    stack: str | None = None
    """the layers' stack, for what belongs to layers; `mtp.0` for the first module that predicts further ahead"""
    product: bool = True
    """whether tokens are multiplied by it; not so norms, biases and tables of vectors"""
    of_encoder: bool = False
    """whether that is so of the tokens of an encoder-decoder's encoder, and not of its decoder's"""
    used: float = 1.0
    """the share of it that one token uses: of routed experts those that it goes to"""
    float32: bool = False
    """whether it is so whatever `precision.parameters` says"""

    @property
    def mtp(self) -> bool:
        """Whether it is of a module that predicts further ahead, which only training uses."""
        return self.stack is not None and self.stack.startswith("mtp.")

    @property
    def size(self) -> int:
        """Elements of all layers."""
        return self.layers * math.prod(self.shape)

    def at_rest(self, sizes: Mapping[str, int], *, shard_over_data: bool) -> int:
        """Elements on a device where it is stored."""
        return self.size // self._shards(sizes, stored=True, shard_over_data=shard_over_data)

    def gathered(self, sizes: Mapping[str, int]) -> int:
        """Elements of one layer on a device where it is used: without the axes that only store it."""
        return math.prod(self.shape) // self._shards(sizes, stored=False)

    def is_gathered(self, sizes: Mapping[str, int], *, shard_over_data: bool) -> bool:
        """Whether its use takes an all-gather."""
        return self.at_rest(sizes, shard_over_data=shard_over_data) < self.gathered(sizes) * self.layers

    def _shards(self, sizes: Mapping[str, int], *, stored: bool, shard_over_data: bool = False) -> int:
        axes = self.axes_in_use
        if stored:
            axes += self.storage_axes(shard_over_data=shard_over_data)
        return math.prod(sizes.get(axis, 1) for axis in axes)

    @property
    def axes_in_use(self) -> tuple[str, ...]:
        """The mesh axes that shard it where it is used: tensor's, and of experts' weights the experts'."""
        return tuple(axis for name in self.logical if name not in STORAGE_NAMES for axis in WEIGHTS[name])

    def storage_axes(self, *, shard_over_data: bool) -> tuple[str, ...]:
        """The mesh axes that it is gathered over where it is used."""
        stored = [name for name in self.logical if name in STORAGE_NAMES]
        axes = tuple(axis for name in stored for axis in WEIGHTS[name])
        return (*DATA, *axes) if stored and shard_over_data else axes


def weights_of(c: ModelConfig) -> tuple[Weight, ...]:
    """The parameters of a model, the vocabulary padded as its arrays are."""
    return tuple(_weights(c))


def _weights(c: ModelConfig) -> Iterator[Weight]:
    d, v = c.d_model, c.padded_vocab_size
    yield Weight("embedding", (v, d), ("vocab", "embed"), product=False)
    both = c.kind == "encoder_decoder"
    for _ in c.sides:
        if c.positions == "learned":
            rows = c.position_offset + c.max_seq_len
            yield Weight("embedding", (rows, d), ("positions", "embed"), product=False)
        if c.positions == "relative":
            shape = (c.relative_buckets, c.n_heads)
            yield Weight("embedding", shape, ("positions", "heads"), product=False)
        if c.embedding_norm:
            yield from _norm(c)
        if c.norm_placement != "post":
            yield from _norm(c)
    if c.token_types:
        yield Weight("embedding", (c.token_types, d), ("positions", "embed"), product=False)
    for side, kinds in c.sides.items():
        for segment in segments(kinds):
            for stack in segment:
                name = f"{side}.{stack.name}" if both else stack.name
                for weight in _layer(c, stack.kind):
                    of_encoder = weight.of_encoder or (both and side == "encoder")
                    yield replace(weight, layers=len(stack.layers), stack=name, of_encoder=of_encoder)
    yield from _heads(c, d, v)
    for k in range(c.mtp_layers):
        for weight in _mtp(c):
            yield replace(weight, stack=f"mtp.{k}")


def _mtp(c: ModelConfig) -> Iterator[Weight]:
    for _ in ("embedding", "hidden"):
        yield Weight("mlp", (c.d_model, c.d_model), ("mlp", "embed"))
        yield from _norm(c)
    yield from _layer(c, c.layer_kinds[-1])
    yield from _norm(c)


def _heads(c: ModelConfig, d: int, v: int) -> Iterator[Weight]:
    if not c.tied_embeddings:
        yield Weight("head", (v, d), ("vocab", "embed"))
    if c.head_bias:
        yield Weight("head", (v,), ("vocab",), product=False)
    if c.head_transform:
        yield Weight("head", (d, d), ("embed", "mlp"))
        yield Weight("head", (d,), ("mlp",), product=False)
        yield from _norm(c)
    if c.next_sentence_head:
        for shape, logical in (((d, d), ("embed", "mlp")), ((d, 2), ("embed", "classes"))):
            # Of every row's first token alone.
            yield Weight("head", shape, logical, product=False)
            yield Weight("head", shape[1:], logical[1:], product=False)


def _layer(c: ModelConfig, kind: LayerKind) -> Iterator[Weight]:
    if c.latent is None:
        yield from _attention(c, c.d_model, c.n_heads, c.kv_heads, c.head_width)
    else:
        yield from _latent_attention(c, c.latent)
    if c.positions == "transformer_xl":
        heads = (c.n_heads, c.head_width)
        yield Weight("distances", (c.d_model, *heads), ("embed", "heads", "head_dim"), product=False)
        for _ in ("content", "position"):
            yield Weight("attention", heads, ("heads", "head_dim"), product=False)
    if kind.experts and c.moe is not None:
        yield from _moe(c, c.moe, c.d_model)
    else:
        yield from _mlp(c, c.d_model, c.d_ff)
    for _ in range((3 if kind.cross else 2) * (c.norms_before + c.norms_after)):
        yield from _norm(c)
    if kind.cross:
        q, k, v, *others = _attention(c, c.d_model, c.n_heads, c.kv_heads, c.head_width)
        yield from (q, replace(k, of_encoder=True), replace(v, of_encoder=True), *others)


def _norm(c: ModelConfig) -> Iterator[Weight]:
    for _ in range(2 if c.norm == "layer" else 1):
        yield Weight("norm", (c.d_model,), ("norm",), product=False)


def _attention(c: ModelConfig, d: int, h: int, g: int, k: int) -> Iterator[Weight]:
    yield Weight("attention", (d, h, k), ("embed", "heads", "head_dim"))
    for _ in ("k", "v"):
        yield Weight("attention", (d, g, k), ("embed", "kv_heads", "head_dim"))
    yield Weight("attention", (h, k, d), ("heads", "head_dim", "embed"))
    if c.attention_bias:
        yield Weight("attention", (h, k), ("heads", "head_dim"), product=False)
        for _ in ("k", "v"):
            yield Weight("attention", (g, k), ("kv_heads", "head_dim"), product=False)
    if c.attention_out_bias:
        yield Weight("norm", (d,), ("norm",), product=False)
    if c.attention_sinks:
        yield Weight("norm", (h,), ("heads",), product=False)
    if c.qk_norm == "head":
        for _ in ("q", "k"):
            yield Weight("norm", (k,), ("norm",), product=False)
    if c.qk_norm == "all":
        yield Weight("norm", (h, k), ("heads", "head_dim"), product=False)
        yield Weight("norm", (g, k), ("kv_heads", "head_dim"), product=False)


def _latent_attention(c: ModelConfig, latent: LatentConfig) -> Iterator[Weight]:
    d, h, k, q_rank = c.d_model, c.n_heads, latent.qk_head_dim, latent.q_rank
    if q_rank is None:
        yield Weight("attention", (d, h, k), ("embed", "heads", "head_dim"))
    else:
        yield Weight("attention", (d, q_rank), ("embed", "latent"))
        yield Weight("norm", (q_rank,), ("norm",), product=False)
        yield Weight("attention", (q_rank, h, k), ("rank", "heads", "head_dim"))
    yield Weight("attention", (d, latent.cached_width), ("embed", "latent"))
    yield Weight("norm", (latent.kv_rank,), ("norm",), product=False)
    up = (latent.kv_rank, h, latent.nope_head_dim + latent.v_head_dim)
    yield Weight("attention", up, ("rank", "heads", "head_dim"))
    yield Weight("attention", (h, latent.v_head_dim, d), ("heads", "head_dim", "embed"))
    if c.attention_out_bias:
        yield Weight("norm", (d,), ("norm",), product=False)


def _mlp(c: ModelConfig, d: int, f: int) -> Iterator[Weight]:
    inner = ("up", "gate") if c.gated else ("up",)
    for _ in inner:
        yield Weight("mlp", (d, f), ("embed", "mlp"))
    yield Weight("mlp", (f, d), ("mlp", "embed"))
    if c.mlp_bias:
        for _ in inner:
            yield Weight("mlp", (f,), ("mlp",), product=False)
        yield Weight("norm", (d,), ("norm",), product=False)


def _moe(c: ModelConfig, moe: MoEConfig, d: int) -> Iterator[Weight]:
    e, f, used = moe.n_experts, moe.d_ff, moe.experts_per_token / moe.n_experts
    yield Weight("mlp", (d, e), ("embed", "router"))
    if moe.router_bias:
        yield Weight("norm", (e,), ("router",), product=False)
    if moe.balance_bias_rate is not None:
        yield Weight("norm", (e,), ("router",), product=False, float32=True)
    inner = ("up", "gate") if c.gated else ("up",)
    for _ in inner:
        yield Weight("mlp", (e, d, f), ("experts", "expert_embed", "mlp"), used=used)
    yield Weight("mlp", (e, f, d), ("experts", "mlp", "expert_embed"), used=used)
    if moe.expert_bias:
        for _ in inner:
            yield Weight("mlp", (e, f), ("experts", "mlp"), product=False, used=used)
        yield Weight("mlp", (e, d), ("experts", "expert_embed"), product=False, used=used)
    if moe.n_shared_experts:
        yield from _mlp(c, d, moe.shared_width)
