"""Parameters and FLOPs, counted once: metrics, planner and scaling laws all read this file.

Conventions: a multiply-add is 2 FLOPs; only matmuls count; attention counts the pairs of positions that the mask
leaves; of routed experts those count that a token goes to, none dropped; the backward pass is twice the forward;
recomputation (remat) is not model FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.models.config import ModelConfig, PrecisionConfig
from maxlm.models.weights import weights_of


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, without the rows that pad the vocabulary."""

    total: int
    embedding: int
    """token and position vectors, and an untied head (Kaplan et al., arXiv:2001.08361, leave these out of N)"""
    active: int
    """those that one token uses: all, but of routed experts only those that it goes to, and none that only predict
    further ahead"""
    mtp: int = 0
    """of the modules that predict further ahead, which published sizes leave out"""

    @property
    def non_embedding(self) -> int:
        """All but the embeddings and the head."""
        return self.total - self.embedding


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of a model with its true vocabulary."""
    padding = config.padded_vocab_size - config.vocab_size
    counted = [
        (weight, weight.size - padding * weight.size // config.padded_vocab_size * ("vocab" in weight.logical))
        for weight in weights_of(config)
    ]
    return ParameterCount(
        total=sum(size for _, size in counted),
        embedding=sum(size for weight, size in counted if weight.part in ("embedding", "head")),
        active=round(sum(size * weight.used for weight, size in counted if not weight.mtp)),
        mtp=sum(size for weight, size in counted if weight.mtp),
    )


@dataclass(frozen=True)
class ForwardFlops:
    """Matmul FLOPs of the forward pass for one token, all layers together, by what does them."""

    attention_projections: float
    attention_scores: float
    """scores and values"""
    mlp: float
    """experts and routers too"""
    head: float

    @property
    def total(self) -> float:
        return self.attention_projections + self.attention_scores + self.mlp + self.head


def attended_positions(config: ModelConfig, seq_len: int, *, local: bool) -> float:
    """To how many positions one of a full causal row of `seq_len` attends on average, in a local or global layer.

    Position t attends to t + 1, or to the window where that is less.
    """
    window = min(config.attention_window or seq_len, seq_len) if local else seq_len
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def forward_flops(config: ModelConfig, seq_len: int) -> ForwardFlops:
    """Matmul FLOPs of training's forward pass for one token of a full causal row of `seq_len`, by part.

    Scores and values take 2 FLOPs each for every pair of positions that the mask leaves, head and channel. Modules that
    predict further ahead are layers like the last one, whose projections of two vectors to one count with the MLP's,
    and use the head again.
    """
    c = config
    kinds = (*c.layer_kinds, *c.layer_kinds[-1:] * c.mtp_layers)
    pairs = sum(attended_positions(c, seq_len, local=kind.local) for kind in kinds)
    return ForwardFlops(
        attention_projections=_product_flops(c, "attention"),
        attention_scores=2 * c.n_heads * (c.head_width + c.value_width) * pairs,
        mlp=_product_flops(c, "mlp"),
        head=2 * c.vocab_size * c.d_model * (1 + c.mtp_layers),
    )


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """The same in one number, the head included."""
    return forward_flops(config, seq_len).total


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of forward and backward for one token: three times the forward's."""
    return 3 * forward_flops_per_token(config, seq_len)


def cache_bytes_per_token(config: ModelConfig, precision: PrecisionConfig) -> int:
    """Bytes that decoding keeps for a token: keys and values of all layers, or their latents and the shared key."""
    width = 2 * config.kv_heads * config.head_width if config.latent is None else config.latent.cached_width
    return config.n_layers * width * {"float32": 4, "bfloat16": 2}[precision.compute]


def _product_flops(config: ModelConfig, part: str) -> float:
    """Of the products of a token with the weights of a part, in all layers."""
    return sum(2 * weight.size * weight.used for weight in weights_of(config) if weight.part == part and weight.product)
