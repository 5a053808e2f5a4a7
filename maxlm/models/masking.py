"""Which positions a layer's self-attention sees. Needs no JAX."""

from __future__ import annotations

from maxlm.kernels.masks import Mask
from maxlm.models.config import ModelConfig
from maxlm.models.stacks import LayerKind


def mask_of(config: ModelConfig, kind: LayerKind) -> Mask:
    """The mask of a layer's self-attention: window, chunk and global tokens are those of local layers."""
    if not kind.local:
        return Mask(causal=kind.causal)
    return Mask(
        causal=kind.causal,
        window=config.attention_window,
        chunk=config.attention_chunk,
        global_tokens=config.attention_global_tokens,
    )
