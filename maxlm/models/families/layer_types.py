"""`layer_types` of config.json, which names each layer's attention: transformers' spelling of `attention_pattern`."""

from __future__ import annotations

from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(layer_types: Any, n_layers: int) -> list[str]:
    """Our `attention_pattern`; empty where all layers are alike: then the window alone says which they are.

    Raises ConfigError on what is no list of known names, one a layer.
    """
    if not isinstance(layer_types, list) or len(layer_types) != n_layers:
        raise ConfigError(f"layer_types = {layer_types!r}: expected a list of {n_layers} names, one a layer")
    if unknown := {name for name in layer_types if name not in (FULL, SLIDING)}:
        raise ConfigError(f"layer_types: {sorted(map(str, unknown))} is neither {FULL} nor {SLIDING}")
    pattern = ["local" if name == SLIDING else "global" for name in layer_types]
    return shortest(pattern) if len(set(pattern)) > 1 else []


def shortest(pattern: list[str]) -> list[str]:
    """The shortest list that, repeated, begins with all of `pattern`."""
    return next(
        pattern[:period]
        for period in range(1, len(pattern) + 1)
        if all(name == pattern[i % period] for i, name in enumerate(pattern))
    )


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
    """`layer_types` for config.json."""
    return {"layer_types": [SLIDING if kind.local else FULL for kind in config.layer_kinds]}
