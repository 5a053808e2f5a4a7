"""The OPT family (arXiv:2205.01068): transformers' `OPTForCausalLM`. Not OPT-350M, which norms after its blocks and has
token vectors of half its width."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families.table import Family, Weight, plain_heads, untied


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Token vectors may be said to be as wide as the model."""
    read = dict(theirs)
    width, d_model = read.pop("word_embed_proj_dim", None), read.get("hidden_size", 768)
    if width not in (None, d_model):
        raise ConfigError(
            f"word_embed_proj_dim = {width!r}, hidden_size = {d_model!r}: projections between token vectors and the "
            "residual stream (OPT-350M) are not known here"
        )
    return read


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return {"word_embed_proj_dim": config.d_model}


_LAYER, _OURS = "model.decoder.layers.{layer}.", "decoder.*."
_BIASES = attrgetter("attention_bias")

OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    keys={
        "vocab_size": "vocab_size",
        "num_hidden_layers": "n_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "ffn_dim": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "enable_bias": "attention_bias",
        "tie_word_embeddings": "tied_embeddings",
        "init_std": "init_std",
    },
    defaults={
        "vocab_size": 50272,
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "enable_bias": True,
        "tie_word_embeddings": True,
        "init_std": 0.02,
    },
    bricks={"norm": "layer", "norm_eps": 1e-5, "positions": "learned", "position_offset": 2, "mlp": "relu"},
    linked={"attention_out_bias": "attention_bias", "mlp_bias": "attention_bias"},
    constants={
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    harmless=frozenset({"dropout", "attention_dropout", "activation_dropout", "layerdrop", "prefix"}),
    read_config=_read_config,
    write_config=_write_config,
    misfits=plain_heads,
    derived=frozenset({"n_kv_heads", "head_dim"}),
    prefix="model.",
    embedding="model.decoder.embed_tokens.weight",
    weights=(
        Weight(("embedding.tokens",), "model.decoder.embed_tokens.weight", "vd -> vd"),
        Weight(("embedding.positions",), "model.decoder.embed_positions.weight", "pd -> pd"),
        Weight((f"{_OURS}attention_norm.scale",), f"{_LAYER}self_attn_layer_norm.weight", "d -> d"),
        Weight((f"{_OURS}attention_norm.bias",), f"{_LAYER}self_attn_layer_norm.bias", "d -> d"),
        *(
            Weight((f"{_OURS}attention.{name}",), f"{_LAYER}self_attn.{name}_proj.weight", "dhk -> (hk)d")
            for name in "qkv"
        ),
        *(
            Weight((f"{_OURS}attention.{name}_bias",), f"{_LAYER}self_attn.{name}_proj.bias", "hk -> (hk)", _BIASES)
            for name in "qkv"
        ),
        Weight((f"{_OURS}attention.o",), f"{_LAYER}self_attn.out_proj.weight", "hkd -> d(hk)"),
        Weight((f"{_OURS}attention.o_bias",), f"{_LAYER}self_attn.out_proj.bias", "d -> d", _BIASES),
        Weight((f"{_OURS}mlp_norm.scale",), f"{_LAYER}final_layer_norm.weight", "d -> d"),
        Weight((f"{_OURS}mlp_norm.bias",), f"{_LAYER}final_layer_norm.bias", "d -> d"),
        Weight((f"{_OURS}mlp.up",), f"{_LAYER}fc1.weight", "df -> fd"),
        Weight((f"{_OURS}mlp.up_bias",), f"{_LAYER}fc1.bias", "f -> f", _BIASES),
        Weight((f"{_OURS}mlp.down",), f"{_LAYER}fc2.weight", "fd -> df"),
        Weight((f"{_OURS}mlp.down_bias",), f"{_LAYER}fc2.bias", "d -> d", _BIASES),
        Weight(("final_norm.scale",), "model.decoder.final_layer_norm.weight", "d -> d"),
        Weight(("final_norm.bias",), "model.decoder.final_layer_norm.bias", "d -> d"),
        Weight(("head.kernel",), "lm_head.weight", "vd -> vd", untied),
    ),
)
