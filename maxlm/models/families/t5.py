"""The T5 family (arXiv:1910.10683) and mT5 (arXiv:2010.11934): transformers' `T5ForConditionalGeneration`, which v1.1,
Flan-T5 and ByT5 are too, and `MT5ForConditionalGeneration`.

Version 1.1 and mT5 have a head of their own, though transformers says of all that it is tied: where the files hold a
head that differs from the embedding, it takes that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families.table import Family, Weight, untied

_PROJECTIONS = {"relu": "relu", "gated-gelu": "geglu"}


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`num_decoder_layers` that is not given is `num_layers`; a head is tied where its input is scaled."""
    read = dict(theirs)
    if read.get("num_decoder_layers") is None:
        read["num_decoder_layers"] = read.get("num_layers", 6)
    projection = read.get("feed_forward_proj", "relu")
    if projection not in _PROJECTIONS:
        raise ConfigError(f"feed_forward_proj = {projection!r}: only {' and '.join(_PROJECTIONS)} can be read")
    read["feed_forward_proj"] = _PROJECTIONS[projection]
    tied = read.pop("tie_word_embeddings", True) is not False
    return read | {"tie_word_embeddings": read.pop("scale_decoder_outputs", tied)}


def _read_mt5(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return _read_config({"feed_forward_proj": "gated-gelu", "num_layers": 8} | dict(theirs)) | {
        "tie_word_embeddings": False
    }


def _write_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _PROJECTIONS.items()}
    return {"feed_forward_proj": theirs[config.mlp], "scale_decoder_outputs": config.tied_embeddings}


def _follow(values: Mapping[str, Any]) -> dict[str, Any]:
    tied, width = values.get("tied_embeddings", True), values.get("d_model")
    return {"logit_scale": width**-0.5 if tied and isinstance(width, int) else 1.0}


def _misfits(config: ModelConfig):
    if config.kv_heads != config.n_heads:
        yield f"model.n_kv_heads = {config.kv_heads} (it has as many as n_heads = {config.n_heads})"
    if config.mlp not in _PROJECTIONS.values():
        yield f"model.mlp = {config.mlp!r} (it has {' or '.join(map(repr, _PROJECTIONS.values()))})"


def _gated(config: ModelConfig) -> bool:
    return config.gated


def _plain(config: ModelConfig) -> bool:
    return not config.gated


def _attention(ours: str, theirs: str) -> tuple[Weight, ...]:
    layouts = {"q": "dhk -> (hk)d", "k": "dgk -> (gk)d", "v": "dgk -> (gk)d", "o": "hkd -> d(hk)"}
    return tuple(Weight((f"{ours}.{name}",), f"{theirs}.{name}.weight", layouts[name]) for name in layouts)


def _side(side: str, mlp: int) -> tuple[Weight, ...]:
    """The lines of one side; `mlp` is the number of the feed-forward block among its layers' parts."""
    ours, theirs = f"{side}.*.", f"{side}.block.{{layer}}.layer."
    final = "encoder_norm" if side == "encoder" else "final_norm"
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Weight((f"relative.{side}",), bias, "bh -> bh"),
        Weight((f"{ours}attention_norm.scale",), f"{theirs}0.layer_norm.weight", "d -> d"),
        *_attention(f"{ours}attention", f"{theirs}0.SelfAttention"),
        Weight((f"{ours}mlp_norm.scale",), f"{theirs}{mlp}.layer_norm.weight", "d -> d"),
        Weight((f"{ours}mlp.up",), f"{theirs}{mlp}.DenseReluDense.wi.weight", "df -> fd", _plain),
        Weight((f"{ours}mlp.gate",), f"{theirs}{mlp}.DenseReluDense.wi_0.weight", "df -> fd", _gated),
        Weight((f"{ours}mlp.up",), f"{theirs}{mlp}.DenseReluDense.wi_1.weight", "df -> fd", _gated),
        Weight((f"{ours}mlp.down",), f"{theirs}{mlp}.DenseReluDense.wo.weight", "fd -> df"),
        Weight((f"{final}.scale",), f"{side}.final_layer_norm.weight", "d -> d"),
    )


def _family(model_type: str, architecture: str, **others: Any) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        keys={
            "vocab_size": "vocab_size",
            "num_layers": "n_encoder_layers",
            "num_decoder_layers": "n_layers",
            "d_model": "d_model",
            "num_heads": "n_heads",
            "d_kv": "head_dim",
            "d_ff": "d_ff",
            "n_positions": "max_seq_len",
            "relative_attention_num_buckets": "relative_buckets",
            "relative_attention_max_distance": "relative_max_distance",
            "layer_norm_epsilon": "norm_eps",
            "feed_forward_proj": "mlp",
            "tie_word_embeddings": "tied_embeddings",
            "decoder_start_token_id": "decoder_start_id",
        },
        constants={"is_encoder_decoder": True, "is_decoder": False, "dropout_rate": 0.0},
        harmless=frozenset(
            [
                "dropout_rate",
                "classifier_dropout",
                "initializer_factor",
                "output_past",
                "tokenizer_class",
                "dense_act_fn",
                "is_gated_act",
            ]
        ),
        buffers=r"(encoder|decoder)\.embed_tokens\.weight|"
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        write_config=_write_config,
        follow=_follow,
        misfits=_misfits,
        derived=frozenset({"n_kv_heads"}),
        prefix="",
        embedding="shared.weight",
        weights=(
            Weight(("embedding.tokens",), "shared.weight", "vd -> vd"),
            *_side("encoder", 1),
            *_side("decoder", 2),
            Weight(("decoder.*.cross_norm.scale",), "decoder.block.{layer}.layer.1.layer_norm.weight", "d -> d"),
            *_attention("decoder.*.cross", "decoder.block.{layer}.layer.1.EncDecAttention"),
            Weight(("head.kernel",), "lm_head.weight", "vd -> vd", untied),
        ),
        **others,
    )


_BRICKS = {"kind": "encoder_decoder", "norm": "rms", "positions": "relative", "attention_scale": 1.0}
_DEFAULTS = {
    "vocab_size": 32128,
    "num_layers": 6,
    "num_heads": 8,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "n_positions": 512,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "decoder_start_token_id": 0,
}

T5 = _family("t5", "T5ForConditionalGeneration", defaults=_DEFAULTS, bricks=_BRICKS, read_config=_read_config)
# A gated block and a head of its own alone tell an mT5 from a T5, and a T5 may have both: it is exported as T5.
MT5 = _family(
    "mt5",
    "MT5ForConditionalGeneration",
    defaults=_DEFAULTS | {"vocab_size": 250112, "num_layers": 8, "num_heads": 6, "d_ff": 1024},
    bricks=_BRICKS | {"tied_embeddings": False},
    read_config=_read_mt5,
)
