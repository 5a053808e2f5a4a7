"""Parameters and FLOPs, counted once: metrics, planner and scaling laws all read this file.

Conventions: a multiply-add is 2 FLOPs; only matmuls count; attention counts the pairs of positions that the mask
leaves; the backward pass is twice the forward; recomputation (remat) is not model FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from maxlm.models.config import ModelConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, without the rows that pad the vocabulary."""

    total: int
    embedding: int
    """token and position vectors, and an untied head (Kaplan et al., arXiv:2001.08361, leave these out of N)"""

    @property
    def active(self) -> int:
        """Those that one token uses: all, in a dense model."""
        return self.total

    @property
    def non_embedding(self) -> int:
        """All but the embeddings and the head."""
        return self.total - self.embedding


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of a model with its true vocabulary."""
    c, norm = config, (2 if config.norm == "layer" else 1) * config.d_model
    attention = _attention_matmul_parameters(c)
    attention += (c.n_heads + 2 * c.kv_heads) * c.head_width * c.attention_bias + c.d_model * c.attention_out_bias
    attention += 2 * c.head_width * c.qk_norm
    mlp = _mlp_matmul_parameters(c) + c.mlp_bias * ((1 + c.gated) * c.d_ff + c.d_model)
    embedding = c.vocab_size * c.d_model * (1 if c.tied_embeddings else 2)
    if c.positions == "learned":
        embedding += c.max_seq_len * c.d_model
    return ParameterCount(total=c.n_layers * (attention + mlp + 2 * norm) + norm + embedding, embedding=embedding)


@dataclass(frozen=True)
class ForwardFlops:
    """Matmul FLOPs of the forward pass for one token, all layers together, by what does them."""

    attention_projections: float
    attention_scores: float
    """scores and values"""
    mlp: float
    head: float

    @property
    def total(self) -> float:
        return self.attention_projections + self.attention_scores + self.mlp + self.head


def attended_positions(config: ModelConfig, seq_len: int) -> float:
    """To how many positions one of a full causal row of `seq_len` attends on average.

    Position t attends to t + 1, or to the window where that is less.
    """
    window = min(config.attention_window or seq_len, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def forward_flops(config: ModelConfig, seq_len: int) -> ForwardFlops:
    """Matmul FLOPs of the forward pass for one token of a full causal row of `seq_len`, by part.

    Scores and values take 2 FLOPs each for every pair of positions that the mask leaves, head and channel.
    """
    c = config
    return ForwardFlops(
        attention_projections=2 * c.n_layers * _attention_matmul_parameters(c),
        attention_scores=c.n_layers * 4 * c.n_heads * c.head_width * attended_positions(c, seq_len),
        mlp=2 * c.n_layers * _mlp_matmul_parameters(c),
        head=2 * c.vocab_size * c.d_model,
    )


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """The same in one number, the head included."""
    return forward_flops(config, seq_len).total


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of forward and backward for one token: three times the forward's."""
    return 3 * forward_flops_per_token(config, seq_len)


def _attention_matmul_parameters(c: ModelConfig) -> int:
    return c.d_model * c.head_width * (2 * c.n_heads + 2 * c.kv_heads)


def _mlp_matmul_parameters(c: ModelConfig) -> int:
    return (3 if c.gated else 2) * c.d_model * c.d_ff
