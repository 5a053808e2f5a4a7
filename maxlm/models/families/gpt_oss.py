"""The GPT-OSS family (arXiv:2508.10925): transformers' `GptOssForCausalLM`. Weights in bfloat16 or float32: files whose
experts are packed as MXFP4, as those published are, are refused by their `quantization_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.layer_types import FULL, SLIDING, read_layer_types, write_layer_types
from maxlm.models.families.rope import write_rope
from maxlm.models.families.table import Weight
from maxlm.models.mlp import CLAMP, CLAMPED_GAIN

_OURS, _THEIRS = "decoder.*.moe.", "model.layers.{layer}.mlp."
_EXPERTS = f"{_THEIRS}experts."
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Of layers that `layer_types` does not name every second slides, the first too; and RoPE that is not given is the
    published models'."""
    theirs = dict(theirs)
    if not theirs.get("rope_scaling") and not theirs.get("rope_parameters"):
        theirs["rope_scaling"] = _ROPE
    read = llama_like.read_config(theirs)
    n_layers = read.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])
    types = read.pop("layer_types", None)
    if types is None:
        types = [FULL if layer % 2 else SLIDING for layer in range(n_layers)]
    window = read.pop("sliding_window", 128) if SLIDING in types else None
    return read | {"sliding_window": window, "layer_types": read_layer_types(types, n_layers)}


def _write_config(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config) if config.rope_scaling is not None else {"rope_scaling": {"rope_type": "default"}}
    return rope | write_layer_types(config)


_DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.001,
}

GPT_OSS = llama_like.family(
    "gpt_oss",
    "GptOssForCausalLM",
    keys={
        "sliding_window": "attention_window",
        "layer_types": "attention_pattern",
        "num_local_experts": "moe.n_experts",
        "num_experts_per_tok": "moe.experts_per_token",
        "router_aux_loss_coef": "moe.balance_loss",
    },
    defaults=_DEFAULTS,
    constants={**llama_like.CONSTANTS, "attention_bias": True, "swiglu_limit": CLAMP, "swiglu_alpha": CLAMPED_GAIN},
    linked={"moe.d_ff": "d_ff"},
    bricks={
        "attention_bias": True,
        "attention_out_bias": True,
        "attention_sinks": True,
        "mlp": "swiglu_clamped",
        "moe.router": "topk_softmax",
        "moe.router_bias": True,
        "moe.expert_bias": True,
    },
    mixed=True,
    harmless=llama_like.HARMLESS | {"output_router_logits", "experts_per_token", "initial_context_length"},
    read_config=_read_config,
    write_config=_write_config,
    weights=(
        *llama_like.WITHOUT_MLP,
        Weight(("decoder.*.attention.sinks",), "model.layers.{layer}.self_attn.sinks", "h -> h"),
        Weight((f"{_OURS}router.kernel",), f"{_THEIRS}router.weight", "de -> ed"),
        Weight((f"{_OURS}router.bias",), f"{_THEIRS}router.bias", "e -> e"),
        Weight((f"{_OURS}experts.gate", f"{_OURS}experts.up"), f"{_EXPERTS}gate_up_proj", "edm -> ed(mn)"),
        Weight((f"{_OURS}experts.gate_bias", f"{_OURS}experts.up_bias"), f"{_EXPERTS}gate_up_proj_bias", "em -> e(mn)"),
        Weight((f"{_OURS}experts.down",), f"{_EXPERTS}down_proj", "emd -> emd"),
        Weight((f"{_OURS}experts.down_bias",), f"{_EXPERTS}down_proj_bias", "ed -> ed"),
    ),
)
