"""Decoding with a cache against the whole forward pass, in batches of unequal prompts, on one device and on a mesh."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
from maxlm.errors import ConfigError, DataError
from maxlm.inference import generate as generation
from maxlm.inference.generate import bucket, generate, heal, next_logits, prefill
from maxlm.inference.sampling import Sampling
from maxlm.kernels.cross_entropy import logits
from maxlm.models.transformer import Transformer
from maxlm.parallel.axes import constrain
from tests import latents, tiny, tiny_moe
from tests.interop import ours_dense

GREEDY = Sampling(temperature=0.0)
BRICKS = {
    "llama": tiny.LLAMA,
    "gpt2": tiny.GPT2,
    "gpt_neox": tiny.GPT_NEOX,
    "qk-norm, biases, soft-caps, wide heads": {
        **tiny.LLAMA, "qk_norm": "head", "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
        "attention_softcap": 5.0, "logit_softcap": 4.0, "head_dim": 32
    },
    "multi-query, geglu, tied": {**tiny.LLAMA, "n_kv_heads": 1, "mlp": "geglu", "tied_embeddings": True},
    "a window, a part of each head turned, by YaRN": {
        **tiny.LLAMA, "attention_window": 6, "rope_fraction": 0.5,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}
    },
    "chunks and global tokens": {
        **tiny.LLAMA, "attention_chunk": 6, "attention_global_tokens": 2, "attention_pattern": ["local", "global"]
    },
    "latent attention in chunks": {**latents.LATENT, "attention_chunk": 6, "attention_global_tokens": 2},
    **{name: ours_dense.MODELS[name] for name in ("gemma2", "gemma3", "olmo2", "phi3", "opt", "bloom")},
    "Transformer-XL's positions": {
        **tiny.GOPHER, "n_kv_heads": 2, "attention_window": 6, "attention_pattern": ["local", "global"]
    },
    "latent attention": latents.LATENT,
    "latent attention, whole queries, YaRN on scores": latents.LATENT_LITE,
    "experts in every second layer": tiny_moe.QWEN3_MOE,
    "experts in groups, and shared ones": tiny_moe.DEEPSEEK,
    "experts with biases, sinks and windows": tiny_moe.GPT_OSS,
}  # fmt: skip
MESHES = {
    "one device": ({}, 1),
    "data 2 x fsdp 2 x tensor 2": ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
    "fsdp 8": ({"fsdp": 8}, 8),
}


def lively(model, seed=0):
    """Parameters under which every brick matters: far from their initial values, biases and scales too."""

    def stir(path, x):
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(jax.tree_util.keystr(path).encode()))
        return x + 0.2 * jax.random.normal(key, x.shape, x.dtype, out_sharding=jax.typeof(x).sharding)

    return jax.jit(lambda: jax.tree_util.tree_map_with_path(stir, model.init(jax.random.key(seed))))()


def set_up(bricks, mesh="one device"):
    axes, n_devices = MESHES[mesh]
    program = tiny.program(tiny.config(model=bricks, mesh=axes), n_devices)
    with jax.set_mesh(program.mesh):
        return program.model, lively(program.model), program.mesh


def prompts_of(lengths, vocab_size=300):
    rng = np.random.default_rng(5)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


@pytest.fixture
def whole_forward():
    """Logits `[B, T, V]` of tokens, without a cache."""

    def run(model, params, tokens, prefix=0):
        @jax.jit
        def forward(params, tokens_BT):
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
            module = model.bind(params)
            x_BTD = module(tokens_BT, positions_BT, None, prefix_BT=positions_BT < prefix if prefix else None)
            return logits(
                x_BTD, module.head_weight(), vocab_size=model.config.vocab_size, softcap=model.config.logit_softcap
            )

        return np.asarray(forward(params, jnp.asarray(tokens, jnp.int32)))[:, :, : model.config.vocab_size]

    return run


@pytest.mark.parametrize("bricks", BRICKS)
def test_logits_with_a_cache_are_those_of_the_whole_forward(bricks, whole_forward):
    """Teacher-forced: rows of 5, 17 and 1 prompt tokens, each followed by its own next 10."""
    model, params, mesh = set_up(BRICKS[bricks])
    lengths = np.array([5, 17, 1], np.int32)
    tokens = np.array(prompts_of([32, 32, 32]))

    @jax.jit
    def cached(params, prompt_BT, next_BN, lengths_B):
        module = model.bind(params)
        prompt_BT, lengths_B = constrain(prompt_BT, "batch", "length"), constrain(lengths_B, "batch")
        next_BN = constrain(next_BN, "batch", "length")
        first_BV, cache = prefill(module, model, prompt_BT, lengths_B, 48)

        def one(carry, token_B):
            cache, lengths_B = carry
            x_BTD, cache = module.decode(token_B[:, None], cache, lengths_B)
            return (cache, lengths_B + 1), next_logits(module, x_BTD)

        _, rest_NBV = jax.lax.scan(one, (cache, lengths_B), next_BN.T)
        return first_BV, rest_NBV

    prompt = np.where(np.arange(20)[None] < lengths[:, None], tokens[:, :20], 7)
    following = np.stack([tokens[i, n : n + 10] for i, n in enumerate(lengths)])
    with jax.set_mesh(mesh):
        expected = whole_forward(model, params, tokens)
        first, rest = (
            np.asarray(x) for x in cached(params, *(jnp.asarray(x, jnp.int32) for x in (prompt, following, lengths)))
        )
    assert np.ptp(expected) > 1
    for row, n in enumerate(lengths):
        found = np.concatenate([first[None, row], rest[:, row]])[:, :300]
        np.testing.assert_allclose(found, expected[row, n - 1 : n + 10], rtol=0, atol=1e-5 * np.ptp(expected))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("bricks", ["llama", "gpt2"])
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward(bricks, mesh, whole_forward):
    prompts = prompts_of([3, 12, 7])
    model, params, here = set_up(BRICKS[bricks], mesh)
    with jax.set_mesh(here):
        found = generate(model, params, prompts, max_tokens=12, sampling=GREEDY, eos_id=None, seed=0)
    model, params, here = set_up(BRICKS[bricks])
    assert [len(tokens) for tokens in found] == [12, 12, 12]
    with jax.set_mesh(here):
        for prompt, tokens in zip(prompts, found, strict=True):
            scores = whole_forward(model, params, [prompt + tokens])[0]
            assert scores[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("name", ["gemma3", "experts in groups, and shared ones", "t5"])
def test_layers_taken_apart_give_the_same_tokens(name, monkeypatch):
    model, params, mesh = set_up((BRICKS | {"t5": tiny.T5})[name])

    def make():
        generation._generate.clear_cache()
        return generate(model, params, prompts_of([5, 17]), max_tokens=8, sampling=Sampling(30.0), eos_id=None, seed=0)

    with jax.set_mesh(mesh):
        stacked = make()
        monkeypatch.setattr(generation, "APART_FROM_BYTES", 0)
        calls = []
        take_apart = Transformer.take_apart
        monkeypatch.setattr(Transformer, "take_apart", lambda self: calls.append(take_apart(self)))
        assert make() == stacked
    assert len(calls) == 1
    assert len(set(stacked[0])) > 4


@pytest.mark.parametrize("bricks", ["llama", "latent attention"])
def test_a_prompt_that_is_a_prefix_is_seen_both_ways(bricks, whole_forward):
    model, params, mesh = set_up(BRICKS[bricks])
    prompts, given = prompts_of([20, 3]), {"max_tokens": 4, "sampling": GREEDY, "eos_id": None, "seed": 0}
    with jax.set_mesh(mesh):
        found = generate(model, params, prompts, **given, prefix=True)
        for prompt, tokens in zip(prompts, found, strict=True):
            scores = whole_forward(model, params, [prompt + tokens], prefix=len(prompt))[0]
            assert scores[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


def test_long_prompts_go_in_by_pieces_and_give_the_same_tokens(monkeypatch):
    model, params, mesh = set_up(tiny.LLAMA)
    prompts = prompts_of([64, 33, 16, 15, 1])
    with jax.set_mesh(mesh):
        expected = generate(model, params, prompts, max_tokens=5, sampling=GREEDY, eos_id=None, seed=0)
        monkeypatch.setattr(generation, "PREFILL_PIECE", 16)
        jax.clear_caches()
        assert generate(model, params, prompts, max_tokens=5, sampling=GREEDY, eos_id=None, seed=0) == expected
    jax.clear_caches()


def test_sampled_tokens_do_not_depend_on_the_other_prompts_nor_on_the_mesh():
    sampling, prompts = Sampling(temperature=1.2, top_k=40, top_p=0.9), prompts_of([9, 2, 14])
    texts = []
    for mesh, chosen in (("one device", prompts), ("fsdp 8", prompts), ("one device", [prompts[0], [1, 2, 3]])):
        model, params, here = set_up(tiny.LLAMA, mesh)
        with jax.set_mesh(here):
            texts.append(generate(model, params, chosen, max_tokens=10, sampling=sampling, eos_id=None, seed=3))
    assert texts[0] == texts[1]
    assert texts[0][0] == texts[2][0]


def test_seeds_and_rows_give_other_tokens():
    model, params, mesh = set_up(tiny.LLAMA)
    with jax.set_mesh(mesh):
        a, b = (
            generate(model, params, [[5, 6]] * 2, max_tokens=20, sampling=Sampling(3.0), eos_id=None, seed=seed)
            for seed in (1, 2)
        )
    assert a != b
    assert a[0] != a[1]


def test_a_row_ends_before_its_eos_and_the_others_go_on():
    model, params, mesh = set_up(tiny.LLAMA)
    prompts = prompts_of([4, 11, 6])
    with jax.set_mesh(mesh):
        free = generate(model, params, prompts, max_tokens=12, sampling=GREEDY, eos_id=None, seed=0)
        eos = free[1][4]
        found = generate(model, params, prompts, max_tokens=12, sampling=GREEDY, eos_id=eos, seed=0)
    expected = [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in free]
    assert found == expected
    assert len(found[1]) <= 4 < max(len(tokens) for tokens in found)


def test_learned_positions_are_used_to_the_last_and_refused_past_it():
    model, params, mesh = set_up(tiny.GPT2)
    with jax.set_mesh(mesh):
        found = generate(model, params, prompts_of([60, 3]), max_tokens=4, sampling=GREEDY, eos_id=None, seed=0)
        assert [len(tokens) for tokens in found] == [4, 4]
        with pytest.raises(ConfigError, match=r"model\.max_seq_len = 64"):
            generate(model, params, prompts_of([61]), max_tokens=4, sampling=GREEDY, eos_id=None, seed=0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt 1 is empty"), ([4, 300], "token 300.*another model"), ([-1], "token -1")],
    ids=["empty", "past the vocabulary", "negative"],
)
def test_prompts_that_are_not_the_models_are_refused(prompt, message):
    model, params, mesh = set_up(tiny.LLAMA)
    with jax.set_mesh(mesh), pytest.raises(DataError, match=message):
        generate(model, params, [[1], prompt], max_tokens=4, sampling=GREEDY, eos_id=None, seed=0)


def test_lengths_are_filled_up_to_few_buckets():
    buckets = {bucket(n) for n in range(1, 5000)}
    assert all(n <= bucket(n) <= max(32, 1.5 * n) for n in range(1, 5000))
    assert len(buckets) <= 16
    assert bucket(900, limit=1000) == 1000


def test_the_first_new_token_is_one_of_those_allowed():
    model, params, mesh = set_up(tiny.LLAMA)
    first = np.zeros((2, 300), bool)
    first[0, [7, 250]] = first[1, 11] = True
    with jax.set_mesh(mesh):
        for seed in range(4):
            new = generate(
                model, params, [[5], [6, 7]], max_tokens=3, sampling=Sampling(3.0), eos_id=None, seed=seed, first=first
            )
            assert new[0][0] in (7, 250)
            assert new[1][0] == 11


def test_spaces_at_the_end_of_a_prompt_belong_to_the_next_word(tmp_path):
    texts = ["def name(value):\n    return value + name"] * 20
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=320), tmp_path, progress=False)
    ids = [tokenizer.bos_id, *tokenizer.encode("def ")]
    kept, spaces, allowed = heal(tokenizer, ids)
    assert (kept, spaces) == ([tokenizer.bos_id, *tokenizer.encode("def")], " ")
    assert tokenizer.encode(" name")[0] in allowed
    assert all(tokenizer.decode([token]).startswith(" ") for token in allowed)
    for text in ("def", "def\n", ""):
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        assert heal(tokenizer, ids) == (ids, "", None)
