"""The Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) families: transformers' `Qwen2ForCausalLM` and
`Qwen3ForCausalLM`, which differ in biases and the norms of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.layer_types import FULL, SLIDING, read_layer_types, write_layer_types
from maxlm.models.families.rope import write_rope

_DEFAULTS = {
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
}


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A window slides in the layers from `max_window_layers` on, or in those that `layer_types` names, and only with
    `use_sliding_window`."""
    read = llama_like.read_config(theirs)
    window, layer_types = read.pop("sliding_window", 4096), read.pop("layer_types", None)
    slides, first = read.pop("use_sliding_window", False), read.pop("max_window_layers", 28)
    n_layers = read.get("num_hidden_layers", llama_like.DEFAULTS["num_hidden_layers"])
    if not isinstance(n_layers, int) or not isinstance(first, int):
        raise ConfigError(f"num_hidden_layers = {n_layers!r}, max_window_layers = {first!r}: expected two integers")
    if layer_types is None:
        first = first if slides and window is not None else n_layers
        layer_types = [FULL if layer < first else SLIDING for layer in range(n_layers)]
    pattern, n_sliding = read_layer_types(layer_types, n_layers), layer_types.count(SLIDING)
    if n_sliding and not (slides and window):
        raise ConfigError(f"layer_types has {n_sliding} sliding layers, and use_sliding_window = {slides!r}")
    return read | {"sliding_window": window if n_sliding else None, "layer_types": pattern}


def _write_config(config: ModelConfig) -> dict[str, Any]:
    local = [kind.local for kind in config.layer_kinds]
    first = local.index(True) if any(local) else config.n_layers
    slide = {"use_sliding_window": any(local), "max_window_layers": first, **write_layer_types(config)}
    return write_rope(config) | slide


QWEN2 = llama_like.family(
    "qwen2",
    "Qwen2ForCausalLM",
    keys={"sliding_window": "attention_window", "layer_types": "attention_pattern"},
    defaults=_DEFAULTS,
    bricks={"attention_bias": True},
    mixed=True,
    read_config=_read_config,
    write_config=_write_config,
)

QWEN3 = llama_like.family(
    "qwen3",
    "Qwen3ForCausalLM",
    keys={
        "sliding_window": "attention_window",
        "layer_types": "attention_pattern",
        "attention_bias": "attention_bias",
    },
    defaults={**_DEFAULTS, "head_dim": 128, "attention_bias": False},
    bricks={"qk_norm": "head"},
    mixed=True,
    linked={"attention_out_bias": "attention_bias"},
    read_config=_read_config,
    write_config=_write_config,
)
