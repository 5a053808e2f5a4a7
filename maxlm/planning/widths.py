"""How wide the feed-forward blocks of a model's layers are inside, of those with experts too."""

from __future__ import annotations

from maxlm.models.config import ModelConfig
from maxlm.models.stacks import LayerKind


def choices(model: ModelConfig, kind: LayerKind) -> int:
    """Experts that a token goes to in a layer."""
    return model.moe.experts_per_token if kind.experts and model.moe is not None else 0


def dense_width(model: ModelConfig, kind: LayerKind) -> int:
    """Width inside a layer's block that every token goes through."""
    return model.moe.shared_width if kind.experts and model.moe is not None else model.d_ff


def expert_width(model: ModelConfig, kind: LayerKind) -> int:
    """Width inside all the routed experts of a token."""
    return choices(model, kind) * model.moe.d_ff if model.moe is not None else 0
