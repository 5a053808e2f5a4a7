"""Hyperparameters that carry over from a narrow or shallow model to a wide or deep one. Needs no JAX.

One table for both parametrisations. `m` is d_model / base_width and `l` is n_layers / base_depth, with l = 1 for mup:

| what | mup | completep |
| --- | --- | --- |
| hidden matrices: initial standard deviation | init_std / sqrt(m) | the same |
| hidden matrices: learning rate | / m | the same |
| hidden matrices: learning rate times weight decay | as it is | the same |
| embeddings, output head, norms, biases: initial values, learning rate | as they are | the same |
| logits of the output head, and of routers | / m | the same |
| attention's scores | x base_head_dim / head_dim | the same |
| a block's addition to the residual stream | as it is | / l |
| projections into the residual stream start smaller by 1 / sqrt(2 L) | L = n_layers | L = base_depth |
| AdamW's epsilon | / m | / m; in layers / (m l) |

Sources. Width: Tensor Programs V (arXiv:2203.03466), table 8 for Adam in the form where output weights start as they do
and are multiplied by 1 / m, and definition 4.1 for 1 / d scores. Depth, epsilon and weight decay: CompleteP
(arXiv:2505.01618), table 1 with alpha = 1, and its authors' code. Routers are output weights, experts hidden ones
(arXiv:2508.09752). Epsilon follows the gradients, which are 1 / m as large where weights touch the width, in layers
1 / (m l); `training/optimizer.py` has the exceptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from maxlm.section import Section, key

if TYPE_CHECKING:
    from maxlm.models.config import ModelConfig


class TransferConfig(Section):
    """Learning rate, initial weights and multipliers are those of a base model, and are scaled to this model's size."""

    kind: Literal["mup", "completep"] = key(
        ...,
        "mup: across widths (maximal update parametrisation, arXiv:2203.03466); completep: across widths and depths "
        "(arXiv:2505.01618)",
    )
    base_width: int = key(
        ..., "d_model of the base model, whose other widths are in proportion; there, mup changes nothing", ge=1
    )
    base_depth: int | None = key(
        None,
        "completep: n_layers of the base model; there and at base_width it changes nothing. An encoder's layers are in "
        "proportion",
        ge=1,
    )
    base_head_dim: int | None = key(
        None, "head_dim of the base model; null: as this model's, which is wider by more heads", ge=1
    )
    embedding_multiplier: float = key(1.0, "token vectors are multiplied by this, at every size", gt=0)
    output_multiplier: float = key(1.0, "logits are multiplied by this, at every size, besides logit_scale", gt=0)
    attention_multiplier: float = key(
        1.0, "attention scores are multiplied by this, at every size, besides attention_scale", gt=0
    )

    @model_validator(mode="after")
    def _depth_is_completep(self) -> TransferConfig:
        if (self.kind == "completep") != (self.base_depth is not None):
            raise ValueError(
                f"kind = {self.kind!r} with base_depth = {self.base_depth}: completep needs it, and mup has none"
            )
        return self


@dataclass(frozen=True)
class Scales:
    """What a model's size makes of its numbers; all are 1 without `model.transfer`, and for the base model."""

    width: float = 1.0
    """m: how many times as wide as the base model"""
    depth: float = 1.0
    """l: how many times as deep, with completep"""
    embedding: float = 1.0
    """token vectors are multiplied by it"""
    scores: float = 1.0
    """attention's scores are, besides 1 / sqrt(head_dim) or attention_scale"""
    output: float = 1.0
    """the output head's logits are"""

    @classmethod
    def of(cls, config: ModelConfig) -> Scales:
        """Those of a model."""
        transfer = config.transfer
        if transfer is None:
            return cls()
        width = config.d_model / transfer.base_width
        head_dim = config.head_width
        base = transfer.base_head_dim or head_dim
        # From 1 / sqrt(base_head_dim) as 1 / head_dim. A scale that is given is the base model's.
        narrower = base / head_dim if config.attention_scale is not None else (base / head_dim) ** 0.5
        return cls(
            width=width,
            depth=1.0 if transfer.base_depth is None else config.n_layers / transfer.base_depth,
            embedding=transfer.embedding_multiplier,
            scores=narrower * transfer.attention_multiplier,
            output=transfer.output_multiplier / width,
        )

    @property
    def hidden_init(self) -> float:
        """Initial standard deviations of hidden matrices are multiplied by it."""
        return self.width**-0.5

    @property
    def router(self) -> float:
        """Routers' logits are."""
        return 1 / self.width

    @property
    def residual(self) -> float:
        """What a block adds to the residual stream is."""
        return 1 / self.depth


def misfits(config: ModelConfig) -> list[str]:
    """Why a model cannot have its transfer, a sentence each, with keys and remedies; none where it can."""
    transfer = config.transfer
    if transfer is None:
        return []
    found = []
    if config.embedding_scale:
        found.append(
            "transfer with embedding_scale: sqrt(d_model) grows with the width, and embeddings must not; set "
            "embedding_scale=false and transfer.embedding_multiplier to sqrt(base_width)"
        )
    if config.latent is not None:
        found.append(
            "transfer with latent: whether ranks grow with the width decides how the matrices around them scale, and "
            "nothing says it; leave transfer out"
        )
    if config.next_sentence_head:
        found.append("transfer with next_sentence_head: its scores are not scaled; leave one of them out")
    if transfer.kind == "completep" and config.norm_placement == "post":
        found.append(
            "transfer.kind = 'completep' with norm_placement = 'post': its rule is of residual streams that are not "
            "normed (arXiv:2505.01618, section 2); choose norm_placement = 'pre', or kind = 'mup'"
        )
    return found
