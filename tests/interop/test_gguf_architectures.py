"""Which models llama.cpp has an equal for."""

import re
from pathlib import Path

import pytest

from maxlm.errors import ConfigError
from maxlm.interop.gguf_architectures import ARCHITECTURES, architecture_for
from tests import tiny
from tests.interop import ours

# llama.cpp has one scale of scores for each size, and one place for local layers.
GEMMA2 = {**ours.MODELS["gemma2"], "attention_scale": None}
GEMMA3 = {
    **ours.MODELS["gemma3"], "n_layers": 7, "attention_pattern": ["local"] * 5 + ["global"], "local_rope_theta": 1e4,
    "rope_theta": 500.0
}  # fmt: skip
QWEN3_MOE = {**ours.MODELS["qwen3_moe"], "moe": {"n_experts": 8, "experts_per_token": 3, "d_ff": 32}}
GPT_OSS = {**ours.MODELS["gpt_oss"], "rope_scaling": ours.YARN}


# What llama.cpp has no equal for: a model, and what the message names of it.
REFUSED = {
    "biases of qwen3": ({**tiny.LLAMA, "qk_norm": "head", "attention_bias": True, "attention_out_bias": True},
                        "model.attention_bias = True"),
    "wide heads of qwen2": ({**tiny.LLAMA, "attention_bias": True, "head_dim": 24}, "model.head_dim = 24"),
    "llama 3.1's RoPE in qwen3": ({**tiny.LLAMA, "qk_norm": "head", "rope_scaling": ours.LLAMA31}, "'llama3'"),
    "gpt_neox without biases": (
        {**tiny.GPT_NEOX, "attention_bias": False, "attention_out_bias": False}, "model.attention_bias = False"
    ),
    "gemma2 without soft-caps": (
        {**GEMMA2, "attention_softcap": None, "logit_softcap": None},
        "model.attention_softcap = None (it has one); model.logit_softcap = None (it has one)",
    ),
    "a head of gemma2's own": ({**GEMMA2, "tied_embeddings": False}, "model.tied_embeddings = False"),
    "biases of gemma2": ({**GEMMA2, "attention_bias": True, "attention_out_bias": True}, "attention_bias = True"),
    "global layers of gemma2 first": (
        {**GEMMA2, "attention_pattern": ["global", "local"]},
        "model.attention_pattern = ['global', 'local'] with n_layers = 3 (its layers are local, global in turn)",
    ),
    "scores of gemma2 scaled otherwise": (
        {**GEMMA2, "attention_scale": 24**-0.5}, "model.attention_scale = 0.204124 (with n_layers = 3 it has head_dim"
    ),
    "the 27B's scale in gemma3": (
        {**GEMMA3, "n_layers": 62}, "model.attention_scale = None (with n_layers = 62 it has (d_model / n_heads)"
    ),
    "gemma3's layers": (ours.MODELS["gemma3"], "model.attention_pattern = ['local', 'local', 'global']"),
    "gemma3's local RoPE": ({**GEMMA3, "local_rope_theta": 100.0}, "local_rope_theta = 100 (it has 10000 in local"),
    "one RoPE for all layers of gemma3": (
        {**GEMMA3, "local_rope_theta": None, "rope_scaling": None}, "model.local_rope_theta = 500 (it has 10000"
    ),
    "yarn in gemma3": ({**GEMMA3, "rope_scaling": ours.YARN}, "model.rope_scaling.kind = 'yarn' (it has linear)"),
    "yarn from within pairs": (
        {**tiny.LLAMA, "rope_scaling": {**ours.YARN, "truncate": False}}, "rope_scaling.truncate = False (it has True)"
    ),
    "wide heads of olmo2": ({**ours.MODELS["olmo2"], "head_dim": 24}, "model.head_dim = 24"),
    "biases of olmo2": (
        {**ours.MODELS["olmo2"], "attention_bias": True, "attention_out_bias": True}, "model.attention_bias = True"
    ),
    "wide heads of phi3": ({**ours.MODELS["phi3"], "head_dim": 24}, "model.head_dim = 24"),
    "biases of qwen3_moe": ({**QWEN3_MOE, "attention_bias": True, "attention_out_bias": True}, "attention_bias = True"),
    "dense layers and plain weights of qwen3_moe": (
        ours.MODELS["qwen3_moe"],
        "model.moe.normalize_weights = False (it has True); model.moe.first_layer = 1, model.moe.every = 2",
    ),
    "global layers of gpt_oss first": ({**GPT_OSS, "attention_pattern": ["global", "local"]}, "['global', 'local']"),
    "the published gpt_oss's yarn": (ours.MODELS["gpt_oss"], "model.rope_scaling.truncate = False (it has True)"),
    "a family that it has not": (ours.MODELS["opt"], "opt models cannot be written as GGUF; these can: llama, mistral"),
    "yarn's own factor": (
        {**tiny.LLAMA, "rope_scaling": {**ours.YARN, "attention_factor": 2.0}}, "rope_scaling.attention_factor = 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_equal_for_is_refused_by_name(case, tmp_path):
    model, message = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(message)):
        architecture_for(tiny.config(model=model).model)


def test_the_docs_mark_the_families_that_llama_cpp_runs():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `\w+` \| *(yes)? *\|$", text, re.MULTILINE)
    assert len(rows) > len(ARCHITECTURES)
    assert {name for name, marked in rows if marked} == set(ARCHITECTURES)
