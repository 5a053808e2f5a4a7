"""Encoder-decoders with norms behind their blocks: BART (arXiv:1910.13461), transformers'
`BartForConditionalGeneration`, and Marian (arXiv:1804.00344), `MarianMTModel`, which is the original Transformer
(arXiv:1706.03762) with biases in attention and on the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families.bert import norm
from maxlm.models.families.table import Family, Weight, plain_heads

_ACTIVATIONS = {"gelu": "gelu_exact", "relu": "relu", "swish": "silu"}
# Of both sides there is one with us.
_SIDES = {"attention_heads": "n_heads", "ffn_dim": "d_ff"}


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    read = dict(theirs)
    for name in _SIDES:
        encoder, decoder = (read.get(f"{side}_{name}", _DEFAULTS[f"encoder_{name}"]) for side in ("encoder", "decoder"))
        if encoder != decoder:
            raise ConfigError(f"encoder_{name} = {encoder!r}, decoder_{name} = {decoder!r}: both must be one")
        read.pop(f"decoder_{name}", None)
    activation = read.get("activation_function", "gelu")
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"activation_function = {activation!r}: only {', '.join(_ACTIVATIONS)} can be read")
    return read | {"activation_function": _ACTIVATIONS[activation]}


def _read_marian(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Both sides have one vocabulary."""
    read = _read_config(theirs)
    decoder = read.pop("decoder_vocab_size", None)
    if decoder not in (None, read.get("vocab_size", decoder)):
        raise ConfigError(f"decoder_vocab_size = {decoder!r} is not vocab_size = {read.get('vocab_size')!r}")
    return read


def _write_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    sides = {f"decoder_{name}": getattr(config, ours) for name, ours in _SIDES.items()}
    return sides | {"activation_function": theirs[config.mlp]}


def _misfits(config: ModelConfig):
    yield from plain_heads(config)
    if config.mlp not in _ACTIVATIONS.values():
        yield f"model.mlp = {config.mlp!r} (it has {' or '.join(map(repr, _ACTIVATIONS.values()))})"


def _attention(ours: str, theirs: str) -> list[Weight]:
    layouts = {
        "q": ("q_proj", "dhk -> (hk)d", "hk -> (hk)"),
        "k": ("k_proj", "dgk -> (gk)d", "gk -> (gk)"),
        "v": ("v_proj", "dgk -> (gk)d", "gk -> (gk)"),
        "o": ("out_proj", "hkd -> d(hk)", "d -> d"),
    }
    lines = []
    for name, (their_name, layout, bias) in layouts.items():
        lines.append(Weight((f"{ours}.{name}",), f"{theirs}.{their_name}.weight", layout))
        lines.append(Weight((f"{ours}.{name}_bias",), f"{theirs}.{their_name}.bias", bias))
    return lines


def _side(side: str) -> list[Weight]:
    ours, theirs = f"{side}.*.", f"model.{side}.layers.{{layer}}."
    lines = [
        *_attention(f"{ours}attention", f"{theirs}self_attn"),
        *norm(f"{ours}attention_out_norm", f"{theirs}self_attn_layer_norm"),
        Weight((f"{ours}mlp.up",), f"{theirs}fc1.weight", "df -> fd"),
        Weight((f"{ours}mlp.up_bias",), f"{theirs}fc1.bias", "f -> f"),
        Weight((f"{ours}mlp.down",), f"{theirs}fc2.weight", "fd -> df"),
        Weight((f"{ours}mlp.down_bias",), f"{theirs}fc2.bias", "d -> d"),
        *norm(f"{ours}mlp_out_norm", f"{theirs}final_layer_norm"),
    ]
    if side == "decoder":
        lines += _attention(f"{ours}cross", f"{theirs}encoder_attn")
        lines += norm(f"{ours}cross_out_norm", f"{theirs}encoder_attn_layer_norm")
    return lines


_BRICKS = {
    "kind": "encoder_decoder",
    "norm": "layer",
    "norm_placement": "post",
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tied_embeddings": True,
    "head_bias": True,
}
_KEYS = {
    "vocab_size": "vocab_size",
    "encoder_layers": "n_encoder_layers",
    "decoder_layers": "n_layers",
    "d_model": "d_model",
    "encoder_attention_heads": "n_heads",
    "encoder_ffn_dim": "d_ff",
    "max_position_embeddings": "max_seq_len",
    "activation_function": "mlp",
    "scale_embedding": "embedding_scale",
    "init_std": "init_std",
    "decoder_start_token_id": "decoder_start_id",
}
_DEFAULTS = {
    "vocab_size": 50265,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "activation_function": "gelu_exact",
    "scale_embedding": False,
    "init_std": 0.02,
    "decoder_start_token_id": 2,
}
_CONSTANTS = {
    "is_encoder_decoder": True,
    "is_decoder": False,
    "tie_word_embeddings": True,
    "normalize_before": False,
    "add_final_layer_norm": False,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_HARMLESS = frozenset(
    [
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "encoder_layerdrop",
        "decoder_layerdrop",
        "classifier_dropout",
        "classif_dropout",
        "gradient_checkpointing",
        "num_hidden_layers",
        "add_bias_logits",
        "bad_words_ids",
        "early_stopping",
        "force_bos_token_to_be_generated",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beams",
        "prefix",
        "output_past",
        "extra_pos_embeddings",
    ]
)
_SHARED = r"model\.(encoder|decoder)\.(embed_tokens\.weight|version)"
_WEIGHTS = (
    Weight(("embedding.tokens",), "model.shared.weight", "vd -> vd"),
    *_side("encoder"),
    *_side("decoder"),
    # transformers keeps it, but does not train it, and adds it to the logits.
    Weight(("head.bias",), "final_logits_bias", "v -> nv"),
)
_PLACES = (
    Weight(("encoder_embedding.positions",), "model.encoder.embed_positions.weight", "pd -> pd"),
    Weight(("embedding.positions",), "model.decoder.embed_positions.weight", "pd -> pd"),
    *norm("encoder_embedding.norm", "model.encoder.layernorm_embedding"),
    *norm("embedding.norm", "model.decoder.layernorm_embedding"),
)

BART = Family(
    model_type="bart",
    architecture="BartForConditionalGeneration",
    keys=_KEYS,
    defaults=_DEFAULTS,
    bricks=_BRICKS | {"positions": "learned", "position_offset": 2, "embedding_norm": True},
    constants=_CONSTANTS | {"normalize_embedding": True},
    harmless=_HARMLESS,
    buffers=_SHARED,
    read_config=_read_config,
    write_config=_write_config,
    misfits=_misfits,
    derived=frozenset({"n_kv_heads", "head_dim"}),
    prefix="model.",
    embedding="model.shared.weight",
    weights=_WEIGHTS + _PLACES,
)

MARIAN = Family(
    model_type="marian",
    architecture="MarianMTModel",
    keys=_KEYS,
    defaults=_DEFAULTS | {"vocab_size": 58101, "decoder_start_token_id": 58100},
    bricks=_BRICKS | {"positions": "sinusoidal"},
    constants=_CONSTANTS
    | {"normalize_embedding": False, "share_encoder_decoder_embeddings": True, "static_position_embeddings": True},
    harmless=_HARMLESS,
    buffers=rf"{_SHARED}|model\.(encoder|decoder)\.embed_positions\.weight",
    read_config=_read_marian,
    write_config=lambda config: _write_config(config) | {"decoder_vocab_size": config.vocab_size},
    misfits=_misfits,
    derived=frozenset({"n_kv_heads", "head_dim"}),
    prefix="model.",
    embedding="model.shared.weight",
    weights=_WEIGHTS,
)
