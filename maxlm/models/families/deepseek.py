"""The DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437) families: transformers' `DeepseekV2ForCausalLM` and
`DeepseekV3ForCausalLM`.

Their files hold the channels that RoPE turns as neighbouring pairs. V3's have behind the last layer those of the
modules that predict further ahead, each with its own copy of embedding and head.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from maxlm.errors import ConfigError
from maxlm.models.config import ModelConfig
from maxlm.models.families import llama_like
from maxlm.models.families.rope import LATENT_NUMBERS, read_rope, rope_misfits, write_rope
from maxlm.models.families.table import Family, Weight

# The keys of our section, and theirs.
LATENT = {
    "kv_rank": "kv_lora_rank",
    "q_rank": "q_lora_rank",
    "nope_head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_LATENT_DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02}
_HARMLESS = frozenset(
    ["attention_dropout", "auto_map", "aux_loss_alpha", "ep_size", "output_router_logits", "pretraining_tp", "seq_aux"]
)
# Of layers with experts; where all layers are dense they say nothing.
_EXPERTS = frozenset(
    ["moe_intermediate_size", "moe_layer_freq", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob"]
    + ["num_experts_per_tok", "routed_scaling_factor", "scoring_func", "topk_group", "topk_method"]
)


def _compressed(config: ModelConfig) -> bool:
    return config.latent is not None and config.latent.q_rank is not None


def _whole(config: ModelConfig) -> bool:
    return not _compressed(config)


_LAYER, _OURS = "model.layers.{layer}.", "decoder.*."
_ATTENTION, _OUR_ATTENTION = f"{_LAYER}self_attn.", f"{_OURS}attention."

# Llama's with another attention, without biases.
WEIGHTS = (
    *(weight for weight in llama_like.WEIGHTS if "self_attn" not in weight.theirs and "bias" not in weight.theirs),
    Weight((f"{_OUR_ATTENTION}q",), f"{_ATTENTION}q_proj.weight", "dhk -> (hk)d", _whole, interleaved=True),
    Weight((f"{_OUR_ATTENTION}q_down",), f"{_ATTENTION}q_a_proj.weight", "dr -> rd", _compressed),
    Weight((f"{_OUR_ATTENTION}q_norm.scale",), f"{_ATTENTION}q_a_layernorm.weight", "r -> r", _compressed),
    Weight((f"{_OUR_ATTENTION}q_up",), f"{_ATTENTION}q_b_proj.weight", "rhk -> (hk)r", _compressed, interleaved=True),
    Weight((f"{_OUR_ATTENTION}kv_down",), f"{_ATTENTION}kv_a_proj_with_mqa.weight", "dx -> xd", interleaved=True),
    Weight((f"{_OUR_ATTENTION}kv_norm.scale",), f"{_ATTENTION}kv_a_layernorm.weight", "c -> c"),
    Weight((f"{_OUR_ATTENTION}kv_up",), f"{_ATTENTION}kv_b_proj.weight", "chu -> (hu)c"),
    Weight((f"{_OUR_ATTENTION}o",), f"{_ATTENTION}o_proj.weight", "hwd -> d(hw)"),
)  # fmt: skip


def _of_module(weight: Weight) -> Weight:
    """A layer's weight in a module that predicts further ahead."""
    ours = tuple(path.replace(_OURS, "mtp.*.block.") for path in weight.ours)
    return replace(weight, ours=ours, theirs=weight.theirs.replace("{layer}", "{module}"))


_MODULE = "model.layers.{module}."
MTP_WEIGHTS = (
    Weight(("mtp.*.embedding_norm.scale",), f"{_MODULE}enorm.weight", "d -> d"),
    Weight(("mtp.*.hidden_norm.scale",), f"{_MODULE}hnorm.weight", "d -> d"),
    Weight(("mtp.*.embedding_proj", "mtp.*.hidden_proj"), f"{_MODULE}eh_proj.weight", "de -> e(nd)"),
    Weight(("mtp.*.norm.scale",), f"{_MODULE}shared_head.norm.weight", "d -> d"),
    *(_of_module(weight) for weight in WEIGHTS if weight.layered),
)


def _read_config(theirs: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    read = read_rope(theirs, LATENT_NUMBERS)
    latent = {ours: read.pop(key, _LATENT_DEFAULTS[key]) for ours, key in LATENT.items()}
    # What transformers derives and writes.
    for key, value in (
        ("head_dim", latent["rope_head_dim"]),
        ("qk_head_dim", latent["nope_head_dim"] + latent["rope_head_dim"]),
    ):
        if read.pop(key, value) != value:
            raise ConfigError(f"{key} = {theirs[key]!r}: the other widths of heads make it {value}")
    n_heads = read.get("num_attention_heads", defaults["num_attention_heads"])
    kv_heads = read.pop("num_key_value_heads", None)
    if kv_heads not in (None, n_heads):
        raise ConfigError(f"num_key_value_heads = {kv_heads!r}: latent attention has as many as queries, {n_heads!r}")
    n_layers = read.get("num_hidden_layers", defaults["num_hidden_layers"])
    n_dense = read.pop("first_k_dense_replace", defaults["first_k_dense_replace"])
    if not isinstance(n_layers, int) or not isinstance(n_dense, int) or n_dense < n_layers:
        raise ConfigError(f"first_k_dense_replace = {n_dense!r}: only models of dense layers alone can be read")
    return {key: value for key, value in read.items() if key not in _EXPERTS} | {"latent": latent}


def _write_config(config: ModelConfig) -> dict[str, Any]:
    assert config.latent is not None
    sizes = {key: getattr(config.latent, ours) for ours, key in LATENT.items()}
    dense = {"first_k_dense_replace": config.n_layers}
    return write_rope(config) | sizes | dense | {"num_key_value_heads": config.n_heads}


def _misfits(config: ModelConfig) -> Iterator[str]:
    yield from rope_misfits(config)
    if config.latent is None:
        yield "model.latent = None (it has latent attention)"


def _as_filed(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Without the modules that predict further ahead where the files do: transformers does not write them."""
    behind = re.compile(rf"(model\.)?layers\.{config.n_layers}\..*")
    if any(behind.fullmatch(name) for name in names):
        return config
    return config.model_copy(update={"mtp_layers": 0})


def _family(
    model_type: str,
    architecture: str,
    *,
    keys: Mapping[str, str],
    defaults: Mapping[str, Any],
    constants: Mapping[str, Any],
    **others: Any,
) -> Family:
    left_out = ("num_key_value_heads", "head_dim")
    return Family(
        model_type=model_type,
        architecture=architecture,
        keys={key: ours for key, ours in llama_like.KEYS.items() if key not in left_out} | keys,
        sections=frozenset({"latent"}),
        defaults={**_DEFAULTS, **defaults},
        constants={**llama_like.CONSTANTS, "attention_bias": False, **constants},
        synonyms=llama_like.SYNONYMS,
        harmless=_HARMLESS,
        buffers=llama_like.BUFFERS,
        prefix=llama_like.PREFIX,
        embedding=llama_like.EMBEDDING,
        read_config=partial(_read_config, defaults=defaults),
        write_config=_write_config,
        misfits=_misfits,
        **others,
    )


DEEPSEEK_V2 = _family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    keys={},
    defaults={
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "first_k_dense_replace": 0,
    },
    constants={"mlp_bias": False},
    weights=WEIGHTS,
)

DEEPSEEK_V3 = _family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    keys={"num_nextn_predict_layers": "mtp_layers"},
    defaults={
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
    },
    constants={"rope_interleave": True},
    weights=(*WEIGHTS, *MTP_WEIGHTS),
    copies={
        r"model\.layers\.\d+\.embed_tokens\.weight": llama_like.EMBEDDING,
        r"model\.layers\.\d+\.shared_head\.head\.weight": "lm_head.weight",
    },
    as_filed=_as_filed,
)
