"""The OLMo 2 family (arXiv:2501.00656): transformers' `Olmo2ForCausalLM`.

Norms stand behind the blocks, and queries and keys are normed over all their heads together.
"""

from __future__ import annotations

from maxlm.models.families import llama_like
from maxlm.models.families.llama_like import LAYER, OURS
from maxlm.models.families.table import Weight

_NORMS = (
    Weight((f"{OURS}attention_out_norm.scale",), f"{LAYER}post_attention_layernorm.weight", "d -> d"),
    Weight((f"{OURS}mlp_out_norm.scale",), f"{LAYER}post_feedforward_layernorm.weight", "d -> d"),
    Weight((f"{OURS}attention.q_norm.scale",), f"{LAYER}self_attn.q_norm.weight", "hk -> (hk)"),
    Weight((f"{OURS}attention.k_norm.scale",), f"{LAYER}self_attn.k_norm.weight", "gk -> (gk)"),
)

OLMO2 = llama_like.family(
    "olmo2",
    "Olmo2ForCausalLM",
    keys={"attention_bias": "attention_bias"},
    defaults={
        "vocab_size": 50304,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    bricks={"norm_placement": "branch", "qk_norm": "all"},
    linked={"attention_out_bias": "attention_bias"},
    weights=(*llama_like.ENDS, *_NORMS, *llama_like.ATTENTION, *llama_like.MLP),
)
