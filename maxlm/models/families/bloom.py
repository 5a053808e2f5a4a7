"""The BLOOM family (arXiv:2211.05100): transformers' `BloomForCausalLM`.

Queries, keys and values are one projection, head by head, as in GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.models.config import ModelConfig
from maxlm.models.families.table import Family, Weight, plain_heads, untied

_OLD_NAMES = {"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The feed-forward block is four times as wide as the model, which `n_inner` may say."""
    read = dict(theirs)
    for old, name in _OLD_NAMES.items():
        value = read.pop(old, None)
        if value is not None:
            read.setdefault(name, value)
    if read.get("n_inner") is None and isinstance(read.get("hidden_size", 64), int):
        read["n_inner"] = 4 * read.get("hidden_size", 64)
    return read


def _misfits(config: ModelConfig) -> Iterator[str]:
    yield from plain_heads(config)
    if config.d_ff != 4 * config.d_model:
        yield f"model.d_ff = {config.d_ff} (it has 4 d_model = {4 * config.d_model})"


_LAYER, _OURS = "transformer.h.{layer}.", "decoder.*."
_QKV = tuple(f"{_OURS}attention.{name}" for name in "qkv")

BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    keys={
        "vocab_size": "vocab_size",
        "n_layer": "n_layers",
        "hidden_size": "d_model",
        "n_head": "n_heads",
        "n_inner": "d_ff",
        "seq_length": "max_seq_len",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tied_embeddings",
        "initializer_range": "init_std",
    },
    defaults={
        "vocab_size": 250880,
        "n_layer": 2,
        "hidden_size": 64,
        "n_head": 8,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    bricks={
        "norm": "layer",
        "embedding_norm": True,
        "positions": "alibi",
        "mlp": "gelu",
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    constants={
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    harmless=frozenset(
        [
            "hidden_dropout",
            "attention_dropout",
            "pretraining_tp",
            "slow_but_exact",
            "attention_softmax_in_fp32",
            "masked_softmax_fusion",
            "bias_dropout_fusion",
            "offset_alibi",
        ]
    ),
    read_config=_read_config,
    misfits=_misfits,
    derived=frozenset({"n_kv_heads", "head_dim"}),
    prefix="transformer.",
    embedding="transformer.word_embeddings.weight",
    weights=(
        Weight(("embedding.tokens",), "transformer.word_embeddings.weight", "vd -> vd"),
        Weight(("embedding.norm.scale",), "transformer.word_embeddings_layernorm.weight", "d -> d"),
        Weight(("embedding.norm.bias",), "transformer.word_embeddings_layernorm.bias", "d -> d"),
        Weight((f"{_OURS}attention_norm.scale",), f"{_LAYER}input_layernorm.weight", "d -> d"),
        Weight((f"{_OURS}attention_norm.bias",), f"{_LAYER}input_layernorm.bias", "d -> d"),
        Weight(_QKV, f"{_LAYER}self_attention.query_key_value.weight", "dhk -> (hnk)d"),
        Weight(tuple(f"{name}_bias" for name in _QKV), f"{_LAYER}self_attention.query_key_value.bias", "hk -> (hnk)"),
        Weight((f"{_OURS}attention.o",), f"{_LAYER}self_attention.dense.weight", "hkd -> d(hk)"),
        Weight((f"{_OURS}attention.o_bias",), f"{_LAYER}self_attention.dense.bias", "d -> d"),
        Weight((f"{_OURS}mlp_norm.scale",), f"{_LAYER}post_attention_layernorm.weight", "d -> d"),
        Weight((f"{_OURS}mlp_norm.bias",), f"{_LAYER}post_attention_layernorm.bias", "d -> d"),
        Weight((f"{_OURS}mlp.up",), f"{_LAYER}mlp.dense_h_to_4h.weight", "df -> fd"),
        Weight((f"{_OURS}mlp.up_bias",), f"{_LAYER}mlp.dense_h_to_4h.bias", "f -> f"),
        Weight((f"{_OURS}mlp.down",), f"{_LAYER}mlp.dense_4h_to_h.weight", "fd -> df"),
        Weight((f"{_OURS}mlp.down_bias",), f"{_LAYER}mlp.dense_4h_to_h.bias", "d -> d"),
        Weight(("final_norm.scale",), "transformer.ln_f.weight", "d -> d"),
        Weight(("final_norm.bias",), "transformer.ln_f.bias", "d -> d"),
        Weight(("head.kernel",), "lm_head.weight", "vd -> vd", untied),
    ),
)
