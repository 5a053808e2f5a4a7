"""The Gemma 2 family (arXiv:2408.00118): transformers' `Gemma2ForCausalLM`; Gemma 3 shares most of it.

Their norms multiply by 1 + weight, as ours with `norm_unit_offset`, so weights are the same in both. Scores are scaled
by `query_pre_attn_scalar` ** -0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.layer_types import FULL, SLIDING, read_layer_types, write_layer_types
from maxlm.models.families.llama_like import LAYER, OURS
from maxlm.models.families.rope import rope_misfits, write_rope
from maxlm.models.families.table import Weight

DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
}


def read_attention(read: dict[str, Any], every: Any) -> dict[str, Any]:
    """Windows and the scale of scores. Without `layer_types` each `every`-th layer is global."""
    n_layers, scalar = read.get("num_hidden_layers", 26), read.get("query_pre_attn_scalar", 256)
    layer_types, window = read.pop("layer_types", None), read.get("sliding_window", 4096)
    if not isinstance(n_layers, int) or not isinstance(every, int) or every < 1:
        raise ConfigError(
            f"num_hidden_layers = {n_layers!r}, sliding_window_pattern = {every!r}: expected two integers"
        )
    if not isinstance(scalar, int | float) or scalar <= 0:
        raise ConfigError(f"query_pre_attn_scalar = {scalar!r}: expected a number over 0")
    if layer_types is None:
        layer_types = [SLIDING if layer % every else FULL for layer in range(1, n_layers + 1)]
    pattern, n_sliding = read_layer_types(layer_types, n_layers), layer_types.count(SLIDING)
    if n_sliding and window is None:
        raise ConfigError(f"layer_types has {n_sliding} sliding layers, and sliding_window = None")
    return read | {
        "layer_types": pattern,
        "sliding_window": window if n_sliding else None,
        "query_pre_attn_scalar": None if scalar == read.get("head_dim", 256) else scalar**-0.5,
    }


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window_size` is an old name of `sliding_window`, kept beside it."""
    read = llama_like.read_config(theirs)
    if read.get("sliding_window_size") == read.get("sliding_window", 4096):
        read.pop("sliding_window_size", None)
    return read_attention(read, 2)


def _scalar(config: ModelConfig) -> int:
    """`query_pre_attn_scalar`, which is a whole number."""
    return config.head_width if config.attention_scale is None else round(config.attention_scale**-2)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """RoPE, windows and the scale of scores for config.json; transformers runs no model without a window."""
    window = config.attention_window or config.max_seq_len
    others = {"sliding_window": window, "query_pre_attn_scalar": _scalar(config)}
    return write_rope(config) | write_layer_types(config) | others


def misfits(config: ModelConfig) -> Iterator[str]:
    """What keeps a model out of both families."""
    yield from rope_misfits(config)
    if config.d_model % config.n_heads:
        yield f"model.d_model = {config.d_model} (transformers asks for a multiple of n_heads = {config.n_heads})"
    scale, scalar = config.attention_scale, _scalar(config)
    if scale is not None and (scalar < 1 or scalar**-0.5 != scale):
        yield f"model.attention_scale = {scale!r} (it has the -0.5th power of a whole number)"


COMMON = {
    "bricks": {"norm_unit_offset": True, "norm_placement": "sandwich", "embedding_scale": True, "mlp": "geglu"},
    "linked": {"attention_out_bias": "attention_bias"},
    "mixed": True,
    "synonyms": {},
    "harmless": llama_like.HARMLESS | {"hidden_act", "cache_implementation"},
}
KEYS = {
    "sliding_window": "attention_window",
    "layer_types": "attention_pattern",
    "query_pre_attn_scalar": "attention_scale",
    "final_logit_softcapping": "logit_softcap",
    "attention_bias": "attention_bias",
}
CONSTANTS = {"hidden_activation": "gelu_pytorch_tanh", "attention_dropout": 0.0}
_NORMS = (
    Weight((f"{OURS}attention_norm.scale",), f"{LAYER}input_layernorm.weight", "d -> d"),
    Weight((f"{OURS}attention_out_norm.scale",), f"{LAYER}post_attention_layernorm.weight", "d -> d"),
    Weight((f"{OURS}mlp_norm.scale",), f"{LAYER}pre_feedforward_layernorm.weight", "d -> d"),
    Weight((f"{OURS}mlp_out_norm.scale",), f"{LAYER}post_feedforward_layernorm.weight", "d -> d"),
)
WEIGHTS = (*llama_like.ENDS, *_NORMS, *llama_like.ATTENTION, *llama_like.MLP)

GEMMA2 = llama_like.family(
    "gemma2",
    "Gemma2ForCausalLM",
    keys={**KEYS, "attn_logit_softcapping": "attention_softcap"},
    defaults={
        **DEFAULTS,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    **COMMON,
    constants=CONSTANTS,
    read_config=_read_config,
    write_config=write_config,
    misfits=misfits,
    weights=WEIGHTS,
)
