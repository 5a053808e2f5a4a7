"""The Phi-3 family (arXiv:2404.14219): transformers' `Phi3ForCausalLM`.

Queries, keys and values are one projection, one kind behind another, as gate and up are. With whole heads turned it is
a Llama, or with a window a Mistral, and is exported as one, whose files hold the same numbers apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.llama_like import LAYER, OURS
from maxlm.models.families.rope import read_rope
from maxlm.models.families.table import Weight


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Refuses RoPE whose factors change where a row passes `original_max_position_embeddings` (LongRoPE, of all names
    that this family has for it): the keys that are cached already would have been turned otherwise."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = theirs.get(name)
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else "default"
        if kind != "default":
            raise ConfigError(
                f"{name}.rope_type = {kind!r}: in this family its factors change with the row's length (LongRoPE, "
                "arXiv:2402.13753), which is not known here"
            )
    return read_rope(theirs)


def _misfits(config: ModelConfig) -> Iterator[str]:
    if config.rope_scaling is not None:
        yield f"model.rope_scaling.kind = {config.rope_scaling.kind!r} (it has none but LongRoPE)"


_QKV = tuple(f"{OURS}attention.{name}" for name in "qkv")

PHI3 = llama_like.family(
    "phi3",
    "Phi3ForCausalLM",
    keys={"sliding_window": "attention_window", "partial_rotary_factor": "rope_fraction"},
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    harmless=llama_like.HARMLESS | {"resid_pdrop", "embd_pdrop", "original_max_position_embeddings", "auto_map"},
    read_config=_read_config,
    misfits=_misfits,
    weights=(
        *llama_like.ENDS,
        *llama_like.NORMS_BEFORE,
        Weight(_QKV, f"{LAYER}self_attn.qkv_proj.weight", "dhk -> (hk)d, dgk -> (gk)d, dgk -> (gk)d"),
        Weight((f"{OURS}attention.o",), f"{LAYER}self_attn.o_proj.weight", "hkd -> d(hk)"),
        Weight((f"{OURS}mlp.gate", f"{OURS}mlp.up"), f"{LAYER}mlp.gate_up_proj.weight", "df -> (nf)d"),
        Weight((f"{OURS}mlp.down",), f"{LAYER}mlp.down_proj.weight", "fd -> df"),
    ),
)
