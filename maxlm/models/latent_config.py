"""Sizes of multi-head latent attention. Needs no JAX."""

from __future__ import annotations

from pydantic import model_validator

from maxlm.section import Section, key


class LatentConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values of all heads are made
    from one narrow vector a token, which with one key turned by RoPE is all that decoding keeps."""

    kv_rank: int = key(..., "width of the latent that keys and values are made from", ge=1)
    q_rank: int | None = key(
        None, "width of the latent that queries are made from; null: from the residual stream", ge=1
    )
    nope_head_dim: int = key(..., "channels of a query and key head that RoPE leaves alone", ge=1)
    rope_head_dim: int = key(..., "channels of a head that RoPE turns, of a key that all heads share", ge=2)
    v_head_dim: int = key(..., "width of a value head", ge=1)

    @model_validator(mode="after")
    def _rope_turns_pairs(self) -> LatentConfig:
        if self.rope_head_dim % 2:
            raise ValueError(f"rope_head_dim = {self.rope_head_dim} is odd, and RoPE turns pairs of channels")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def cached_width(self) -> int:
        """Numbers that decoding keeps for a token and layer."""
        return self.kv_rank + self.rope_head_dim
