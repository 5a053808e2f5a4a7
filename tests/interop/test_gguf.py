"""GGUF files in the hands of llama.cpp itself; skipped where it or the gguf package is not installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.data.tokenizer import load_tokenizer
from maxlm.errors import ConfigError, StorageError
from maxlm.inference.generate import generate
from maxlm.inference.sampling import Sampling
from maxlm.interop.gguf import export_params, export_run
from maxlm.kernels.cross_entropy import logits
from maxlm.models.transformer import Model
from maxlm.parallel.mesh import MeshConfig, make_mesh
from tests import tiny
from tests.interop import ours
from tests.interop.test_gguf_architectures import GEMMA2, GEMMA3, GPT_OSS, QWEN3_MOE

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
    **{name: ours.MODELS[name] for name in ("llama 3.1", "llama, positions interpolated", "qwen2", "qwen3")},
    # Within its window, which is all of its context, a model with one is a model without.
    "mistral": {**ours.MODELS["mistral"], "attention_window": 64},
    "qwen2, all layers slide": {**ours.MODELS["qwen2, all layers slide"], "attention_window": 64, "head_dim": 16},
    "qwen2, every second layer slides": {**ours.MODELS["qwen2, every second layer slides"], "attention_window": 64},
    "gpt_neox": tiny.GPT_NEOX,
    "gpt_neox, sequential, tied": {**tiny.GPT_NEOX, "parallel_residual": False, "tied_embeddings": True},
    "gpt2": tiny.GPT2,
    "gemma2": GEMMA2,
    "gemma2, no window, wide heads, yarn": {
        **GEMMA2, "attention_window": None, "attention_pattern": [], "head_dim": 24, "n_kv_heads": 1,
        "rope_scaling": ours.YARN
    },
    "gemma2, of as many layers as the 27B": {
        **GEMMA2, "n_layers": 46, "head_dim": 24, "attention_scale": 16**-0.5, "d_ff": 32
    },
    "gemma3": GEMMA3,
    "gemma3, of as many layers as the 27B, untied": {
        **GEMMA3, "n_layers": 62, "attention_scale": 16**-0.5, "d_ff": 32, "tied_embeddings": False
    },
    "gemma3, no window, soft-capped logits": ours.MODELS["gemma3, all layers global, soft-capped logits"],
    "olmo2": ours.MODELS["olmo2"],
    "olmo2, tied, one key head": {**ours.MODELS["olmo2"], "tied_embeddings": True, "n_kv_heads": 1},
    "phi3": {**ours.MODELS["phi3"], "attention_window": 64},
    "phi3, tied": {**ours.MODELS["phi3"], "attention_window": None, "rope_fraction": 0.25, "tied_embeddings": True},
    "mixtral": {**ours.MODELS["mixtral"], "attention_window": None},
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
    "gpt_oss, no window, wide heads, tied, all experts": {
        **GPT_OSS, "attention_window": None, "attention_pattern": [], "head_dim": 24, "n_kv_heads": 1,
        "rope_scaling": None, "tied_embeddings": True, "d_ff": 64,
        "moe": {**GPT_OSS["moe"], "n_experts": 2, "d_ff": 64}
    },
    "bloom": ours.MODELS["bloom"],
    "bloom, untied": {**ours.MODELS["bloom"], "tied_embeddings": False},
}  # fmt: skip
# llama.cpp takes GELU from a table of float16 numbers (ggml-cpu, GGML_GELU_FP16), whose errors grow with depth: rounded
# so too, ours are 3 to 15 times as close. The other scale of scores changes logits by all of their size.
TOLERANCE = {"gpt2": 2e-3, "gpt_neox": 2e-3, "bloom": 2e-3, "gemma": 5e-3, "gemma, 27B": 5e-2}


def tolerance(model):
    """How far logits may be from ours, of the largest."""
    if "27B" in model:
        return TOLERANCE["gemma, 27B"]
    return next((found for start, found in TOLERANCE.items() if model.startswith(start)), 5e-6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ours.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def made(model):
    """A model on one device with random parameters: model, mesh, parameters."""
    run = tiny.config(model=MODELS[model])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = Model(run.model, run.precision)
        return model, mesh, ours.random_params(model, mesh)


def logits_of(model, mesh, params, ids):
    """Logits `[B, T, vocab]`."""

    @jax.jit
    def forward(params, ids):
        module = model.bind(params)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        return logits(
            module(ids, positions, None),
            module.head_weight(),
            vocab_size=model.config.vocab_size,
            softcap=model.config.logit_softcap,
        )

    with jax.set_mesh(mesh):
        return np.asarray(forward(params, ids.astype(np.int32)))[:, :, : model.config.vocab_size]


def exported(path, model, mesh, params, tokenizer, dtype="float32"):
    """The model in llama.cpp."""
    with jax.set_mesh(mesh):
        export_params(model.config, params, path, load_tokenizer(tokenizer), dtype)
    return load_theirs(path)


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
def test_llama_cpp_gives_the_logits_of_an_exported_model(model, tmp_path, tokenizer):
    ids, here = prompts(), made(model)
    expected, theirs = logits_of(*here, ids), exported(tmp_path / "model.gguf", *here, tokenizer)
    assert np.ptp(expected) > 1
    found = np.stack([their_logits(theirs, row) for row in ids])
    assert np.abs(found - expected).max() < tolerance(model) * np.abs(expected).max()


GREEDY = (
    *("llama 3.1", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "mixtral", "qwen3_moe", "gpt_oss", "bloom"),
)


@pytest.mark.parametrize("model", GREEDY)
def test_llama_cpp_gives_the_greedy_text_of_an_exported_model(model, tmp_path, tokenizer):
    ids, (model, mesh, params) = prompts().tolist(), made(model)
    theirs = exported(tmp_path / "model.gguf", model, mesh, params, tokenizer)
    with jax.set_mesh(mesh):
        text = generate(model, params, ids, max_tokens=NEW_TOKENS, sampling=Sampling(0.0), eos_id=None, seed=0)
    assert [their_greedy(theirs, row) for row in ids] == text


# How far logits may be from those of float32, of the largest: by what the format leaves of a weight (11, 8 and about 7
# bits; with q8_0 llama.cpp rounds activations too).
FORMATS = {"float16": 2e-3, "bfloat16": 2e-2, "q8_0": 8e-2}


def test_smaller_formats_are_close_to_float32(tmp_path, tokenizer):
    ids, here = prompts(), made("llama, wide heads, untied")
    expected, sizes = logits_of(*here, ids), {}
    for dtype, largest in FORMATS.items():
        path = tmp_path / f"{dtype}.gguf"
        theirs = exported(path, *here, tokenizer, dtype)
        found = np.stack([their_logits(theirs, row) for row in ids])
        assert np.isfinite(found).all()
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert largest / 20 < error < largest, (dtype, error)
        sizes[dtype] = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
    assert sizes["float16"] == sizes["bfloat16"] == round(sizes["q8_0"] * 64 / 34)


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
def test_experts_are_smaller_too_and_routers_and_biases_are_float32(dtype, tmp_path, tokenizer):
    # Rounding chooses no other experts where all are chosen. An expert multiplies what is rounded twice.
    ids, here = prompts(), made("gpt_oss, no window, wide heads, tied, all experts")
    expected, theirs = logits_of(*here, ids), exported(tmp_path / "model.gguf", *here, tokenizer, dtype)
    found = np.stack([their_logits(theirs, row) for row in ids])
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 2 * FORMATS[dtype], error
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    small = {"float16": "F16", "q8_0": "Q8_0"}[dtype]
    for name in ("gate", "up", "down"):
        assert kinds[f"blk.0.ffn_{name}_exps.weight"] == small
        assert kinds[f"blk.0.ffn_{name}_exps.bias"] == "F32"
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"


TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  two  spaces, a tab\tand 12345 digits",
    "Grüße, 世界! \U0001f600",
    "it's \n\n\n",
    "<|eos|>",
]


def test_llama_cpp_reads_text_as_the_runs_tokenizer_does(tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", {**tiny.LLAMA, "vocab_size": 320}, tokenizer)
    export_run(tmp_path / "run", tmp_path / "model.gguf")
    theirs, mine = load_theirs(tmp_path / "model.gguf"), load_tokenizer(tokenizer)
    for text in TEXTS:
        ids = theirs.tokenize(text.encode(), add_bos=True, special=False)
        assert ids == [mine.bos_id, *mine.encode(text)], text
        assert theirs.detokenize(ids[1:]).decode() == text
    assert (theirs.token_bos(), theirs.token_eos()) == (mine.bos_id, mine.eos_id)
    assert theirs.n_vocab() == 320


def test_files_are_written_once_and_the_same_each_time(tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", tiny.LLAMA, tokenizer)
    for name in ("a.gguf", "b.gguf"):
        export_run(tmp_path / "run", tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(StorageError, match=r"a\.gguf: is there already"):
        export_run(tmp_path / "run", tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match="dtype = 'int4'"):
        export_run(tmp_path / "run", tmp_path / "c.gguf", "int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "run"]
