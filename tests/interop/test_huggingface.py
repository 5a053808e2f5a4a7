"""Export and import without `transformers`: the same bytes again, and what is refused."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from maxlm.config import load_config
from maxlm.data.tokenizer import load_tokenizer
from maxlm.errors import CheckpointError, ConfigError, DataError, MaxlmError, StorageError
from maxlm.inference.generate import generate_run
from maxlm.inference.load import load_run
from maxlm.interop import files
from maxlm.interop.huggingface import export_params, export_run, import_model
from maxlm.models.families import FAMILIES
from maxlm.models.families.gpt_neox import GPT_NEOX
from tests import latents, tiny
from tests.interop import ours, public

MODELS = {
    "llama": tiny.LLAMA,
    "llama, tied, biases, wide heads": {
        **tiny.LLAMA, "tied_embeddings": True, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True,
        "head_dim": 32, "n_kv_heads": 1, "rope_theta": 5e5, "norm_eps": 1e-6, "init_std": 0.01
    },
    **ours.MODELS,
    "deepseek_v3, two tokens further ahead": latents.DEEPSEEK_V3,
    "gpt2, untied": {**tiny.GPT2, "tied_embeddings": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ours.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def llama(tmp_path):
    """A Llama model's folder that is in order."""
    return public.write_folder(tmp_path / "theirs", public.LLAMA_CONFIG)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_export_import_export_gives_the_same_bytes(model, dtype, tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", MODELS[model], tokenizer, n_devices=8)
    export_run(tmp_path / "run", tmp_path / "a", dtype)
    import_model(tmp_path / "a", tmp_path / "again")
    export_run(tmp_path / "again", tmp_path / "b", dtype)
    first = public.contents(tmp_path / "a")
    assert first == public.contents(tmp_path / "b")
    assert first.keys() >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("model", MODELS)
def test_weights_come_back_bitwise_and_the_vocabularys_padding_as_zeros(model, tmp_path, tokenizer):
    run = ours.make_run(tmp_path / "run", MODELS[model], tokenizer)
    export_run(tmp_path / "run", tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "again")
    before, after = load_run(tmp_path / "run"), load_run(tmp_path / "again")
    filled_in = {"n_kv_heads": run.model.kv_heads, "head_dim": run.model.head_width}
    assert after.config.model.model_copy(update=filled_in) == run.model.model_copy(update=filled_in)
    assert (after.config.model.kv_heads, after.config.model.head_width) == tuple(filled_in.values())
    assert after.step == 0
    expected = jax.device_get(before.params)
    for part, name in (("embedding", "tokens"), ("head", "kernel")):
        if part in expected:
            expected[part][name] = expected[part][name].copy()
            expected[part][name][run.model.vocab_size :] = 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.params), expected)


def test_an_imported_run_continues_prompts_as_the_run_it_came_from(tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", tiny.LLAMA, tokenizer)
    export_run(tmp_path / "run", tmp_path / "out")
    import_model(tmp_path / "out", tmp_path / "again")
    texts = [
        generate_run(tmp_path / run, ["def f(", "import "], max_tokens=12, greedy=True) for run in ("run", "again")
    ]
    assert texts[0] == texts[1]
    assert all(texts[0])
    sampled = [generate_run(tmp_path / "run", ["x"], max_tokens=12, top_k=50, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_shards_hold_what_one_file_holds_and_are_read_back(tmp_path, tokenizer):
    run = ours.make_run(tmp_path / "run", tiny.LLAMA, tokenizer)
    loaded = load_run(tmp_path / "run")
    with jax.set_mesh(loaded.mesh):
        for name, size in (("one", 10**9), ("many", 60_000)):
            export_params(run.model, loaded.params, tmp_path / name, load_tokenizer(tokenizer), max_shard_bytes=size)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [p.name for p in shards] == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 5
    whole, index = load_file(tmp_path / "one" / files.SINGLE), json.loads((tmp_path / "many" / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for path in shards:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 60_000
        for name, tensor in tensors.items():
            assert index["weight_map"].pop(name) == path.name
            np.testing.assert_array_equal(tensor, whole.pop(name))
    assert not whole
    assert not index["weight_map"]
    import_model(tmp_path / "many", tmp_path / "again")
    export_run(tmp_path / "again", tmp_path / "b")
    assert public.contents(tmp_path / "b") == public.contents(tmp_path / "one")


def test_a_file_is_the_one_that_the_safetensors_package_writes(tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", tiny.GPT2, None)
    for dtype in ("float32", "bfloat16", "float16"):
        export_run(tmp_path / "run", tmp_path / dtype, dtype)
        path = tmp_path / dtype / files.SINGLE
        tensors = load_file(path)
        assert {str(x.dtype) for x in tensors.values()} == {dtype}
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_models_without_a_tokenizer_travel_without_one(tmp_path):
    ours.make_run(tmp_path / "run", tiny.LLAMA, None)
    export_run(tmp_path / "run", tmp_path / "out")
    assert public.contents(tmp_path / "out").keys() == {"config.json", "generation_config.json", "model.safetensors"}
    import_model(tmp_path / "out", tmp_path / "again")
    assert load_config(tmp_path / "again" / "config.yaml").tokenizer.path is None


def test_openais_own_names_buffers_and_a_second_copy_of_the_tied_head_are_read(tmp_path):
    tensors = public.weights(public.GPT2_CONFIG)
    public.write_folder(tmp_path / "a", public.GPT2_CONFIG, tensors)
    theirs = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    theirs |= {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32), "lm_head.weight": theirs["wte.weight"]}
    public.write_folder(tmp_path / "b", public.GPT2_CONFIG, theirs)
    for name in "ab":
        import_model(tmp_path / name, tmp_path / f"run-{name}")
        export_run(tmp_path / f"run-{name}", tmp_path / f"out-{name}")
    assert public.contents(tmp_path / "out-a") == public.contents(tmp_path / "out-b")
    np.testing.assert_equal(load_file(tmp_path / "out-a" / files.SINGLE), tensors)


@pytest.mark.parametrize(("stored", "parameters"), [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_half_precision_files_lose_nothing(stored, parameters, tmp_path):
    dtype = {"bfloat16": jnp.bfloat16, "float16": np.float16}[stored]
    tensors = {name: x.astype(dtype) for name, x in public.weights(public.LLAMA_CONFIG).items()}
    import_model(public.write_folder(tmp_path / "theirs", public.LLAMA_CONFIG, tensors), tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml").precision.parameters == parameters
    export_run(tmp_path / "run", tmp_path / "out", stored)
    found = load_file(tmp_path / "out" / files.SINGLE)
    assert found.keys() == tensors.keys()
    assert all(found[name].tobytes() == x.tobytes() for name, x in tensors.items())


# What is refused on export: the change of a model, and what the message names of it.
NO_FAMILY = {
    "soft-capped logits": ({"logit_softcap": 30.0}, "model.logit_softcap = 30.0"),
    "soft-capped scores": ({"attention_softcap": 30.0}, "model.attention_softcap = 30.0"),
    "qk-norm with layer norm": ({"qk_norm": "head", "norm": "layer"}, "model.qk_norm = 'head'"),
    "a part of each head": ({"rope_fraction": 0.5, "mlp_bias": True}, "model.rope_fraction = 0.5"),
    "static NTK": ({"rope_scaling": {"kind": "ntk", "factor": 2.0}}, "model.rope_scaling.kind = 'ntk'"),
    "a window and biases in the feed-forward block": (
        {"attention_window": 8, "mlp_bias": True},
        "model.attention_window = 8",
    ),
    "geglu with layer norm": ({"mlp": "geglu", "norm": "layer"}, "model.mlp = 'geglu'"),
    "squared relu": ({"mlp": "relu2"}, "model.mlp = 'relu2'"),
    "a bias on one of four projections": ({"attention_out_bias": True}, "model.attention_out_bias = True"),
    "biases and a width that is no multiple of heads": (
        {"d_model": 72, "n_heads": 16, "head_dim": 8, "mlp_bias": True},
        "model.d_model = 72",
    ),
}


@pytest.mark.parametrize("case", NO_FAMILY)
def test_a_model_of_no_family_is_refused_before_its_weights_are_read(case, tmp_path):
    change, named = NO_FAMILY[case]
    run = tiny.config(model={**tiny.LLAMA, **change})
    (tmp_path / "run").mkdir()
    from maxlm.config import to_yaml

    (tmp_path / "run" / "config.yaml").write_text(to_yaml(run))
    with pytest.raises(ConfigError) as caught:
        export_run(tmp_path / "run", tmp_path / "out")
    llama = next(line for line in str(caught.value).splitlines() if "llama:" in line)
    assert named in llama
    assert "gpt2:" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"n_kv_heads": 2}, "model.n_kv_heads = 2"), ({"head_dim": 8}, "model.head_dim = 8")],
)
def test_gpt2_and_gpt_neox_take_equal_heads_alone(change, named, tmp_path):
    for family, model in (("gpt2", tiny.GPT2), ("gpt_neox", tiny.GPT_NEOX)):
        run = tiny.config(model={**model, **change})
        with pytest.raises(ConfigError, match=f"{family}: {named}"):
            export_params(run.model, {}, tmp_path / "out", None)


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(tmp_path, tokenizer):
    ours.make_run(tmp_path / "run", tiny.LLAMA, tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(StorageError, match="full: is there already"):
        export_run(tmp_path / "run", tmp_path / "full")
    with pytest.raises(ConfigError, match="dtype = 'int8'"):
        export_run(tmp_path / "run", tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="99"):
        export_run(tmp_path / "run", tmp_path / "out", step=99)
    small = ours.make_run(tmp_path / "small", {**tiny.LLAMA, "vocab_size": 290}, tokenizer)
    with pytest.raises(ConfigError, match=r"300 tokens and model\.vocab_size is 290"):
        export_run(tmp_path / "small", tmp_path / "out")
    loaded = load_run(tmp_path / "small")
    huge = jax.tree.map(lambda x: x * 1e6, loaded.params)
    with jax.set_mesh(loaded.mesh), pytest.raises(ConfigError, match=r"lm_head\.weight.*float16"):
        export_params(small.model, huge, tmp_path / "out", None, "float16")
    config = tmp_path / "run" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["data"]["objective"]["kind"] = "prefix_lm"
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"data\.objective\.kind = 'prefix_lm'.*from left to right"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run", "small"]


def test_an_empty_folder_may_be_exported_into(tmp_path):
    ours.make_run(tmp_path / "run", tiny.LLAMA, None)
    (tmp_path / "out").mkdir()
    export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / files.SINGLE).exists()


# What happens to an export half-way, as the code of a process before it exports: a kill, a disk that is full.
MISHAPS = {
    "killed": (
        "import os, signal\nhuggingface.write_synced = lambda path, content: os.kill(os.getpid(), signal.SIGKILL)\n",
        -9,
    ),
    "no room": ("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n", 5),
}


@pytest.mark.processes
@pytest.mark.parametrize("mishap", MISHAPS)
def test_an_export_that_does_not_end_leaves_no_folder_of_that_name(mishap, tmp_path):
    ours.make_run(tmp_path / "run", tiny.LLAMA, None)
    before, exit_code = MISHAPS[mishap]
    code = (
        "import sys\n"
        "from maxlm.errors import MaxlmError\n"
        "from maxlm.interop import huggingface\n"
        f"{before}"
        "try:\n"
        "    huggingface.export_run(sys.argv[1], sys.argv[2])\n"
        "except MaxlmError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
    )
    paths = [str(tmp_path / "run"), str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-c", code, *paths],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == exit_code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
    export_run(*paths)
    assert (tmp_path / "out" / "config.json").exists()


# What is refused on import: a change of config.json, and what the message says.
CONFIGS = {
    "a type that is not known": ({"model_type": "mamba"}, "model_type = 'mamba'"),
    "no type": ({"model_type": None}, "model_type = None"),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
    "rope that depends on the row's length": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic': the types that can"
    ),
    "rope with two factors a channel, as version 5 writes it": (
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope", "long_factor": [2.0]}},
        "rope_parameters.rope_type = 'longrope'",
    ),
    "rope's number of another type": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32.0}}, "beta_fast is not of kind 'linear'"
    ),
    "rope's number that is not known": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "rope_scaling.mscale = 0.7: not known"
    ),
    "rope without its numbers": ({"rope_scaling": {"rope_type": "llama3"}}, "(rope_scaling.factor)"),
    "rope in two spellings": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}}, "both given"
    ),
    "rope that is no mapping": ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn': not a mapping"),
    "a part of each head turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "a sliding window": ({"sliding_window": 4096}, "sliding_window = 4096"),
    "quantized weights": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "a size of the wrong kind": ({"hidden_size": "big"}, "hidden_size (d_model)"),
    "a size below one": ({"num_hidden_layers": 0}, "num_hidden_layers (n_layers)"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "n_kv_heads = 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_with_no_equal_here_is_refused_by_name(case, tmp_path, llama):
    change, message = CONFIGS[case]
    (llama / "config.json").write_text(json.dumps(public.LLAMA_CONFIG | change))
    with pytest.raises(ConfigError) as caught:
        import_model(llama, tmp_path / "run")
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)
    assert not (tmp_path / "run").exists()


# Qwen models whose window is not said in full.
WINDOWS = {
    "in layers, and not at all": ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window = False"),
    "in chunks": ({"layer_types": ["chunked_attention"] * 3}, "['chunked_attention'] is neither"),
    "in too few layers": ({"layer_types": ["full_attention"] * 2}, "expected a list of 3 names"),
    "from a layer that is no number": ({"max_window_layers": "all"}, "max_window_layers = 'all'"),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_qwen_model_whose_window_is_not_said_in_full_is_refused(case, tmp_path):
    change, message = WINDOWS[case]
    folder = public.write_folder(tmp_path / "theirs", public.QWEN2_CONFIG | change, {})
    with pytest.raises(ConfigError) as caught:
        import_model(folder, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


# Llama 3.1's RoPE, as each version of transformers has spelled it.
SPELLINGS = {
    "rope_type": lambda c: c,
    "type": lambda c: c | {"rope_scaling": {("type" if k == "rope_type" else k): x for k, x in ROPE.items()}},
    "both": lambda c: c | {"rope_scaling": ROPE | {"type": "llama3"}},
    "the length left to max_position_embeddings": lambda c: (
        c
        | {"max_position_embeddings": 16}
        | {"rope_scaling": {k: x for k, x in ROPE.items() if k != "original_max_position_embeddings"}}
    ),
    "version 5": lambda c: (
        {k: x for k, x in c.items() if k not in ("rope_scaling", "rope_theta")}
        | {"rope_parameters": ROPE | {"rope_theta": c["rope_theta"], "partial_rotary_factor": 1.0}}
    ),
}
ROPE = public.LLAMA31_CONFIG["rope_scaling"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_scaled_rope_is_the_same_model(spelling):
    config = FAMILIES[0].from_hf_config(SPELLINGS[spelling](public.LLAMA31_CONFIG), "config.json")
    assert config.rope_scaling.model_dump(exclude_none=True) == ours.LLAMA31
    assert config.rope_theta == 5000.0
    written = FAMILIES[0].to_hf_config(config, dtype="float32", special_ids={})
    assert (written["rope_theta"], written["rope_scaling"]) == (5000.0, ROPE)


@pytest.mark.parametrize("case", public.EVERY)
def test_a_public_models_tensors_go_in_and_out_bitwise(case, tmp_path):
    tensors = public.weights(public.EVERY[case])
    import_model(public.write_folder(tmp_path / "theirs", public.EVERY[case], tensors), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    found = load_file(tmp_path / "out" / files.SINGLE)
    assert found.keys() == tensors.keys()
    assert all(found[name].tobytes() == x.tobytes() for name, x in tensors.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Without its window a Mistral is a Llama, without experts a DeepSeek-V2 a V3, and an mT5 is a T5 whose head is not
    # tied.
    same = {"mistral, no window": "llama", "deepseek_v2, dense": "deepseek_v3", "mt5": "t5"}
    assert config["model_type"] == same.get(case, public.EVERY[case]["model_type"])


def test_copies_of_embedding_and_head_are_read_once_and_modules_that_are_not_there_not_at_all(tmp_path):
    ours.make_run(tmp_path / "run", latents.DEEPSEEK_V3, None)
    export_run(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 2
    tensors = load_file(tmp_path / "out" / files.SINGLE)
    first = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    copies = {f"model.layers.{n}.{name}.weight": tensors[theirs] for n in (2, 3) for name, theirs in first.items()}
    import_model(public.write_folder(tmp_path / "a", config, tensors | copies), tmp_path / "run-a")
    export_run(tmp_path / "run-a", tmp_path / "again")
    assert public.contents(tmp_path / "again") == public.contents(tmp_path / "out")

    copies["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(DataError, match=r"model\.layers\.3\.shared_head\.head\.weight is not lm_head\.weight"):
        import_model(public.write_folder(tmp_path / "b", config, tensors | copies), tmp_path / "run-b")

    plain = {name: x for name, x in tensors.items() if not name.startswith(("model.layers.2.", "model.layers.3."))}
    import_model(public.write_folder(tmp_path / "c", config, plain), tmp_path / "run-c")
    assert load_config(tmp_path / "run-c" / "config.yaml").model.mtp_layers == 0


def test_a_joined_projection_has_queries_keys_and_values_head_by_head():
    config = tiny.config(model=tiny.GPT_NEOX).model
    weight = next(w for w in GPT_NEOX.weights if w.theirs.endswith("query_key_value.weight"))
    rng = np.random.default_rng(0)
    ours_ = [rng.standard_normal((64, 4, 16)).astype(np.float32) for _ in "qkv"]
    theirs = weight.export(ours_, config)
    assert theirs.shape == weight.shape(config) == (3 * 64, 64)
    for head in range(4):
        for i, array in enumerate(ours_):
            np.testing.assert_array_equal(theirs[(3 * head + i) * 16 :][:16], array[:, head].T)
    for found, array in zip(weight.read(theirs, config), ours_, strict=True):
        np.testing.assert_array_equal(found, array)


def change_tensors(**changes):
    def damage(folder):
        tensors = load_file(folder / files.SINGLE)
        for name, change in changes.items():
            name = name.replace("__", ".")
            tensors[name] = change(tensors.get(name))
        save_file({name: x for name, x in tensors.items() if x is not None}, folder / files.SINGLE)

    return damage


def cut(folder):
    content = (folder / files.SINGLE).read_bytes()
    (folder / files.SINGLE).write_bytes(content[: len(content) // 2])


def lengthen_header(folder):
    content = (folder / files.SINGLE).read_bytes()
    (folder / files.SINGLE).write_bytes((2**62).to_bytes(8, "little") + content[8:])


def index_of(weight_map):
    def damage(folder):
        names = load_file(folder / files.SINGLE)
        (folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map(names)}))

    return damage


def pickled(folder):
    (folder / files.SINGLE).rename(folder / "pytorch_model.bin")


# What is refused on import: damage to a folder that is in order, and what the message says.
FOLDERS = {
    "a tensor is missing": (change_tensors(model__norm__weight=lambda x: None), "model.norm.weight [48] is missing"),
    "a tensor too much": (change_tensors(extra=lambda x: np.zeros(3)), "extra [3] is not of this model"),
    "a tensor of another shape": (
        change_tensors(lm_head__weight=lambda x: x[:-1]), "lm_head.weight is [202, 48], and the config makes it [203"
    ),
    "a tensor of integers": (change_tensors(lm_head__weight=lambda x: x.astype(np.int8)), "lm_head.weight is of I8"),
    "a file that is cut off": (cut, "model.safetensors: not a safetensors file, or damaged"),
    "a header that lies about its length": (lengthen_header, "model.safetensors: not a safetensors file, or damaged"),
    "no weights": (lambda folder: (folder / files.SINGLE).unlink(), "no weights here"),
    "pickled weights": (pickled, "pickle"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: there is no such file"),
    "a config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: holds list"),
    "an index of a file that is not there": (
        index_of(lambda names: dict.fromkeys(names, "model-00001.safetensors")), "model-00001.safetensors: there is no"
    ),
    "an index that leads out of the folder": (
        index_of(lambda names: dict.fromkeys(names, "../theirs/model.safetensors")), "a name in this folder"
    ),
    "an index that knows of more than there is": (
        index_of(lambda names: dict.fromkeys([*names, "more"], files.SINGLE)), "more is in model.safetensors"
    ),
    "an index without names": (index_of(lambda names: {}), "weight_map"),
    "a damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_in_order_is_refused_and_no_run_appears(case, tmp_path, llama):
    damage, message = FOLDERS[case]
    damage(llama)
    with pytest.raises(DataError) as caught:
        import_model(llama, tmp_path / "run")
    assert message in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    config = public.LLAMA_CONFIG | {"tie_word_embeddings": True}
    tensors = public.weights(public.LLAMA_CONFIG)
    with pytest.raises(DataError, match="tie_word_embeddings"):
        import_model(public.write_folder(tmp_path / "theirs", config, tensors), tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, llama, tokenizer):
    load_tokenizer(tokenizer).save(llama)
    with pytest.raises(DataError, match=r"300 tokens.*vocab_size = 203"):
        import_model(llama, tmp_path / "run")


def test_a_run_that_is_there_is_not_written_over(tmp_path, llama):
    import_model(llama, tmp_path / "run")
    before = public.contents(tmp_path / "run")
    with pytest.raises(StorageError, match="is there already"):
        import_model(llama, tmp_path / "run")
    assert public.contents(tmp_path / "run") == before


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MaxlmError, match="nowhere"):
        import_model(tmp_path / "nowhere", tmp_path / "run")
