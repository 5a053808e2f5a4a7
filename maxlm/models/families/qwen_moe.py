"""The Qwen3-MoE family (arXiv:2505.09388): transformers' `Qwen3MoeForCausalLM`, a Qwen3 with experts in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.rope import write_rope
from maxlm.models.families.table import Weight

_OURS, _THEIRS = "decoder.*.moe.", "model.layers.{layer}.mlp."
_EXPERT = f"{_THEIRS}experts.{{expert}}."


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """A window counts with `use_sliding_window` alone, and is then of all layers. Layers that `mlp_only_layers` names
    are dense, and so are those whose number, from 1, `decoder_sparse_step` does not divide."""
    read = llama_like.read_config(theirs)
    window = read.pop("sliding_window", 4096)
    read["sliding_window"] = window if read.pop("use_sliding_window", False) else None
    dense, step = read.pop("mlp_only_layers", None) or [], read.pop("decoder_sparse_step", 1)
    n_layers = read.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])
    if not isinstance(dense, list) or not isinstance(step, int) or not isinstance(n_layers, int) or step < 1:
        raise ConfigError(
            f"mlp_only_layers = {dense!r}, decoder_sparse_step = {step!r}, num_hidden_layers = {n_layers!r}: expected "
            "a list of layers and two integers, at least 1"
        )
    sparse = [layer for layer in range(n_layers) if layer not in dense and (layer + 1) % step == 0]
    every = sparse[1] - sparse[0] if len(sparse) > 1 else max(step, 1)
    if not sparse or sparse != list(range(sparse[0], n_layers, every)):
        raise ConfigError(
            f"mlp_only_layers = {dense!r}, decoder_sparse_step = {step}: layers with experts are {sparse}; those that "
            "can be read are every n-th from some layer on to the last"
        )
    return read | {"mlp_only_layers": sparse[0], "decoder_sparse_step": every}


def _write_config(config: ModelConfig) -> dict[str, Any]:
    dense = [layer for layer, kind in enumerate(config.layer_kinds) if not kind.experts]
    slide = {"use_sliding_window": config.attention_window is not None}
    return write_rope(config) | slide | {"decoder_sparse_step": 1, "mlp_only_layers": dense}


_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "attention_bias": False,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}

QWEN3_MOE = llama_like.family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    keys={
        "sliding_window": "attention_window",
        "attention_bias": "attention_bias",
        "num_experts": "moe.n_experts",
        "num_experts_per_tok": "moe.experts_per_token",
        "moe_intermediate_size": "moe.d_ff",
        "norm_topk_prob": "moe.normalize_weights",
        "mlp_only_layers": "moe.first_layer",
        "decoder_sparse_step": "moe.every",
        "router_aux_loss_coef": "moe.balance_loss",
    },
    defaults=_DEFAULTS,
    bricks={"qk_norm": True, "moe.router": "softmax"},
    linked={"attention_out_bias": "attention_bias"},
    mixed=True,
    harmless=llama_like.HARMLESS | {"output_router_logits", "max_window_layers"},
    read_config=_read_config,
    write_config=_write_config,
    weights=(
        *llama_like.WITHOUT_MLP,
        *(replace(weight, kinds=lambda kind: not kind.experts) for weight in llama_like.MLP),
        *(
            replace(weight, kinds=lambda kind: kind.experts)
            for weight in (
                Weight((f"{_OURS}router.kernel",), f"{_THEIRS}gate.weight", "de -> ed"),
                Weight((f"{_OURS}experts.gate",), f"{_EXPERT}gate_proj.weight", "dm -> md"),
                Weight((f"{_OURS}experts.up",), f"{_EXPERT}up_proj.weight", "dm -> md"),
                Weight((f"{_OURS}experts.down",), f"{_EXPERT}down_proj.weight", "md -> dm"),
            )
        ),
    ),
)
