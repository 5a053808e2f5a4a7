"""What Llama and the families after it have in common: config keys, bricks, and one table of weights.

Their files hold RoPE in the half-split layout, as our rotation has it, so projections need no permutation.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from maxlm.models.families.rope import read_rope, rope_misfits, write_rope
from maxlm.models.families.table import Family, Weight, untied


def read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE in all spellings; that whole heads turn may be said, or not."""
    read = read_rope(theirs)
    if read.get("partial_rotary_factor") == 1:
        del read["partial_rotary_factor"]
    return read


KEYS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layers",
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tie_word_embeddings": "tied_embeddings",
    "initializer_range": "init_std",
}
DEFAULTS = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
CONSTANTS = {"hidden_act": "silu", "attention_dropout": 0.0}
SYNONYMS = {"hidden_act": ("swish",)}
HARMLESS = frozenset({"attention_dropout"})
BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
PREFIX, EMBEDDING = "model.", "model.embed_tokens.weight"

_LAYER, _OURS = "model.layers.{layer}.", "decoder.*."

WITHOUT_MLP = (
    Weight(("embedding.tokens",), EMBEDDING, "vd -> vd"),
    Weight((f"{_OURS}attention_norm.scale",), f"{_LAYER}input_layernorm.weight", "d -> d"),
    Weight((f"{_OURS}attention.q",), f"{_LAYER}self_attn.q_proj.weight", "dhk -> (hk)d"),
    Weight((f"{_OURS}attention.k",), f"{_LAYER}self_attn.k_proj.weight", "dgk -> (gk)d"),
    Weight((f"{_OURS}attention.v",), f"{_LAYER}self_attn.v_proj.weight", "dgk -> (gk)d"),
    Weight((f"{_OURS}attention.o",), f"{_LAYER}self_attn.o_proj.weight", "hkd -> d(hk)"),
    Weight((f"{_OURS}attention.q_bias",), f"{_LAYER}self_attn.q_proj.bias", "hk -> (hk)", attrgetter("attention_bias")),
    Weight((f"{_OURS}attention.k_bias",), f"{_LAYER}self_attn.k_proj.bias", "gk -> (gk)", attrgetter("attention_bias")),
    Weight((f"{_OURS}attention.v_bias",), f"{_LAYER}self_attn.v_proj.bias", "gk -> (gk)", attrgetter("attention_bias")),
    Weight((f"{_OURS}attention.o_bias",), f"{_LAYER}self_attn.o_proj.bias", "d -> d", attrgetter("attention_out_bias")),
    Weight((f"{_OURS}attention.q_norm.scale",), f"{_LAYER}self_attn.q_norm.weight", "k -> k", attrgetter("qk_norm")),
    Weight((f"{_OURS}attention.k_norm.scale",), f"{_LAYER}self_attn.k_norm.weight", "k -> k", attrgetter("qk_norm")),
    Weight((f"{_OURS}mlp_norm.scale",), f"{_LAYER}post_attention_layernorm.weight", "d -> d"),
    Weight(("final_norm.scale",), "model.norm.weight", "d -> d"),
    Weight(("head.kernel",), "lm_head.weight", "vd -> vd", untied),
)
MLP = (
    Weight((f"{_OURS}mlp.gate",), f"{_LAYER}mlp.gate_proj.weight", "df -> fd"),
    Weight((f"{_OURS}mlp.up",), f"{_LAYER}mlp.up_proj.weight", "df -> fd"),
    Weight((f"{_OURS}mlp.down",), f"{_LAYER}mlp.down_proj.weight", "fd -> df"),
    Weight((f"{_OURS}mlp.gate_bias",), f"{_LAYER}mlp.gate_proj.bias", "f -> f", attrgetter("mlp_bias")),
    Weight((f"{_OURS}mlp.up_bias",), f"{_LAYER}mlp.up_proj.bias", "f -> f", attrgetter("mlp_bias")),
    Weight((f"{_OURS}mlp.down_bias",), f"{_LAYER}mlp.down_proj.bias", "d -> d", attrgetter("mlp_bias")),
)
WEIGHTS = (*WITHOUT_MLP, *MLP)


def family(
    model_type: str,
    architecture: str,
    *,
    keys: Mapping[str, str],
    defaults: Mapping[str, Any],
    weights: tuple[Weight, ...] = WEIGHTS,
    **others: Any,
) -> Family:
    """A family like Llama: its own keys and defaults besides those of all, and `others` in place of theirs."""
    common = {
        "constants": CONSTANTS,
        "synonyms": SYNONYMS,
        "harmless": HARMLESS,
        "buffers": BUFFERS,
        "read_config": read_config,
        "write_config": write_rope,
        "misfits": rope_misfits,
    }
    return Family(
        model_type=model_type,
        architecture=architecture,
        keys={**KEYS, **keys},
        defaults={**DEFAULTS, **defaults},
        prefix=PREFIX,
        embedding=EMBEDDING,
        weights=weights,
        **{**common, **others},
    )
