"""Every parameter of a model with its shape and its logical axes, without making the model and without JAX.

Counts of parameters and FLOPs and the planner's bytes are read from here. The shapes are those of the modules beside
this file and the axes those of `parallel/axes_table.py`; tests compare both with what `Program.abstract_state` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from maxlm.models.config import ModelConfig
from maxlm.models.moe_config import MoEConfig
from maxlm.models.stacks import LayerKind
from maxlm.parallel.axes_table import STORAGE_AXES, WEIGHTS


@dataclass(frozen=True)
class Weight:
    """One array of the parameter tree; `layers` of them are stacked where it belongs to a layer."""

    part: str
    """embedding, attention, mlp, norm or head"""
    shape: tuple[int, ...]
    logical: tuple[str, ...]
    layers: int = 1
    stack: str | None = None
    """the layers' stack, for what belongs to layers"""
    product: bool = True
    """whether tokens are multiplied by it; not so norms, biases and tables of vectors"""
    used: float = 1.0
    """the share of it that one token uses: of routed experts those that it goes to"""
    float32: bool = False
    """whether it is so whatever `precision.parameters` says"""

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
        axes = [axis for name in self.logical for axis in WEIGHTS[name]]
        if not stored:
            axes = [axis for axis in axes if axis not in STORAGE_AXES]
        elif shard_over_data and STORAGE_AXES[1] in axes:
            axes.append(STORAGE_AXES[0])
        return math.prod(sizes.get(axis, 1) for axis in axes)


def weights_of(c: ModelConfig) -> tuple[Weight, ...]:
    """The parameters of a model, the vocabulary padded as its arrays are."""
    return tuple(_weights(c))


def _weights(c: ModelConfig) -> Iterator[Weight]:
    d, v = c.d_model, c.padded_vocab_size
    yield Weight("embedding", (v, d), ("vocab", "embed"), product=False)
    if c.positions == "learned":
        yield Weight("embedding", (c.max_seq_len, d), ("positions", "embed"), product=False)
    yield from _norm(c)
    for segment in c.segments:
        for stack in segment:
            for weight in _layer(c, stack.kind):
                yield replace(weight, layers=len(stack.layers), stack=stack.name)
    if not c.tied_embeddings:
        yield Weight("head", (v, d), ("vocab", "embed"))


def _layer(c: ModelConfig, kind: LayerKind) -> Iterator[Weight]:
    yield from _attention(c, c.d_model, c.n_heads, c.kv_heads, c.head_width)
    if kind.experts and c.moe is not None:
        yield from _moe(c, c.moe, c.d_model)
    else:
        yield from _mlp(c, c.d_model, c.d_ff)
    for _ in ("attention", "mlp"):
        yield from _norm(c)


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
    if c.qk_norm:
        for _ in ("q", "k"):
            yield Weight("norm", (k,), ("norm",), product=False)


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
        yield Weight("mlp", (e, d, f), ("experts", "embed", "mlp"), used=used)
    yield Weight("mlp", (e, f, d), ("experts", "mlp", "embed"), used=used)
    if moe.expert_bias:
        for _ in inner:
            yield Weight("mlp", (e, f), ("experts", "mlp"), product=False, used=used)
        yield Weight("mlp", (e, d), ("experts", "embed"), product=False, used=used)
    if moe.n_shared_experts:
        yield from _mlp(c, d, moe.shared_width)
