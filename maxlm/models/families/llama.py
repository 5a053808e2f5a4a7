"""The Llama family (arXiv:2302.13971, arXiv:2407.21783): transformers' `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterator

from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.rope import rope_misfits, write_rope
from maxlm.models.families.table import Family


def _misfits(config: ModelConfig) -> Iterator[str]:
    yield from rope_misfits(config)
    if config.d_model % config.n_heads:
        yield f"model.d_model = {config.d_model} (transformers asks for a multiple of n_heads = {config.n_heads})"


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={**llama_like.KEYS, "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={
        **llama_like.DEFAULTS,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
    },
    bricks={**llama_like.BRICKS, "attention_window": None, "qk_norm": False},
    linked={"attention_out_bias": "attention_bias"},
    constants={**llama_like.CONSTANTS, "pretraining_tp": 1},
    synonyms=llama_like.SYNONYMS,
    harmless=llama_like.HARMLESS | {"pretraining_tp"},
    buffers=llama_like.BUFFERS,
    read_config=llama_like.read_config,
    write_config=write_rope,
    misfits=_misfits,
    prefix=llama_like.PREFIX,
    embedding=llama_like.EMBEDDING,
    weights=llama_like.WEIGHTS,
)
