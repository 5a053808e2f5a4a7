"""GGUF files in the hands of llama.cpp itself; skipped where it or the gguf package is not installed."""

import jax
import numpy as np
import pytest

from maxlm.inference.generate import generate
from maxlm.inference.load import load_run
from maxlm.inference.sampling import Sampling
from maxlm.interop.gguf import export_run
from tests import tiny
from tests.interop import ours
from tests.interop.test_golden import our_logits

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

NEW_TOKENS = 32
ROWS, LENGTH = 8, 16
F32 = 0  # of ggml's types

MODELS = {
    "llama, wide heads, untied": {**tiny.LLAMA, "head_dim": 32, "rope_theta": 5e5},
    "llama, biases, tied": {
        **tiny.LLAMA, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "tied_embeddings": True
    },
    **{name: model for name, model in ours.MODELS.items() if name != "qwen3, biases, all layers slide"},
    # Within its window, which is all of its context, a model with one is a model without.
    "mistral": {**ours.MODELS["mistral"], "attention_window": 64},
    "qwen2, all layers slide": {**ours.MODELS["qwen2, all layers slide"], "attention_window": 64},
    "qwen2, every second layer slides": {**ours.MODELS["qwen2, every second layer slides"], "attention_window": 64},
    "gpt_neox, sequential, tied": {**tiny.GPT_NEOX, "parallel_residual": False, "tied_embeddings": True},
}  # fmt: skip
del MODELS["gpt_neox, sequential, no biases of attention, tied"]
# llama.cpp takes GELU from a table of float16 numbers (ggml-cpu, GGML_GELU_FP16).
TOLERANCE = {"gpt2": 2e-3, "gpt_neox": 2e-3, "gpt_neox, sequential, tied": 2e-3}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ours.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def prompts():
    return np.random.default_rng(3).integers(3, 300, (ROWS, LENGTH))


def load_theirs(path):
    """The model in llama.cpp, with all of its numbers float32."""
    return llama_cpp.Llama(
        str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=F32, type_v=F32, n_gpu_layers=0
    )


def their_logits(theirs, ids):
    theirs.reset()
    theirs.eval([int(i) for i in ids])
    return theirs.scores[: len(ids)].copy()


def their_greedy(theirs, ids):
    theirs.reset()
    theirs.eval([int(i) for i in ids])
    chosen = []
    while True:
        chosen.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
        if len(chosen) == NEW_TOKENS:
            return chosen
        theirs.eval([chosen[-1]])


@pytest.mark.parametrize("model", MODELS)
def test_llama_cpp_gives_the_logits_and_greedy_text_of_an_exported_run(model, tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", MODELS[model], tokenizer)
    export_run(tmp_path / "run", tmp_path / "model.gguf")
    run, theirs, ids = load_run(tmp_path / "run"), load_theirs(tmp_path / "model.gguf"), prompts()
    with jax.set_mesh(run.mesh):
        expected = our_logits(run, ids)
        text = generate(
            run.model, run.params, ids.tolist(), max_tokens=NEW_TOKENS, sampling=Sampling(0.0), eos_id=None, seed=0
        )
    assert np.ptp(expected) > 1
    found = np.stack([their_logits(theirs, row) for row in ids[:2]])
    print(model, np.abs(found - expected[:2]).max() / np.abs(expected).max())
    assert np.abs(found - expected[:2]).max() < TOLERANCE.get(model, 5e-5) * np.abs(expected).max()
    assert [their_greedy(theirs, row) for row in ids[:2]] == text[:2]
