"""The Gemma 3 family (arXiv:2503.19786) without its vision encoder: transformers' `Gemma3ForCausalLM`.

A Gemma 2 with norms of queries and keys in place of soft-caps, and RoPE of its own in local layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families import gemma2, llama_like
from maxlm.models.families.layer_types import FULL, SLIDING


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of the two kinds of layers stands in `rope_parameters` from version 5 on, and beside it before."""
    read, rope = dict(theirs), theirs.get("rope_parameters")
    if isinstance(rope, Mapping) and not {FULL, SLIDING}.isdisjoint(rope):
        local = {"rope_type": "default"} | dict(rope.get(SLIDING) or {})
        read |= {"rope_parameters": rope.get(FULL), "rope_local_base_freq": local.pop("rope_theta", 10_000.0)}
        if local != {"rope_type": "default"}:
            raise ConfigError(f"rope_parameters.{SLIDING} = {rope[SLIDING]!r}: RoPE of local layers is not scaled here")
    read = llama_like.read_config(read)
    old_name = read.pop("_sliding_window_pattern", 6)
    read = gemma2.read_attention(read, read.pop("sliding_window_pattern", old_name))
    read.setdefault("rope_local_base_freq", 10_000.0)
    plain = read.get("rope_scaling") is None and read["rope_local_base_freq"] == read.get("rope_theta", 1e6)
    if read["sliding_window"] is None or plain:
        read["rope_local_base_freq"] = None
    return read


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return gemma2.write_config(config) | {"rope_local_base_freq": config.local_rope_theta or config.rope_theta}


def _misfits(config: ModelConfig) -> Iterator[str]:
    yield from gemma2.misfits(config)
    if config.rope_scaling is not None and config.local_rope_theta is None and config.attention_window is not None:
        yield "model.rope_scaling in local layers too (it has it in global ones alone; give local_rope_theta)"


GEMMA3 = llama_like.family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    keys={**gemma2.KEYS, "rope_local_base_freq": "local_rope_theta"},
    defaults={**gemma2.DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6},
    **{**gemma2.COMMON, "bricks": {**gemma2.COMMON["bricks"], "qk_norm": "head"}},
    # Its attention reads no soft-cap, whatever stands in config.json.
    constants={**gemma2.CONSTANTS, "attn_logit_softcapping": None},
    read_config=_read_config,
    write_config=_write_config,
    misfits=_misfits,
    weights=(*gemma2.WEIGHTS, *llama_like.HEAD_NORMS),
)
