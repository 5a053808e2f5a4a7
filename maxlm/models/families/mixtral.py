"""The Mixtral family (arXiv:2401.04088): transformers' `MixtralForCausalLM`, a Mistral with experts in every layer."""

from __future__ import annotations

from maxlm.models.families import llama_like
from maxlm.models.families.table import Weight

_OURS, _THEIRS = "decoder.*.moe.", "model.layers.{layer}.block_sparse_moe."
_EXPERT = f"{_THEIRS}experts.{{expert}}."

MIXTRAL = llama_like.family(
    "mixtral",
    "MixtralForCausalLM",
    keys={
        "sliding_window": "attention_window",
        "num_local_experts": "moe.n_experts",
        "num_experts_per_tok": "moe.experts_per_token",
        "router_aux_loss_coef": "moe.balance_loss",
    },
    defaults={
        "vocab_size": 32000,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    linked={"moe.d_ff": "d_ff"},
    bricks={"moe.router": "softmax", "moe.normalize_weights": True},
    harmless=llama_like.HARMLESS | {"output_router_logits", "router_jitter_noise"},
    weights=(
        *llama_like.WITHOUT_MLP,
        Weight((f"{_OURS}router.kernel",), f"{_THEIRS}gate.weight", "de -> ed"),
        Weight((f"{_OURS}experts.gate",), f"{_EXPERT}w1.weight", "dm -> md"),
        Weight((f"{_OURS}experts.up",), f"{_EXPERT}w3.weight", "dm -> md"),
        Weight((f"{_OURS}experts.down",), f"{_EXPERT}w2.weight", "md -> dm"),
    ),
)
