"""Configs: what is read, what is refused and how that is said, and what a resumed run may change."""

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.cli import main
from maxlm.config import RunConfig, check_resume, diff, explain, load_config, to_yaml
from maxlm.config_file import apply_override, dump, parse, preset_names, presets_folder
from maxlm.config_keys import sections_in, walk
from maxlm.errors import CheckpointError, ConfigError
from maxlm.models.flops import count_parameters
from maxlm.section import Section

SINGLE_MACHINE = ("llama-20m", "llama-60m", "llama-150m", "llama-300m", "llama-600m", "llama-1b", "llama-3b")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Each case: the text of run.yaml (None: there is no file), overrides, and what the message must name.
BAD_CONFIGS = {
    "unknown key": ("model:\n  n_layer: 3\n", [], ["run.yaml:3", "`model.n_layer`", "did you mean `model.n_layers`"]),
    "unknown section": ("modle:\n  n_layers: 3\n", [], ["run.yaml:2", "`modle`", "`model`"]),
    "unknown key without a near one": ("mesh:\n  zzz: 3\n", [], ["run.yaml:3", "`mesh.zzz`", "--help-keys mesh"]),
    "key in the wrong section": ("learning_rate: 1\n", [], ["run.yaml:2", "did you mean `optimizer.learning_rate`"]),
    "dotted key in a file": ("model.n_layers: 3\n", [], ["run.yaml:2", "`model.n_layers`", "nested"]),
    "unknown key in a list": (
        "data:\n  sources:\n    - kind: text\n      pathes: [a]\n",
        [],
        ["run.yaml:5", "`data.sources.0.pathes`", "`data.sources.0.paths`"],
    ),
    "unknown key in an override": ("", ["train.step=3"], ["override `train.step=3`", "did you mean `train.steps`"]),
    "wrong type": ("train:\n  steps: many\n", [], ["run.yaml:3", "train.steps", '"many"', "expected integer"]),
    "truth value for a number": ("", ["train.steps=true"], ["train.steps = true", "expected integer"]),
    "number for text": ("metrics:\n  wandb: 5\n", [], ["run.yaml:3", "metrics.wandb = 5", "text or null"]),
    "value for a section": ("model: big\n", [], ["run.yaml:2", 'model = "big"', "expected section"]),
    "not one of the choices": ("", ["model.mlp=swiglue"], ["model.mlp", "did you mean `swiglu`"]),
    "out of range": (
        "train:\n  accumulation: 0\n",
        [],
        ["run.yaml:3", "train.accumulation = 0", "greater than or equal"],
    ),
    "not finite": ("", ["optimizer.learning_rate=.nan"], ["optimizer.learning_rate", "finite"]),
    "key given twice": ("train:\n  seed: 1\n  seed: 2\n", [], ["run.yaml:4", "`train.seed`", "run.yaml:3"]),
    "section given twice": ("train:\n  seed: 1\ntrain:\n  steps: 2\n", [], ["run.yaml:4", "`train`", "run.yaml:2"]),
    "bad syntax": ("train:\n  steps: [1\nmodel: 2\n", [], ["run.yaml:4", "not YAML"]),
    "tab": ("train:\n\tsteps: 1\n", [], ["run.yaml:3", "not YAML"]),
    "alias": ("train: &t\n  seed: 1\nmodel: *t\n", [], ["run.yaml:4", "aliases"]),
    "tag that runs code": ("name: !!python/object/apply:os.system [ls]\n", [], ["run.yaml:2", "plain data"]),
    "bad override": ("", ["train.steps"], ["override `train.steps`", "key=value"]),
    "bad YAML in an override": ("", ["data.sources=[1"], ["override `data.sources=[1`", "not YAML"]),
    "list item that is not there": ("", ["data.sources.7.kind=text"], ["`data.sources`", "without a `7`"]),
    "extends in an override": ("", ["extends=llama-20m"], ["unknown key `extends`"]),
    "missing file": (None, [], ["run.yaml", "not a file"]),
    "rows do not fill the batch": (
        "train:\n  global_batch_tokens: 1000\n",
        [],
        ["run.yaml:3", "train.global_batch_tokens = 1000", "train.seq_len = 256", "768 or 1024"],
    ),
    "accumulation does not divide": (
        "train:\n  accumulation: 3\n  global_batch_tokens: 4096\n",
        [],
        ["run.yaml:3", "train.accumulation = 3", "16 rows"],
    ),
    "rows longer than the model": (
        "model:\n  max_seq_len: 128\n",
        [],
        ["run.yaml:3", "train.seq_len = 256", "model.max_seq_len = 128"],
    ),
    "warm-up without an end": (
        "schedule:\n  warmup_steps: 300\n",
        ["train.steps=300"],
        ["run.yaml:3", "schedule.warmup_steps = 300", "train.steps = 300"],
    ),
    "decay longer than the run": (
        "schedule:\n  kind: wsd\n  decay_steps: 300\n",
        ["train.steps=200"],
        ["run.yaml:4", "schedule.decay_steps = 300", "train.steps = 200"],
    ),
    "profile after the end": (
        "profile:\n  steps: 2\n  start_step: 11\n",
        ["train.steps=10", "schedule.warmup_steps=1"],
        ["run.yaml:4", "profile.start_step = 11", "train.steps = 10"],
    ),
    "the best of checkpoints that are not evaluated": (
        "checkpoint:\n  keep_best: 1\n",
        ["train.steps=250", "checkpoint.every=100", "evaluation.every=60"],
        ["run.yaml:3", "checkpoint.keep_best = 1", "evaluation.every = 60", "checkpoint.every = 100"],
    ),
    "two axes that fill up": ("mesh:\n  data: -1\n", [], ["run.yaml:3", "data and fsdp are both -1"]),
    "an axis of no devices": ("mesh:\n  data: 0\n", [], ["run.yaml:3", "data = 0", "at least 1, or -1"]),
    "heads do not divide the width": ("model:\n  n_heads: 3\n", [], ["run.yaml:3", "d_model = 256", "n_heads = 3"]),
    "refused by the support table": ("mesh:\n  expert: 2\n", [], ["run.yaml:3", "mesh.expert"]),
    "repeats of a schedule that has one": ("pipeline:\n  repeats: 2\n", [], ["run.yaml:3", "repeats = 2"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused_with_its_key_and_place_and_nothing_is_written(case, folder, capsys):
    text, overrides, expected = BAD_CONFIGS[case]
    if text is not None:
        Path("run.yaml").write_text("extends: quickstart\n" + text)
    before = sorted(folder.rglob("*"))

    assert main(["train", "run.yaml", *overrides]) == 2

    out, message = capsys.readouterr()
    assert out == ""
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    for part in expected:
        assert part in message
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: \xff\xfe", "not UTF-8"),
        (b"name: a\x00b", "not YAML"),
        (b"# " + b"x" * 1_000_001, "too large"),
        (b"[" * 5000, "nested too deep"),
        (b"a: " + b"{a: " * 200 + b"1" + b"}" * 200, "nested too deep"),
        (b"- a\n- b\n", "a list"),
        (b"", "`model` must be given"),
    ],
)
def test_a_file_that_is_no_config_is_refused(content, expected, folder):
    Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        load_config("run.yaml")
    assert str(caught.value).startswith("run.yaml") or "run.yaml" in str(caught.value)


def test_several_errors_are_told_at_once(folder):
    Path("run.yaml").write_text("extends: quickstart\nmodel:\n  n_layer: 3\ntrain:\n  steps: many\n")
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml", ["mesh.data=x"])
    message = str(caught.value)
    assert message.startswith("3 settings are wrong")
    for part in ("run.yaml:3: unknown key `model.n_layer`", "run.yaml:5: train.steps", "override `mesh.data=x`"):
        assert part in message


def test_missing_keys_are_named_with_their_meaning(folder):
    Path("run.yaml").write_text("name: a\nmodel:\n  n_layers: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml")
    assert "run.yaml:2: `model.vocab_size` must be given (tokens in the vocabulary" in str(caught.value)
    assert "run.yaml: `train` must be given" in str(caught.value)


def test_nearest_presets_are_named_for_a_missing_one():
    with pytest.raises(ConfigError, match="did you mean `llama3-8b`"):
        load_config("llama3-8")


def test_child_wins_over_parent_and_override_over_both(folder):
    Path("base.yaml").write_text("extends: quickstart\ntrain: {steps: 300, seed: 1}\noptimizer: {beta1: 0.8}\n")
    Path("sub").mkdir()
    Path("sub/child.yaml").write_text("extends: ../base.yaml\ntrain: {steps: 400}\n")
    config = load_config("sub/child.yaml", ["train.seed=2", "train.seed=3"])
    assert (config.train.steps, config.train.seed, config.optimizer.beta1) == (400, 3, 0.8)
    assert config.model == load_config("quickstart").model


def test_lists_are_replaced_and_mappings_merged(folder):
    Path("run.yaml").write_text(
        "extends: quickstart\noptimizer: {no_decay: [bias]}\ndata: {sources: [{kind: text, paths: [a]}]}\n"
    )
    config = load_config("run.yaml")
    assert config.optimizer.no_decay == ("bias",)
    assert config.optimizer.learning_rate == load_config("quickstart").optimizer.learning_rate
    assert [source.kind for source in config.data.sources] == ["text"]


def test_an_override_reaches_into_a_list():
    config = load_config("quickstart", ["data.sources=[{kind: jsonl, paths: [a]}, {kind: python-stdlib}]"])
    changed = load_config(
        "quickstart",
        ["data.sources=[{kind: jsonl, paths: [a]}, {kind: python-stdlib}]", "data.sources.0.field=body"],
    )
    assert diff(config, changed) == [
        (
            "data.sources",
            config.model_dump(mode="json")["data"]["sources"],
            changed.model_dump(mode="json")["data"]["sources"],
        )
    ]
    assert changed.data.sources[0].field == "body"
    assert changed.data.sources[0].paths == ("a",)


def test_files_that_extend_in_a_circle_are_refused(folder):
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("train: {steps: 1}\nextends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml:2: extends: .* circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_config("a.yaml")


def test_a_missing_parent_is_named_where_it_is_extended(folder):
    Path("a.yaml").write_text("\nextends: quickstrat\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: extends: .*did you mean `quickstart`"):
        load_config("a.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e5", 100_000),
        ("1.5e3", 1500),
        ("1_000_000", 1_000_000),
        ("true", True),
        ("no", "no"),
        ("010", "010"),
        ("10:30", "10:30"),
        ("2024-01-01", "2024-01-01"),
        ("'5'", "5"),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = parse(f"a: {text}", "f").data["a"]
    assert read == value
    assert type(read) is type(value)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=6), PLAIN, max_size=4))
def test_dumped_data_reads_back_equal(data):
    assert parse(dump(data), "f").data == data


@pytest.mark.parametrize(
    "text", ["3e-4", "1e5", "yes", "null", "0x1f", "12:30", "2024-01-01", "=", "<<", "1_0", "- a", "*a"]
)
def test_text_that_looks_like_something_else_stays_text(text):
    assert parse(dump({"a": text, text: 1}), "f").data == {"a": text, text: 1}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([row.key for row in walk(RunConfig)] + ["x", "", "model..a", "data.sources.0", "extends"]),
    st.text(max_size=20) | PLAIN.map(lambda value: yaml.safe_dump(value)),
)
def test_no_override_ends_in_anything_but_a_config_or_a_config_error(name, value):
    try:
        config = load_config("quickstart", [f"{name}={value}"])
    except ConfigError as error:
        said = str(error)
    else:
        assert isinstance(config, RunConfig)
        return
    assert f"override `{name}={value}`" in said


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from("abmodeltrain:{}[]&*!|>-'\"# \n\t,?%@`~0123"), max_size=60))
def test_no_text_ends_in_anything_but_data_or_a_config_error(text):
    try:
        tree = parse(text, "file.yaml")
    except ConfigError as error:
        places = [str(error)]
    else:
        places = tree.origins.values()
    assert all(re.match(r"file\.yaml:(\d+$|\d*:? )", place) for place in places)


def test_origins_follow_what_is_merged():
    tree = parse("a:\n  b: 1\n  c: [1, 2]\n", "low").merged_with(parse("\na:\n  c: [3]\n", "high"))
    tree = apply_override(tree, "a.d=4")
    assert tree.data == {"a": {"b": 1, "c": [3], "d": 4}}
    assert tree.origin(("a", "b")) == "low:2"
    assert tree.origin(("a", "c", 0)) == "high:3"
    assert ("a", "c", 1) not in tree.origins
    assert tree.origin(("a", "d")) == "override `a.d=4`"


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_round_trips_through_yaml(preset, folder):
    config = load_config(preset)
    Path("saved.yaml").write_text(to_yaml(config))
    again = load_config("saved.yaml")
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert (config.name, config.run_dir) == (preset, f"runs/{preset}")


def test_the_promised_presets_are_there():
    promised = {"quickstart", "gpt2-124m", "llama3-8b", "llama3-70b", "chinchilla-70b", *SINGLE_MACHINE}
    promised |= {"llama3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b", "pythia-6.9b"}
    promised |= {"gemma2-9b", "gemma2-27b", "gemma3-4b", "gemma3-27b", "olmo2-7b", "phi3-mini"}
    promised |= {"opt-6.7b", "bloom-176b", "gpt3-175b", "gopher-280b"}
    promised |= {"mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "gpt-oss-120b"}
    assert promised <= set(preset_names())


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_says_its_true_size_and_length(preset):
    config = load_config(preset)
    text = (presets_folder() / f"{preset}.yaml").read_text()
    total, inner = re.search(r"([\d,]+) parameters(?: here)?, ([\d,]+) without", text).groups()
    count = count_parameters(config.model)
    assert (total, inner) == (f"{count.total:,}", f"{count.non_embedding:,}")
    active = re.search(r", ([\d,]+) active", text)
    assert (active[1] if active else total) == f"{count.active:,}"
    if tokens := re.search(r"; ([\d.]+)([BT]) tokens", text):
        scale = {"B": 1e9, "T": 1e12}[tokens[2]]
        assert f"{config.train.steps * config.train.global_batch_tokens / scale:.1f}" == tokens[1]


@pytest.mark.parametrize("preset", SINGLE_MACHINE)
def test_single_machine_sizes_follow_the_laws_that_they_cite(preset):
    config = load_config(preset)
    parameters, nominal = count_parameters(config.model).total, preset.removeprefix("llama-")
    assert parameters == pytest.approx(float(nominal[:-1]) * {"m": 1e6, "b": 1e9}[nominal[-1]], rel=0.03)
    assert config.train.steps * config.train.global_batch_tokens == pytest.approx(20 * parameters, rel=1e-3)
    flops = 6 * parameters * 20 * parameters
    assert config.optimizer.learning_rate == pytest.approx(0.3118 * flops**-0.125, rel=0.05)
    assert config.train.global_batch_tokens == 2 ** round(math.log2(0.2920 * flops**0.3271))
    assert config.train.global_batch_tokens / config.train.accumulation <= 131072
    assert config.model.d_model % 128 == 0
    assert config.model.d_ff % 128 == 0
    assert config.model.head_width in (64, 128)


def test_quickstart_trains_the_vocabulary_that_its_model_has():
    config = load_config("quickstart")
    assert config.tokenizer.vocab_size == config.model.vocab_size


def test_the_run_folder_follows_the_name():
    assert load_config("quickstart", ["name=other"]).run_dir == "runs/other"
    assert load_config("quickstart", ["run_dir=/data/{name}/x"]).run_dir == "/data/quickstart/x"


def test_a_run_folder_can_be_given_for_its_config(folder):
    config = load_config("quickstart", ["train.steps=77"])
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/config.yaml").write_text(to_yaml(config))
    assert load_config("runs/quickstart") == config


def test_every_key_has_a_meaning_and_a_plain_type():
    rows = explain()
    assert len(rows) > 80
    for row in rows:
        assert row.meaning, row.key
        assert "typing" not in row.type, row
        assert "<class" not in row.type, row


def test_the_default_that_is_explained_is_the_one_that_applies(folder):
    Path("least.yaml").write_text(
        "model: {vocab_size: 8, n_layers: 1, d_model: 8, n_heads: 1, d_ff: 8}\n"
        "train: {steps: 1, seq_len: 8, global_batch_tokens: 8}\noptimizer: {learning_rate: 1}\n"
    )
    data = load_config("least.yaml").model_dump(mode="json")
    for row in explain():
        if row.required or row.section or "*" in row.key or row.key in ("name", "run_dir"):
            continue
        *sections, last = row.key.split(".")
        value = data
        for part in sections:
            value = value and value[part]
        if value is not None:  # else it is of a section that is not given
            assert value[last] == row.default, row.key


def test_explain_takes_a_section_or_a_key_and_refuses_others():
    assert {row.key.split(".")[0] for row in explain("mesh")} == {"mesh"}
    assert [row.key for row in explain("train.seed")] == ["train.seed"]
    with pytest.raises(ConfigError, match=r"no key `trian.seed`; did you mean `train.seed`"):
        explain("trian.seed")


def test_every_section_refuses_unknown_keys_and_is_frozen():
    def sections(cls: type[Section]):
        yield cls
        for info in cls.model_fields.values():
            for _, inner in sections_in(info.annotation):
                yield from sections(inner)

    found = list(sections(RunConfig))
    assert len(found) > 14
    for section in found:
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"]


CHANGES = [
    ("model.n_layers=5", False),
    ("model.rope_theta=5e5", False),
    ("model.rope_scaling={kind: linear, factor: 2.0}", False),
    ("model.attention_window=64", False),
    ("model.max_seq_len=512", False),
    ("tokenizer.path=elsewhere", True),
    ("tokenizer.kind=unigram", False),
    ("data.store=elsewhere", True),
    ("data.sources.0={kind: text, paths: [a]}", False),
    ("data.shuffle=false", False),
    ("data.heldout_fraction=0.1", False),
    ("train.seq_len=128", False),
    ("train.global_batch_tokens=8192", False),
    ("train.seed=1", False),
    ("train.spike.window=64", False),
    ("precision.parameters=bfloat16", False),
    ("train.steps=1000", True),
    ("train.accumulation=2", True),
    ("optimizer.learning_rate=1e-4", True),
    ("schedule.kind=linear", True),
    ("mesh.tensor=2", True),
    ("mesh.zero=1", True),
    ("model.remat={policy: full}", True),
    ("model.attention_implementation=reference", True),
    ("loss.chunk_tokens=128", True),
    ("precision.compute=bfloat16", True),
    ("checkpoint.every=7", True),
    ("metrics.log_every=7", True),
    ("evaluation.every=7", True),
    ("distributed.num_processes=2", True),
    ("data.prefetch=8", True),
    ("data.workers=1", True),
    ("name=moved", True),
]


@pytest.mark.parametrize(("override", "allowed"), CHANGES)
def test_a_resumed_run_may_change_this_and_not_that(override, allowed):
    old = load_config("quickstart")
    new = load_config("quickstart", [override])
    assert diff(old, new)
    if allowed:
        check_resume(old.model_dump(mode="json"), new)
        return
    with pytest.raises(CheckpointError) as caught:
        check_resume(old.model_dump(mode="json"), new)
    (name, before, after), *_ = diff(old, new)
    assert f"{name}: the checkpoint has {before!r}, the config {after!r}" in str(caught.value)
    assert "run_dir" in str(caught.value)


def test_resuming_knows_configs_of_other_versions():
    config = load_config("quickstart")
    old = config.model_dump(mode="json")
    del old["model"]["qk_norm"]
    check_resume(old, config)
    with pytest.raises(CheckpointError, match=r"model\.qk_norm: the checkpoint has 'none', the config 'head'"):
        check_resume(old, load_config("quickstart", ["model.qk_norm=head"]))
    old["model"]["mixture_of_experts"] = True
    with pytest.raises(CheckpointError, match=r"model\.mixture_of_experts"):
        check_resume(old, config)
