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
from maxlm.models.stacks import LayerKind

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_KEYS = {key: ours for key, ours in llama_like.KEYS.items() if key not in ("num_key_value_heads", "head_dim")} | {
    "kv_lora_rank": "latent.kv_rank",
    "q_lora_rank": "latent.q_rank",
    "qk_nope_head_dim": "latent.nope_head_dim",
    "qk_rope_head_dim": "latent.rope_head_dim",
    "v_head_dim": "latent.v_head_dim",
}
_EXPERTS = {
    "first_k_dense_replace": "moe.first_layer",
    "n_routed_experts": "moe.n_experts",
    "num_experts_per_tok": "moe.experts_per_token",
    "moe_intermediate_size": "moe.d_ff",
    "n_shared_experts": "moe.n_shared_experts",
    "routed_scaling_factor": "moe.routed_scale",
    "n_group": "moe.n_groups",
    "topk_group": "moe.groups_per_token",
}
_HARMLESS = frozenset(
    ["attention_dropout", "auto_map", "aux_loss_alpha", "ep_size", "output_router_logits", "pretraining_tp", "seq_aux"]
)


def _compressed(config: ModelConfig) -> bool:
    return config.latent is not None and config.latent.q_rank is not None


def _whole(config: ModelConfig) -> bool:
    return not _compressed(config)


def _dense(kind: LayerKind) -> bool:
    return not kind.experts


def _sparse(kind: LayerKind) -> bool:
    return kind.experts


_LAYER, _OURS = "model.layers.{layer}.", "decoder.*."
_ATTENTION, _OUR_ATTENTION = f"{_LAYER}self_attn.", f"{_OURS}attention."
_MLP, _OUR_MOE = f"{_LAYER}mlp.", f"{_OURS}moe."

# Llama's without biases, with another attention, and its feed-forward block in some layers alone.
_OF_LLAMA = tuple(
    replace(weight, kinds=_dense) if weight.theirs.startswith(_MLP) else weight
    for weight in llama_like.WEIGHTS
    if "self_attn" not in weight.theirs and "bias" not in weight.theirs
)
WEIGHTS = (
    *_OF_LLAMA,
    Weight((f"{_OUR_ATTENTION}q",), f"{_ATTENTION}q_proj.weight", "dhk -> (hk)d", _whole, interleaved=True),
    Weight((f"{_OUR_ATTENTION}q_down",), f"{_ATTENTION}q_a_proj.weight", "dr -> rd", _compressed),
    Weight((f"{_OUR_ATTENTION}q_norm.scale",), f"{_ATTENTION}q_a_layernorm.weight", "r -> r", _compressed),
    Weight((f"{_OUR_ATTENTION}q_up",), f"{_ATTENTION}q_b_proj.weight", "rhk -> (hk)r", _compressed, interleaved=True),
    Weight((f"{_OUR_ATTENTION}kv_down",), f"{_ATTENTION}kv_a_proj_with_mqa.weight", "dx -> xd", interleaved=True),
    Weight((f"{_OUR_ATTENTION}kv_norm.scale",), f"{_ATTENTION}kv_a_layernorm.weight", "c -> c"),
    Weight((f"{_OUR_ATTENTION}kv_up",), f"{_ATTENTION}kv_b_proj.weight", "chu -> (hu)c"),
    Weight((f"{_OUR_ATTENTION}o",), f"{_ATTENTION}o_proj.weight", "hwd -> d(hw)"),
    Weight((f"{_OUR_MOE}router.kernel",), f"{_MLP}gate.weight", "de -> ed", kinds=_sparse),
    Weight((f"{_OUR_MOE}experts.gate",), f"{_MLP}experts.{{expert}}.gate_proj.weight", "dm -> md", kinds=_sparse),
    Weight((f"{_OUR_MOE}experts.up",), f"{_MLP}experts.{{expert}}.up_proj.weight", "dm -> md", kinds=_sparse),
    Weight((f"{_OUR_MOE}experts.down",), f"{_MLP}experts.{{expert}}.down_proj.weight", "md -> dm", kinds=_sparse),
    Weight((f"{_OUR_MOE}shared.gate",), f"{_MLP}shared_experts.gate_proj.weight", "ds -> sd", kinds=_sparse),
    Weight((f"{_OUR_MOE}shared.up",), f"{_MLP}shared_experts.up_proj.weight", "ds -> sd", kinds=_sparse),
    Weight((f"{_OUR_MOE}shared.down",), f"{_MLP}shared_experts.down_proj.weight", "sd -> ds", kinds=_sparse),
)
# What the router adds to choose experts by.
_BALANCE = Weight((f"{_OUR_MOE}router.balance_bias",), f"{_MLP}gate.e_score_correction_bias", "e -> e", kinds=_sparse)


def _of_module(weight: Weight) -> Weight:
    """A layer's weight in a module that predicts further ahead."""
    ours = tuple(path.replace(_OURS, "mtp.*.block.") for path in weight.ours)
    return replace(weight, ours=ours, theirs=weight.theirs.replace("{layer}", "{module}"))


_MODULE = "model.layers.{module}."
MTP_WEIGHTS = (
    Weight(("mtp.*.embedding_norm.scale",), f"{_MODULE}enorm.weight", "d -> d"),
    Weight(("mtp.*.hidden_norm.scale",), f"{_MODULE}hnorm.weight", "d -> d"),
    Weight(("mtp.*.embedding_proj", "mtp.*.hidden_proj"), f"{_MODULE}eh_proj.weight", "dD -> D(nd)"),
    Weight(("mtp.*.norm.scale",), f"{_MODULE}shared_head.norm.weight", "d -> d"),
    *(_of_module(weight) for weight in (*WEIGHTS, _BALANCE) if weight.layered),
)


def _read_config(theirs: Mapping[str, Any], *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE in all spellings; without what transformers derives from other keys and writes besides; and without experts
    where no layer has them."""
    read = read_rope(theirs, LATENT_NUMBERS)

    def value(key: str) -> Any:
        return read.get(key, defaults.get(key, _DEFAULTS.get(key)))

    turned, whole = value("qk_rope_head_dim"), (value("qk_nope_head_dim"), value("qk_rope_head_dim"))
    if not all(isinstance(width, int) for width in whole):
        raise ConfigError(f"qk_nope_head_dim, qk_rope_head_dim = {whole!r}: expected two integers")
    for key, derived in (
        ("head_dim", turned),
        ("qk_head_dim", sum(whole)),
        ("num_key_value_heads", value("num_attention_heads")),
    ):
        if (given := read.pop(key, None)) not in (None, derived):
            raise ConfigError(f"{key} = {given!r}: with this latent attention it is {derived!r}")
    n_layers, n_dense = value("num_hidden_layers"), value("first_k_dense_replace")
    if not isinstance(n_layers, int) or not isinstance(n_dense, int):
        raise ConfigError(
            f"num_hidden_layers = {n_layers!r}, first_k_dense_replace = {n_dense!r}: expected two integers"
        )
    return read | (dict.fromkeys(_EXPERTS) if n_dense >= n_layers else {})


def _read_v2(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of experts count with one way to choose."""
    read = _read_config(theirs, defaults=_V2_DEFAULTS)
    method = read.pop("topk_method", "greedy")
    if method == "greedy":
        return read | {"n_group": None, "topk_group": None}
    if method != "group_limited_greedy":
        raise ConfigError(f"topk_method = {method!r}: the methods that can be read are greedy, group_limited_greedy")
    return read


def _write_config(config: ModelConfig, *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    found = write_rope(config) | {"num_key_value_heads": config.n_heads}
    if config.moe is None:
        found |= {key: defaults.get(key) for key in _EXPERTS} | {"first_k_dense_replace": config.n_layers}
    return found


def _write_v2(config: ModelConfig) -> dict[str, Any]:
    grouped = config.moe is not None and config.moe.n_groups > 1
    method = {"topk_method": "group_limited_greedy" if grouped else "greedy"}
    return _write_config(config, defaults=_V2_DEFAULTS) | method


def _misfits(config: ModelConfig) -> Iterator[str]:
    yield from rope_misfits(config)
    if config.latent is None:
        yield "model.latent = None (it has latent attention)"
    if config.moe is not None and not config.moe.n_shared_experts:
        yield "model.moe.n_shared_experts = 0 (it has some)"


def _v3_misfits(config: ModelConfig) -> Iterator[str]:
    yield from _misfits(config)
    if config.moe is not None and config.moe.balance_bias_rate is None:
        yield "model.moe.balance_bias_rate = None (it has a bias, which 0 leaves as it is)"


def _as_filed(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Without the modules that predict further ahead where the files do: transformers does not write them."""
    behind = re.compile(rf"(model\.)?layers\.{config.n_layers}\..*")
    if any(behind.fullmatch(name) for name in names):
        return config
    return config.model_copy(update={"mtp_layers": 0})


_V2_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "moe_intermediate_size": 1407,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
}
_V3_DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
}


def _family(
    model_type: str, architecture: str, *, keys: Mapping[str, str], constants: Mapping[str, Any], **others: Any
) -> Family:
    return Family(
        model_type=model_type,
        architecture=architecture,
        keys={**_KEYS, **_EXPERTS, **keys},
        constants={**llama_like.CONSTANTS, "attention_bias": False, "moe_layer_freq": 1, **constants},
        synonyms=llama_like.SYNONYMS,
        harmless=_HARMLESS,
        buffers=llama_like.BUFFERS,
        prefix=llama_like.PREFIX,
        embedding=llama_like.EMBEDDING,
        derived=frozenset({"latent"}),
        mixed=True,
        all_dense=True,
        **others,
    )


DEEPSEEK_V2 = _family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    keys={},
    defaults={**_DEFAULTS, **_V2_DEFAULTS},
    constants={"mlp_bias": False, "norm_topk_prob": False, "scoring_func": "softmax"},
    bricks={"moe.router": "softmax", "moe.normalize_weights": False},
    weights=WEIGHTS,
    read_config=_read_v2,
    write_config=_write_v2,
    misfits=_misfits,
)

DEEPSEEK_V3 = _family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    keys={"norm_topk_prob": "moe.normalize_weights", "num_nextn_predict_layers": "mtp_layers"},
    defaults={**_DEFAULTS, **_V3_DEFAULTS},
    constants={"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    bricks={"moe.router": "sigmoid"},
    assumed={"moe.balance_bias_rate": 0.0},
    weights=(*WEIGHTS, _BALANCE, *MTP_WEIGHTS),
    copies={
        r"model\.layers\.\d+\.embed_tokens\.weight": llama_like.EMBEDDING,
        r"model\.layers\.\d+\.shared_head\.head\.weight": "lm_head.weight",
    },
    as_filed=_as_filed,
    read_config=partial(_read_config, defaults=_V3_DEFAULTS),
    write_config=partial(_write_config, defaults=_V3_DEFAULTS),
    misfits=_v3_misfits,
)
