"""Counts of parameters and FLOPs, against the arrays themselves, published sizes and the compiler."""

from pathlib import Path

import jax
import numpy as np
import pytest

from maxlm.config import load_config
from maxlm.kernels.masks import Mask
from maxlm.models.config import ModelConfig
from maxlm.models.families import family_for
from maxlm.models.flops import (
    RowLengths,
    attended_positions,
    count_parameters,
    forward_flops,
    forward_flops_per_token,
    training_flops_per_token,
)
from tests import tiny, tiny_moe
from tests.interop import ours_dense

VARIANTS = {
    "llama": tiny.LLAMA,
    "gpt2": tiny.GPT2,
    "gpt_neox": tiny.GPT_NEOX,
    "gpt2 untied": {**tiny.GPT2, "tied_embeddings": False},
    "llama with biases and qk-norm": {**tiny.LLAMA, "attention_bias": True, "mlp_bias": True, "qk_norm": "head"},
    "norms before and after": {**tiny.LLAMA, "norm_placement": "sandwich"},
    "bert": {**tiny.BERT, "next_sentence_head": True},
    "t5": tiny.T5,
    "bart": tiny.BART,
    "the original Transformer, untied": {**tiny.TRANSFORMER, "tied_embeddings": False},
    "gopher, with a module ahead": {**tiny.GOPHER, "mtp_layers": 1},
    "norms of sums": {**tiny.GPT2, "norm_placement": "post"},
    "experts in every second layer": tiny_moe.QWEN3_MOE,
    "shared experts and a balancing bias": tiny_moe.DEEPSEEK,
    "experts with biases": tiny_moe.GPT_OSS,
    "wide heads, squared relu": {**tiny.LLAMA, "head_dim": 32, "n_kv_heads": 1, "mlp": "relu2"},
    "gemma2": ours_dense.GEMMA2,
    "opt, heads normed together, embeddings normed": {**ours_dense.OPT, "qk_norm": "all", "embedding_norm": True},
}


LLAMA3 = {"vocab_size": 128256, "n_kv_heads": 8}


@pytest.mark.parametrize("name", VARIANTS)
def test_counted_parameters_are_those_of_the_arrays(name):
    run = tiny.config(model=VARIANTS[name])
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        params = program.abstract_state.params
    padding = run.model.padded_vocab_size - run.model.vocab_size
    padding *= run.model.d_model * (1 if run.model.tied_embeddings else 2) + run.model.head_bias
    assert count_parameters(run.model).total == sum(np.prod(x.shape) for x in jax.tree.leaves(params)) - padding


@pytest.mark.parametrize(
    ("published", "sizes"),
    [
        (8.03e9, {**LLAMA3, "n_layers": 32, "d_model": 4096, "n_heads": 32, "d_ff": 14336}),
        (70.6e9, {**LLAMA3, "n_layers": 80, "d_model": 8192, "n_heads": 64, "d_ff": 28672}),
        (124.4e6, {**tiny.GPT2, "vocab_size": 50257, "n_layers": 12, "d_model": 768, "n_heads": 12, "n_kv_heads": 12,
                   "d_ff": 3072, "max_seq_len": 1024}),
    ],
    ids=["llama3-8b", "llama3-70b", "gpt2-124m"],
)  # fmt: skip
def test_counts_are_those_published(published, sizes):
    assert count_parameters(ModelConfig(**sizes)).total == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize(
    ("preset", "total", "non_embedding"),
    [
        ("llama3.1-8b", 8.03e9, 6.98e9),  # model card; without two matrices of 128,256 x 4096
        ("mistral-7b", 7.24e9, 6.98e9),  # model card; without two matrices of 32,000 x 4096
        ("qwen2.5-7b", 7.61e9, 6.53e9),  # model card, both
        ("qwen3-8b", 8.19e9, 6.95e9),  # model card, both
        ("pythia-6.9b", 6_857_302_016, 6_444_163_072),  # its repository's table of sizes
        ("gemma2-9b", 9_242_164_736, 8_324_201_984),  # arXiv:2408.00118, table 2
        ("gemma2-27b", 27_227_718_144, 26_047_480_320),  # there
        ("gemma3-4b", 3.884e9, 3.209e9),  # arXiv:2503.19786, table 1, without the vision encoder
        ("gemma3-27b", 27.016e9, 25.600e9),  # there
        ("olmo2-7b", 7.30e9, 6.48e9),  # its released files; without two matrices of 100,352 x 4096
        ("phi3-mini", 3.82e9, 3.62e9),  # arXiv:2404.14219, abstract: 3.8B, its files 3.82B; two of 32,064 x 3072
        ("opt-6.7b", 6_658_473_984, 6.444e9),  # its released files; without tables of 50,272 and 2050 rows
        ("bloom-176b", 176.247e9, 172.65e9),  # arXiv:2211.05100, table 3; without 250,880 x 14,336
        # Tables 1 of arXiv:2112.11446 and 4 of arXiv:2203.15556 give shapes and round sizes. By hand: 13 d_model^2 a
        # layer, a thirteenth of it W_R; norms, u and v; 32,000 d_model.
        ("gopher-280b", 13 * 80 * 16384**2 + 4 * 80 * 16384 + 16384 * 32001, 13 * 80 * 16384**2),
        ("chinchilla-70b", 13 * 80 * 8192**2 + 4 * 80 * 8192 + 8192 * 32001, 13 * 80 * 8192**2),
        ("gpt3-175b", 174.6e9, 173.96e9),  # arXiv:2005.14165, table D.1; without tables of 50,257 and 2048 rows
    ],
)
def test_presets_of_public_models_have_their_published_sizes(preset, total, non_embedding):
    counted = count_parameters(load_config(preset).model)
    assert counted.total == pytest.approx(total, rel=2e-3)
    assert counted.non_embedding == pytest.approx(non_embedding, rel=2e-3)


@pytest.mark.parametrize(
    ("preset", "total", "within"),
    [
        # transformers' BertForPreTraining of the released config.json, 110,106,428, without pooler and its two logits.
        ("bert-base", 110_106_428 - 768 * 769 - 2 * 769, 0),
        ("bert-large", 340e6, 0.02),  # arXiv:1810.04805, section 3; with the pooler 336.2M
        ("roberta-base", 125e6, 5e-3),  # its repository
        ("distilbert-base", 66.4e6 + 768 * 769 + 2 * 768 + 30522, 1e-3),  # DistilBertModel, 66.4M, and the head
        ("t5-small", 60_506_624, 0),  # released files, as those below
        ("t5-base", 222_903_552, 0),
        ("t5-11b", 11_307_321_344, 0),
        ("flan-t5-xl", 2_849_757_184, 0),
        ("mt5-base", 582_401_280, 0),
        ("byt5-base", 582e6, 5e-3),  # arXiv:2105.13626, table 1
        ("bart-large", 406_291_456 + 50_265, 0),  # released files, and the bias on the logits
        ("transformer-big", 213e6, 6e-3),  # arXiv:1706.03762, table 3
        ("transformer-base", 65e6, 0.04),  # there; 37,000 tokens, shared, and all layers are 63.0M
    ],
)
def test_presets_of_encoders_and_encoder_decoders_have_their_published_sizes(preset, total, within):
    assert count_parameters(load_config(preset).model).total == pytest.approx(total, rel=within, abs=0)


def test_flops_of_an_encoder_decoder_are_of_each_sides_tokens_and_of_all_pairs():
    """Written out for T5's bricks: 24 tokens of the encoder and 8 of the decoder, of rows of 28."""
    c, tokens = ModelConfig(**tiny.T5), RowLengths(24, 8)
    inner, d, f = c.n_heads * c.head_width, c.d_model, c.d_ff
    found = forward_flops(c, 28, tokens)
    layers, encoder_layers = c.n_layers, c.n_encoder_layers
    keys_and_values = 2 * 2 * d * inner
    assert 28 * found.attention_projections == pytest.approx(
        24 * encoder_layers * 4 * 2 * d * inner + 8 * layers * 6 * 2 * d * inner + 24 * layers * keys_and_values
    )
    assert 28 * found.mlp == pytest.approx((24 * encoder_layers + 8 * layers) * 2 * 2 * d * f)
    pairs = encoder_layers * 24 * 24 + layers * (8 * 9 / 2 + 8 * 24)
    assert 28 * found.attention_scores == pytest.approx(4 * inner * pairs)
    assert 28 * found.head == pytest.approx(8 * 2 * c.vocab_size * d)


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        ("llama3.1-8b", "llama"),
        ("mistral-7b", "mistral"),
        ("qwen2.5-7b", "qwen2"),
        ("qwen3-8b", "qwen3"),
        ("pythia-6.9b", "gpt_neox"),
        ("gemma2-9b", "gemma2"),
        ("gemma2-27b", "gemma2"),
        ("gemma3-4b", "gemma3_text"),
        ("gemma3-27b", "gemma3_text"),
        ("olmo2-7b", "olmo2"),
        ("phi3-mini", "mistral"),
        ("opt-6.7b", "opt"),
        ("bloom-176b", "bloom"),
        ("gpt3-175b", "gpt2"),
        ("mixtral-8x7b", "mixtral"),
        ("qwen3-30b-a3b", "qwen3_moe"),
        ("gpt-oss-20b", "gpt_oss"),
        ("gpt-oss-120b", "gpt_oss"),
        ("bert-base", "bert"),
        ("bert-large", "bert"),
        ("roberta-base", "roberta"),
        ("distilbert-base", "distilbert"),
        ("t5-small", "t5"),
        ("t5-11b", "t5"),
        ("flan-t5-xl", "t5"),
        ("mt5-base", "t5"),
        ("byt5-base", "t5"),
        ("bart-large", "bart"),
    ],
)
def test_presets_of_public_models_are_of_their_families(preset, family):
    config = load_config(preset).model
    assert family_for(config).model_type == family
    theirs = family_for(config).to_hf_config(config, dtype="bfloat16", special_ids={})
    again = family_for(config).from_hf_config(theirs, "config.json")
    filled_in = {"n_kv_heads": config.kv_heads, "head_dim": config.head_width}
    filled_in |= {name: getattr(config, name) for name in ("remat", "residual_init_scaling", "n_encoder_layers")}
    assert again.model_copy(update=filled_in) == config.model_copy(update=filled_in)


def test_training_flops_are_six_a_matmul_parameter_and_the_causal_half_of_attention():
    config = ModelConfig(**tiny.LLAMA)
    matmul = count_parameters(config).non_embedding - (2 * config.n_layers + 1) * config.d_model
    matmul += config.vocab_size * config.d_model
    pairs = 32 * 33 / 2
    attention = 12 * config.n_layers * config.n_heads * config.head_width * pairs / 32
    assert training_flops_per_token(config, 32) == pytest.approx(6 * matmul + attention, rel=1e-12)


def test_forward_flops_are_the_compilers_without_its_elementwise_ones():
    run = tiny.config(
        model={
            **tiny.LLAMA,
            "n_layers": 1,
            "d_model": 256,
            "d_ff": 1024,
            "n_heads": 4,
            "n_kv_heads": 4,
            "vocab_size": 1024,
        },
        train={"global_batch_tokens": 256},
    )
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        forward = jax.jit(lambda params, batch: program.model.bind(params)(batch["inputs"], batch["positions"], None))
        cost = forward.lower(program.abstract_state.params, program.abstract_batch).compile().cost_analysis()
    head = 2 * run.model.vocab_size * run.model.d_model
    counted = 256 * (forward_flops_per_token(run.model, 32) - head)
    # The compiler adds norms, activations and softmax, and computes the masked half of one 32-token tile.
    assert counted <= cost["flops"] <= 1.06 * counted


def test_parts_of_the_forward_pass_add_up_and_each_is_its_matmuls():
    config = ModelConfig(**tiny.LLAMA)
    parts = forward_flops(config, 32)
    assert parts.total == forward_flops_per_token(config, 32)
    d, h, g, k, layers = config.d_model, config.n_heads, config.kv_heads, config.head_width, config.n_layers
    assert parts.attention_projections == 2 * layers * d * k * (2 * h + 2 * g)
    assert parts.mlp == 2 * layers * 3 * d * config.d_ff
    assert parts.head == 2 * d * config.vocab_size
    assert parts.attention_scores == 4 * layers * h * k * 33 / 2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("window", "chunk", "n_global"),
    [
        *((window, None, 0) for window in (None, 1, 5, 31, 32, 33, 100)),
        *((None, chunk, 0) for chunk in (1, 8, 13, 32, 40)),
        *((5, None, 3), (None, 13, 3), (None, 13, 20), (5, 13, 1), (9, 4, 40)),
    ],
)
def test_scores_are_counted_by_the_pairs_that_the_mask_leaves(window, chunk, n_global, causal):
    local = {"attention_window": window, "attention_chunk": chunk, "attention_global_tokens": n_global}
    config = ModelConfig(**tiny.LLAMA, **local, kind="decoder" if causal else "encoder")
    q, k = np.arange(32)[:, None], np.arange(32)[None, :]
    mask = Mask(causal=causal, window=window, chunk=chunk, global_tokens=n_global)
    pairs = np.broadcast_to(mask.allows(q, k), (32, 32)).sum()
    is_local = window is not None or chunk is not None
    assert 32 * attended_positions(config, 32, local=is_local, causal=causal) == pairs
    if causal:
        of_prefixes = [mask.allows(q, k) | (mask.both_ways.allows(q, k) & (k < n)) for n in range(1, 33)]
        expected = pytest.approx(np.mean(of_prefixes) * 32, rel=1e-12)
        assert attended_positions(config, 32, local=is_local, prefix=True) == expected
    per_pair = 4 * config.n_layers * config.n_heads * config.head_width
    assert 32 * forward_flops(config, 32).attention_scores == pytest.approx(per_pair * pairs)


@pytest.mark.parametrize(
    ("preset", "total", "active", "rel"),
    [
        ("mixtral-8x7b", 46.7e9, 12.9e9, 5e-3),  # arXiv:2401.04088, section 2
        ("qwen3-30b-a3b", 30.5e9, 3.3e9, 2e-2),  # model card: 3.35 billion active parameters are 3.3 there
        ("gpt-oss-20b", 20.91e9, 3.61e9, 5e-3),  # arXiv:2508.10925, table 1: active without the token embedding
        ("gpt-oss-120b", 116.83e9, 5.13e9, 5e-3),
    ],
)
def test_presets_with_experts_have_their_published_sizes_and_active_ones(preset, total, active, rel):
    config = load_config(preset).model
    counted = count_parameters(config)
    left_out = config.vocab_size * config.d_model if preset.startswith("gpt-oss") else 0
    assert counted.total == pytest.approx(total, rel=5e-3)
    assert counted.active - left_out == pytest.approx(active, rel=rel)


def test_flops_of_experts_are_of_those_that_a_token_goes_to():
    config = ModelConfig(**tiny_moe.DEEPSEEK)
    moe, d = config.moe, config.d_model
    layer = 2 * 3 * d * moe.d_ff * (moe.experts_per_token + moe.n_shared_experts) + 2 * d * moe.n_experts
    assert forward_flops(config, 32).mlp == pytest.approx(2 * 3 * d * config.d_ff + 2 * layer)
    counted = count_parameters(config)
    idle = 2 * 3 * d * moe.d_ff * (moe.n_experts - moe.experts_per_token)
    assert counted.active == counted.total - idle


def test_a_dense_model_uses_all_its_parameters():
    counted = count_parameters(ModelConfig(**tiny.LLAMA))
    assert counted.active == counted.total


def sizes_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    table = text.partition("<!-- sizes: begin -->")[2].partition("<!-- sizes: end -->")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def in_words(size):
    return float(size[:-1]) * {"B": 1e9, "M": 1e6}[size[-1]]


@pytest.mark.parametrize("row", sizes_in_the_docs(), ids=lambda row: row[0].strip("`"))
def test_the_docs_tell_each_presets_size_which_is_within_a_percent_of_the_published_one(row):
    config = load_config(row[0].strip("`")).model
    counted = count_parameters(config)
    assert in_words(row[1]) == pytest.approx(counted.total - counted.mtp, rel=1e-3)
    assert in_words(row[1]) == pytest.approx(in_words(row[2]), rel=1e-2)
    if row[3]:
        embedding = 0 if row[0] in ("`mixtral-8x7b`", "`qwen3-30b-a3b`") else config.vocab_size * config.d_model
        # Rounded to two figures where they are published.
        assert in_words(row[3]) == pytest.approx(counted.active - embedding, rel=2e-3)
        assert in_words(row[3]) == pytest.approx(in_words(row[4]), rel=2.5e-2)
