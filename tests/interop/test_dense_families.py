"""Gemma, OLMo 2, Phi-3, OPT and BLOOM: spellings of their configs, joined tensors, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from maxlm.errors import ConfigError
from maxlm.interop import files
from maxlm.interop.huggingface import export_run, import_model
from maxlm.models.families import FAMILIES, family_of
from maxlm.models.families.phi3 import PHI3
from tests import tiny
from tests.interop import ours_dense, public, public_dense


def read(config):
    """Our model of a config.json."""
    return family_of(config, "config.json").from_hf_config(config, "config.json")


def family(name):
    return next(family for family in FAMILIES if family.model_type == name)


GEMMA3 = public_dense.GEMMA3_CONFIG
ROPES = ("rope_theta", "rope_local_base_freq", "rope_scaling")
V5_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA3_SPELLINGS = {
    "RoPE of each kind of layers, as version 5 writes it": {k: x for k, x in GEMMA3.items() if k not in ROPES}
    | {"rope_parameters": V5_ROPES},
    "the pattern as version 5 writes it": {k: x for k, x in GEMMA3.items() if k != "sliding_window_pattern"}
    | {"_sliding_window_pattern": 3},
    "the kind of every layer": {k: x for k, x in GEMMA3.items() if k != "sliding_window_pattern"}
    | {"layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "sliding")]},
}


@pytest.mark.parametrize("spelling", GEMMA3_SPELLINGS)
def test_every_spelling_of_a_gemma3_is_the_same_model(spelling):
    expected = read(GEMMA3)
    assert (expected.rope_theta, expected.local_rope_theta, expected.attention_scale) == (5000.0, 100.0, 12**-0.5)
    assert expected.attention_pattern == ("local", "local", "global")
    assert read(GEMMA3_SPELLINGS[spelling]) == expected


def test_a_released_gemma2_config_says_what_the_preset_says():
    """Of the smallest file that has its `layer_types` and scale left out."""
    config = read({"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 4096})
    assert config.attention_pattern == ("local", "global")
    assert (config.attention_softcap, config.logit_softcap, config.attention_scale) == (50.0, 30.0, None)
    assert (config.head_width, config.max_seq_len, config.tied_embeddings) == (256, 8192, True)


def test_queries_keys_and_values_of_unequal_heads_lie_one_behind_another():
    config = tiny.config(model=ours_dense.PHI3).model
    weight = next(w for w in PHI3.weights if w.theirs.endswith("qkv_proj.weight"))
    rng = np.random.default_rng(0)
    ours = [rng.standard_normal((64, heads, 16)).astype(np.float32) for heads in (4, 2, 2)]
    theirs = weight.export(ours, config)
    assert theirs.shape == weight.shape(config) == ((4 + 2 + 2) * 16, 64)
    rows = iter(theirs)
    for array in ours:
        for head in range(array.shape[1]):
            for channel in range(16):
                np.testing.assert_array_equal(next(rows), array[:, head, channel])
    for found, array in zip(weight.read(theirs, config), ours, strict=True):
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(("window", "model_type"), [(None, "llama"), (5, "mistral")])
def test_a_phi3_whose_whole_heads_turn_goes_out_as_a_llama_or_mistral(window, model_type, tmp_path):
    config = public_dense.PHI3_CONFIG | {"partial_rotary_factor": 1.0, "sliding_window": window}
    tensors = public.weights(public_dense.PHI3_CONFIG)
    import_model(public.write_folder(tmp_path / "theirs", config, tensors), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    found, layer = load_file(tmp_path / "out" / files.SINGLE), "model.layers.1"
    qkv = [found[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
    np.testing.assert_array_equal(np.concatenate(qkv), tensors[f"{layer}.self_attn.qkv_proj.weight"])
    gate_up = [found[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    np.testing.assert_array_equal(np.concatenate(gate_up), tensors[f"{layer}.mlp.gate_up_proj.weight"])


# What is refused on import: a config, its change, and what the message says.
REFUSED = {
    "gemma2, no scale": (public_dense.GEMMA2_CONFIG, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
    "gemma2, no window": (public_dense.GEMMA2_CONFIG, {"sliding_window": None}, "sliding_window = None"),
    "gemma2, windows of two sizes": (
        public_dense.GEMMA2_CONFIG, {"sliding_window_size": 7}, "sliding_window_size = 7: not known"
    ),
    "gemma2, exact GELU": (public_dense.GEMMA2_CONFIG, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    "gemma2, layers as text": (public_dense.GEMMA2_CONFIG, {"num_hidden_layers": "4"}, "expected two integers"),
    "gemma3, soft-capped scores": (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    "gemma3, both ways": (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "gemma3, local RoPE scaled": (
        GEMMA3_SPELLINGS["RoPE of each kind of layers, as version 5 writes it"],
        {"rope_parameters": V5_ROPES | {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "RoPE of local layers is not scaled here",
    ),
    "phi3, long rows": (
        public_dense.PHI3_CONFIG,
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        "rope_scaling.rope_type = 'longrope': in this family its factors change with the row's length",
    ),
    "phi3, long rows by an old name": (public_dense.PHI3_CONFIG, {"rope_scaling": {"type": "su"}}, "rope_type = 'su'"),
    "opt, norms after": (public_dense.OPT_CONFIG, {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
    "opt, no last norm": (public_dense.OPT_CONFIG, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    "opt, narrow tokens": (public_dense.OPT_CONFIG, {"word_embed_proj_dim": 24}, "word_embed_proj_dim = 24"),
    "bloom, normed residuals": (
        public_dense.BLOOM_CONFIG, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"
    ),
    "bloom, another width inside": (public_dense.BLOOM_CONFIG, {"n_inner": 100}, "model.d_ff = 100"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_with_no_equal_here_is_refused_by_name(case):
    config, change, message = REFUSED[case]
    assert read(config).n_layers > 2
    with pytest.raises(ConfigError) as caught:
        read(config | change)
    assert message in str(caught.value)


# What keeps a model out of a family: the family, a model of it, its change, and what is said.
MISFITS = {
    "a scale that is no whole number's": ("gemma2", ours_dense.GEMMA2, {"attention_scale": 0.3}, "attention_scale"),
    "a scale over one": ("gemma2", ours_dense.GEMMA2, {"attention_scale": 3.0}, "attention_scale"),
    "scaled RoPE in local layers": ("gemma3_text", ours_dense.GEMMA3, {"local_rope_theta": None}, "rope_scaling"),
    "norms of each head": ("olmo2", ours_dense.OLMO2, {"qk_norm": "head"}, "qk_norm = 'head'"),
    "scaled RoPE": ("phi3", ours_dense.PHI3, {"rope_scaling": {"kind": "linear", "factor": 2.0}}, "rope_scaling"),
    "positions from the first row on": ("opt", ours_dense.OPT, {"position_offset": 0}, "position_offset = 0"),
    "embeddings that are not normed": ("bloom", ours_dense.BLOOM, {"embedding_norm": False}, "embedding_norm"),
    "scaled embeddings": ("llama", tiny.LLAMA, {"embedding_scale": True}, "embedding_scale = True"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_keeps_a_model_out_of_a_family_is_named(case):
    name, model, change, message = MISFITS[case]
    assert not family(name).misfits_of(tiny.config(model=model).model)
    (wrong,) = family(name).misfits_of(tiny.config(model={**model, **change}).model)
    assert message in wrong
