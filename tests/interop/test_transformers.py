"""Exports in the hands of `transformers` itself, and its models in ours; skipped where it or torch is not installed."""

import json

import jax
import numpy as np
import pytest

from maxlm.data.tokenizer import load_tokenizer
from maxlm.inference.generate import generate, generate_run
from maxlm.inference.load import load_run
from maxlm.inference.sampling import Sampling
from maxlm.interop.huggingface import export_run, import_model
from tests import latents, tiny
from tests.interop import ours, public
from tests.interop.test_golden import our_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = {
    "llama, grouped queries, untied": tiny.LLAMA,
    "llama, tied, biases, wide heads": {
        **tiny.LLAMA, "tied_embeddings": True, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
        "head_dim": 32, "rope_theta": 5e5, "norm_eps": 1e-6
    },
    "llama, one key head": {**tiny.LLAMA, "n_kv_heads": 1},
    **ours.MODELS,
    "gpt2, untied": {**tiny.GPT2, "tied_embeddings": False, "d_ff": 256},
}  # fmt: skip
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ours.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load_theirs(folder):
    """The model as transformers reads it, which must find every weight of its own and no other in the files."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def their_greedy(model, ids, n):
    ids = torch.from_numpy(ids)
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


def assert_equal_models(run_dir, theirs):
    run = load_run(run_dir)
    ids = np.random.default_rng(3).integers(0, run.model.config.vocab_size, (8, 24))
    with jax.set_mesh(run.mesh):
        found = our_logits(run, ids)
        text = generate(run.model, run.params, ids.tolist(), max_tokens=32, sampling=GREEDY, eos_id=None, seed=0)
    expected = their_logits(theirs, ids)
    assert np.ptp(expected) > 1
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    assert text == their_greedy(theirs, ids, 32)


@pytest.mark.parametrize("model", MODELS)
def test_transformers_gives_the_logits_and_greedy_text_of_an_exported_run(model, tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", MODELS[model], tokenizer)
    export_run(tmp_path / "run", tmp_path / "out")
    assert_equal_models(tmp_path / "run", load_theirs(tmp_path / "out"))


def test_transformers_makes_the_same_of_modules_that_predict_further_ahead(tmp_path, monkeypatch):
    from transformers.modeling_layers import MtpModel

    # It leaves out what it takes for modules, by the number of the layer in the released model.
    monkeypatch.setattr(
        transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"layers\.2.*", r"layers\.3.*"]
    )
    ours.make_run(tmp_path / "run", latents.DEEPSEEK_V3, None)
    export_run(tmp_path / "run", tmp_path / "out")
    theirs = load_theirs(tmp_path / "out")
    modules = MtpModel.from_pretrained(theirs).eval()
    run, ids = load_run(tmp_path / "run"), np.random.default_rng(3).integers(0, 300, (8, 24)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), ids.shape)
    ahead = [np.roll(ids, -k, axis=1) for k in (1, 2)]
    with jax.set_mesh(run.mesh):

        @jax.jit
        def streams(params, ids, positions, ahead):
            module = run.model.bind(params)
            return module.ahead(module(ids, positions, None), ahead, positions, None)[0]

        heads = np.asarray(run.params["head"]["kernel"], np.float64)[:300]
        found = [np.asarray(x, np.float64) @ heads.T for x in streams(run.params, ids, positions, ahead)]
    with torch.no_grad():
        h = theirs.model(torch.from_numpy(ids)).last_hidden_state
        for k, logits in enumerate(found):
            n = 24 - k - 1  # positions with a token so far ahead
            places, tokens = torch.arange(n)[None] + k + 1, torch.from_numpy(ids[:, k + 1 :])
            h = modules.forward_layer(k, h[:, :n], places, None, input_ids=tokens)
            expected = theirs.lm_head(h).numpy()
            assert np.ptp(expected) > 1
            assert np.abs(logits[:, :n] - expected).max() < 2e-5 * np.abs(expected).max()


SIZES = {
    "vocab_size": 203, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def test_what_transformers_saves_is_read_back_with_the_same_logits_and_text(tmp_path):
    made = {
        "llama": transformers.LlamaConfig(
            vocab_size=203, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64, attention_bias=True, mlp_bias=True,
            initializer_range=0.3,
        ),
        "llama 3.1": transformers.LlamaConfig(
            **SIZES, head_dim=16, initializer_range=0.3,
            rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        ),
        "mistral": transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=5, initializer_range=0.3),
        "mistral without a window": transformers.MistralConfig(**SIZES, sliding_window=None, initializer_range=0.3),
        "qwen2": transformers.Qwen2Config(
            **SIZES, initializer_range=0.3, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                             "original_max_position_embeddings": 16},
        ),
        "qwen2, all layers slide": transformers.Qwen2Config(
            **SIZES, initializer_range=0.3, use_sliding_window=True, sliding_window=5, max_window_layers=0
        ),
        "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16, initializer_range=0.3),
        "gpt_neox": transformers.GPTNeoXConfig(
            vocab_size=203, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3,
            max_position_embeddings=64, initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5},
        ),
        "gpt2": transformers.GPT2Config(
            vocab_size=203, n_positions=64, n_embd=48, n_layer=3, n_head=4, initializer_range=0.3,
        ),
        "gemma2": transformers.Gemma2Config(
            **SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=12, initializer_range=0.3
        ),
        "gemma3": transformers.Gemma3TextConfig(
            **SIZES, head_dim=16, sliding_window=5, query_pre_attn_scalar=12, initializer_range=0.3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
        ),
        "olmo2": transformers.Olmo2Config(**SIZES, initializer_range=0.3),
        "phi3": transformers.Phi3Config(
            **SIZES, pad_token_id=None, sliding_window=5, initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        "opt": transformers.OPTConfig(
            vocab_size=203, hidden_size=48, ffn_dim=80, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=48, init_std=0.3,
        ),
        "bloom": transformers.BloomConfig(vocab_size=203, hidden_size=48, n_layer=3, n_head=6, initializer_range=0.3),
    }  # fmt: skip
    for name, config in made.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        # Shards, so that the index which transformers writes is read too.
        model.save_pretrained(tmp_path / name, max_shard_size="60KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
        import_model(tmp_path / name, tmp_path / f"run-{name}")
        assert_equal_models(tmp_path / f"run-{name}", model)


def test_bfloat16_exports_load_as_bfloat16(tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", tiny.LLAMA, tokenizer)
    export_run(tmp_path / "run", tmp_path / "out", "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_exported_tokenizer_gives_the_same_ids_and_text(tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", tiny.LLAMA, tokenizer)
    export_run(tmp_path / "run", tmp_path / "out")
    mine, theirs = load_tokenizer(tokenizer), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("def f(x):\n    return x", "  spaces\t\ttabs ", "naïve café — 数据 🙂", ""):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == mine.encode(text)
        assert theirs(text).input_ids == [mine.bos_id, *ids]
        assert theirs.decode(ids) == mine.decode(ids) == text
    specials = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert specials == (mine.bos_id, mine.eos_id, mine.pad_id)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == specials


def test_a_prompt_is_continued_by_both_with_the_same_text(tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", tiny.LLAMA, tokenizer)
    export_run(tmp_path / "run", tmp_path / "out")
    model, theirs = load_theirs(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs("def main(", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    expected = theirs.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert generate_run(tmp_path / "run", ["def main("], max_tokens=24, greedy=True) == [expected]
    assert public.contents(tmp_path / "out").keys() >= {"tokenizer.json", "tokenizer_config.json"}
