"""The GPT-2 family (Radford et al. 2019): transformers' `GPT2LMHeadModel`.

Its projections are `Conv1D`s, `[in, out]` as ours, with queries, keys and values side by side in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlm.models.families.table import Family, Weight, plain_heads, untied


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`n_inner` that is not given is four times the width; `n_ctx` is an old name of `n_positions`."""
    read = dict(theirs)
    n_ctx = read.pop("n_ctx", None)
    if n_ctx is not None:
        read.setdefault("n_positions", n_ctx)
    if read.get("n_inner") is None and isinstance(read.get("n_embd", 768), int):
        read["n_inner"] = 4 * read.get("n_embd", 768)
    return read


_LAYER, _OURS = "transformer.h.{layer}.", "decoder.*."
_QKV = tuple(f"{_OURS}attention.{name}" for name in "qkv")

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys={
        "vocab_size": "vocab_size",
        "n_layer": "n_layers",
        "n_embd": "d_model",
        "n_head": "n_heads",
        "n_inner": "d_ff",
        "n_positions": "max_seq_len",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tied_embeddings",
        "initializer_range": "init_std",
    },
    defaults={
        "vocab_size": 50257,
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    bricks={
        "norm": "layer",
        "positions": "learned",
        "mlp": "gelu",
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    constants={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    synonyms={"activation_function": ("gelu_pytorch_tanh",)},
    harmless=frozenset(
        [
            "attn_pdrop",
            "embd_pdrop",
            "resid_pdrop",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
            "reorder_and_upcast_attn",
        ]
    ),
    buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    read_config=_read_config,
    misfits=plain_heads,
    derived=frozenset({"n_kv_heads", "head_dim"}),
    prefix="transformer.",
    embedding="transformer.wte.weight",
    weights=(
        Weight(("embedding.tokens",), "transformer.wte.weight", "vd -> vd"),
        Weight(("embedding.positions",), "transformer.wpe.weight", "pd -> pd"),
        Weight((f"{_OURS}attention_norm.scale",), f"{_LAYER}ln_1.weight", "d -> d"),
        Weight((f"{_OURS}attention_norm.bias",), f"{_LAYER}ln_1.bias", "d -> d"),
        Weight(_QKV, f"{_LAYER}attn.c_attn.weight", "dhk -> d(nhk)"),
        Weight(tuple(f"{name}_bias" for name in _QKV), f"{_LAYER}attn.c_attn.bias", "hk -> (nhk)"),
        Weight((f"{_OURS}attention.o",), f"{_LAYER}attn.c_proj.weight", "hkd -> (hk)d"),
        Weight((f"{_OURS}attention.o_bias",), f"{_LAYER}attn.c_proj.bias", "d -> d"),
        Weight((f"{_OURS}mlp_norm.scale",), f"{_LAYER}ln_2.weight", "d -> d"),
        Weight((f"{_OURS}mlp_norm.bias",), f"{_LAYER}ln_2.bias", "d -> d"),
        Weight((f"{_OURS}mlp.up",), f"{_LAYER}mlp.c_fc.weight", "df -> df"),
        Weight((f"{_OURS}mlp.up_bias",), f"{_LAYER}mlp.c_fc.bias", "f -> f"),
        Weight((f"{_OURS}mlp.down",), f"{_LAYER}mlp.c_proj.weight", "fd -> fd"),
        Weight((f"{_OURS}mlp.down_bias",), f"{_LAYER}mlp.c_proj.bias", "d -> d"),
        Weight(("final_norm.scale",), "transformer.ln_f.weight", "d -> d"),
        Weight(("final_norm.bias",), "transformer.ln_f.bias", "d -> d"),
        Weight(("head.kernel",), "lm_head.weight", "vd -> vd", untied),
    ),
)
