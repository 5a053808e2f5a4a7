"""The Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) families: transformers' `Qwen2ForCausalLM` and
`Qwen3ForCausalLM`, which differ in biases and the norms of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.rope import write_rope

_DEFAULTS = {
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
}


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A window slides in the layers from `max_window_layers` on, or in those that `layer_types` names, and only with
    `use_sliding_window`. Raises ConfigError where some layers slide and others do not."""
    read = llama_like.read_config(theirs)
    window, layer_types = read.pop("sliding_window", 4096), read.pop("layer_types", None)
    slides, first = read.pop("use_sliding_window", False), read.pop("max_window_layers", 28)
    n_layers = read.get("num_hidden_layers", llama_like.DEFAULTS["num_hidden_layers"])
    if not isinstance(n_layers, int) or not isinstance(first, int) or not isinstance(layer_types, list | None):
        raise ConfigError(
            f"num_hidden_layers = {n_layers!r}, max_window_layers = {first!r}, layer_types = {layer_types!r}: "
            "expected two integers and a list"
        )
    if layer_types is None:
        sliding = max(0, n_layers - first) if slides and window is not None else 0
    else:
        sliding = sum(kind != "full_attention" for kind in layer_types)
        if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
            raise ConfigError(f"layer_types: {sorted(unknown)} is neither full_attention nor sliding_attention")
        if sliding and not (slides and window):
            raise ConfigError(f"layer_types has {sliding} sliding layers, and use_sliding_window = {slides!r}")
    if 0 < sliding < n_layers:
        raise ConfigError(
            f"use_sliding_window = True: a window slides in {sliding} of {n_layers} layers (max_window_layers, "
            "layer_types), and maxlm's layers are all alike; it reads models in which all slide, or none"
        )
    return read | {"sliding_window": window if sliding else None}


def _write_config(config: ModelConfig) -> dict[str, Any]:
    window = config.attention_window
    slide = {"use_sliding_window": window is not None, "max_window_layers": config.n_layers if window is None else 0}
    return write_rope(config) | slide


QWEN2 = llama_like.family(
    "qwen2",
    "Qwen2ForCausalLM",
    keys={"sliding_window": "attention_window"},
    defaults=_DEFAULTS,
    bricks={"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "qk_norm": False},
    read_config=_read_config,
    write_config=_write_config,
)

QWEN3 = llama_like.family(
    "qwen3",
    "Qwen3ForCausalLM",
    keys={"sliding_window": "attention_window", "attention_bias": "attention_bias"},
    defaults={**_DEFAULTS, "head_dim": 128, "attention_bias": False},
    bricks={"mlp_bias": False, "qk_norm": True},
    linked={"attention_out_bias": "attention_bias"},
    read_config=_read_config,
    write_config=_write_config,
)
