"""The GPT-NeoX family (arXiv:2204.06745), of which Pythia (arXiv:2304.01373) is: transformers' `GPTNeoXForCausalLM`.

Queries, keys and values are one projection, head by head: the query, key and value of the first, then of the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from maxlm.models.config import ModelConfig
from maxlm.models.families.rope import read_rope, rope_misfits, write_rope
from maxlm.models.families.table import Family, Weight, plain_heads, untied


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The names that `rope_parameters` has for them are brought to this family's own."""
    read = read_rope(theirs)
    for general, own in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        if general in read and general not in theirs:
            read[own] = read.pop(general)
    return read


def _misfits(config: ModelConfig) -> Iterator[str]:
    yield from rope_misfits(config)
    yield from plain_heads(config)


_LAYER, _OURS = "gpt_neox.layers.{layer}.", "decoder.*."
_QKV = tuple(f"{_OURS}attention.{name}" for name in "qkv")
_QKV_BIAS = tuple(f"{name}_bias" for name in _QKV)

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    keys={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "layer_norm_eps": "norm_eps",
        "rotary_emb_base": "rope_theta",
        "rotary_pct": "rope_fraction",
        "rope_scaling": "rope_scaling",
        "attention_bias": "attention_bias",
        "use_parallel_residual": "parallel_residual",
        "tie_word_embeddings": "tied_embeddings",
        "initializer_range": "init_std",
    },
    defaults={
        "vocab_size": 50432,
        "num_hidden_layers": 44,
        "hidden_size": 6144,
        "num_attention_heads": 64,
        "intermediate_size": 24576,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000.0,
        "rotary_pct": 0.25,
        "attention_bias": True,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    bricks={"norm": "layer", "mlp": "gelu_exact", "mlp_bias": True},
    linked={"attention_out_bias": "attention_bias"},
    constants={"hidden_act": "gelu", "attention_dropout": 0.0, "hidden_dropout": 0.0},
    harmless=frozenset({"attention_dropout", "hidden_dropout", "classifier_dropout"}),
    buffers=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    read_config=_read_config,
    write_config=write_rope,
    misfits=_misfits,
    derived=frozenset({"n_kv_heads", "head_dim"}),
    prefix="gpt_neox.",
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    weights=(
        Weight(("embedding.tokens",), "gpt_neox.embed_in.weight", "vd -> vd"),
        Weight((f"{_OURS}attention_norm.scale",), f"{_LAYER}input_layernorm.weight", "d -> d"),
        Weight((f"{_OURS}attention_norm.bias",), f"{_LAYER}input_layernorm.bias", "d -> d"),
        Weight(_QKV, f"{_LAYER}attention.query_key_value.weight", "dhk -> (hnk)d"),
        Weight(_QKV_BIAS, f"{_LAYER}attention.query_key_value.bias", "hk -> (hnk)", attrgetter("attention_bias")),
        Weight((f"{_OURS}attention.o",), f"{_LAYER}attention.dense.weight", "hkd -> d(hk)"),
        Weight((f"{_OURS}attention.o_bias",), f"{_LAYER}attention.dense.bias", "d -> d", attrgetter("attention_bias")),
        Weight((f"{_OURS}mlp_norm.scale",), f"{_LAYER}post_attention_layernorm.weight", "d -> d"),
        Weight((f"{_OURS}mlp_norm.bias",), f"{_LAYER}post_attention_layernorm.bias", "d -> d"),
        Weight((f"{_OURS}mlp.up",), f"{_LAYER}mlp.dense_h_to_4h.weight", "df -> fd"),
        Weight((f"{_OURS}mlp.up_bias",), f"{_LAYER}mlp.dense_h_to_4h.bias", "f -> f"),
        Weight((f"{_OURS}mlp.down",), f"{_LAYER}mlp.dense_4h_to_h.weight", "fd -> df"),
        Weight((f"{_OURS}mlp.down_bias",), f"{_LAYER}mlp.dense_4h_to_h.bias", "d -> d"),
        Weight(("final_norm.scale",), "gpt_neox.final_layer_norm.weight", "d -> d"),
        Weight(("final_norm.bias",), "gpt_neox.final_layer_norm.bias", "d -> d"),
        Weight(("head.kernel",), "embed_out.weight", "vd -> vd", untied),
    ),
)
