"""The Llama family (arXiv:2302.13971, arXiv:2407.21783): transformers' `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterator

from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.rope import rope_misfits


def _misfits(config: ModelConfig) -> Iterator[str]:
    yield from rope_misfits(config)
    if config.d_model % config.n_heads:
        yield f"model.d_model = {config.d_model} (transformers asks for a multiple of n_heads = {config.n_heads})"


LLAMA = llama_like.family(
    "llama",
    "LlamaForCausalLM",
    keys={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    linked={"attention_out_bias": "attention_bias"},
    constants={**llama_like.CONSTANTS, "pretraining_tp": 1},
    harmless=llama_like.HARMLESS | {"pretraining_tp"},
    misfits=_misfits,
)
