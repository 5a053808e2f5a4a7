"""The Llama family (arXiv:2302.13971): transformers' `LlamaForCausalLM`.

Its files hold RoPE in the half-split layout, as our rotation has it, so projections need no permutation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.models.config import ModelConfig
from maxlm.models.families.table import Family, Weight


def _attention_bias(config: ModelConfig) -> bool:
    return config.attention_bias


def _mlp_bias(config: ModelConfig) -> bool:
    return config.mlp_bias


def _untied(config: ModelConfig) -> bool:
    return not config.tied_embeddings


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    read = dict(theirs)
    rope = read.pop("rope_parameters", None)
    if isinstance(rope, dict):
        rope = dict(rope)
        if "rope_theta" in rope:
            read["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type") == "default":
            del rope["rope_type"]
    if rope:
        read["rope_scaling"] = rope
    return read


def _misfits(config: ModelConfig) -> Iterator[str]:
    if config.d_model % config.n_heads:
        yield f"model.d_model = {config.d_model} (transformers asks for a multiple of n_heads = {config.n_heads})"


_LAYER, _OURS = "model.layers.{layer}.", "decoder.0."

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={
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
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "tie_word_embeddings": "tied_embeddings",
        "initializer_range": "init_std",
    },
    defaults={
        "vocab_size": 32000,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    bricks={
        "norm": "rms",
        "positions": "rope",
        "mlp": "swiglu",
        "qk_norm": False,
        "attention_softcap": None,
        "logit_softcap": None,
    },
    linked={"attention_out_bias": "attention_bias"},
    constants={"hidden_act": "silu", "rope_scaling": None, "attention_dropout": 0.0, "pretraining_tp": 1},
    synonyms={"hidden_act": ("swish",)},
    harmless=frozenset({"attention_dropout", "pretraining_tp"}),
    buffers=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    read_config=_read_config,
    misfits=_misfits,
    prefix="model.",
    embedding="model.embed_tokens.weight",
    weights=(
        Weight(("embedding.tokens",), "model.embed_tokens.weight", "vd -> vd"),
        Weight((f"{_OURS}attention_norm.scale",), f"{_LAYER}input_layernorm.weight", "d -> d"),
        Weight((f"{_OURS}attention.q",), f"{_LAYER}self_attn.q_proj.weight", "dhk -> (hk)d"),
        Weight((f"{_OURS}attention.k",), f"{_LAYER}self_attn.k_proj.weight", "dgk -> (gk)d"),
        Weight((f"{_OURS}attention.v",), f"{_LAYER}self_attn.v_proj.weight", "dgk -> (gk)d"),
        Weight((f"{_OURS}attention.o",), f"{_LAYER}self_attn.o_proj.weight", "hkd -> d(hk)"),
        Weight((f"{_OURS}attention.q_bias",), f"{_LAYER}self_attn.q_proj.bias", "hk -> (hk)", _attention_bias),
        Weight((f"{_OURS}attention.k_bias",), f"{_LAYER}self_attn.k_proj.bias", "gk -> (gk)", _attention_bias),
        Weight((f"{_OURS}attention.v_bias",), f"{_LAYER}self_attn.v_proj.bias", "gk -> (gk)", _attention_bias),
        Weight((f"{_OURS}attention.o_bias",), f"{_LAYER}self_attn.o_proj.bias", "d -> d", _attention_bias),
        Weight((f"{_OURS}mlp_norm.scale",), f"{_LAYER}post_attention_layernorm.weight", "d -> d"),
        Weight((f"{_OURS}mlp.gate",), f"{_LAYER}mlp.gate_proj.weight", "df -> fd"),
        Weight((f"{_OURS}mlp.up",), f"{_LAYER}mlp.up_proj.weight", "df -> fd"),
        Weight((f"{_OURS}mlp.down",), f"{_LAYER}mlp.down_proj.weight", "fd -> df"),
        Weight((f"{_OURS}mlp.gate_bias",), f"{_LAYER}mlp.gate_proj.bias", "f -> f", _mlp_bias),
        Weight((f"{_OURS}mlp.up_bias",), f"{_LAYER}mlp.up_proj.bias", "f -> f", _mlp_bias),
        Weight((f"{_OURS}mlp.down_bias",), f"{_LAYER}mlp.down_proj.bias", "d -> d", _mlp_bias),
        Weight(("final_norm.scale",), "model.norm.weight", "d -> d"),
        Weight(("head.kernel",), "lm_head.weight", "vd -> vd", _untied),
    ),
)
