"""Bad input, through the command line: one clear error and its exit code each, and nothing half-written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maxlm.cli import main
from tests import runs


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return runs.make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    config = runs.write_config(
        folder / "tiny.yaml", store, folder / "run", train={"steps": 2}, schedule={"warmup_steps": 0}, mesh=ALL_DEVICES
    )
    assert main(["train", str(config)]) == 0
    return folder


ALL_DEVICES = {"data": 8, "fsdp": 1}


class Scene:
    """A folder of its own with a config, a copy of the store and of the run, for a case to spoil."""

    def __init__(self, folder: Path, store: Path, trained: Path):
        self.folder, self.run = folder, folder / "run"
        shutil.copytree(store, folder / "data")
        shutil.copytree(trained / "run", folder / "old")
        self.config = runs.write_config(folder / "tiny.yaml", folder / "data", self.run, mesh=ALL_DEVICES)

    def edit(self, **sections) -> None:
        """Lays keys over the config file."""
        tree = yaml.safe_load(self.config.read_text())
        for section, keys in sections.items():
            tree[section] = {**tree.get(section, {}), **keys} if isinstance(keys, dict) else keys
        self.config.write_text(yaml.safe_dump(tree))

    def append(self, text: str) -> None:
        """Adds lines to the config file."""
        self.config.write_text(self.config.read_text() + text)


def spoil(path: Path, at: float = 0.5) -> None:
    """Flips a bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 0x08
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def sources(scene: Scene, kind: str, content: bytes, name: str) -> list[str]:
    """`data prepare` of one file of documents."""
    (scene.folder / name).write_bytes(content)
    entry = [{"kind": kind, "paths": [str(scene.folder / name)]}]
    scene.edit(data={"sources": entry, "store": str(scene.folder / "new-store")})
    return ["data", "prepare", str(scene.config)]


def all_checkpoints_damaged(scene: Scene) -> list[str]:
    shutil.copytree(scene.folder / "old", scene.run)
    for checkpoint in (scene.run / "checkpoints").iterdir():
        spoil(largest(checkpoint))
    return ["train", str(scene.config)]


def other_width(scene: Scene) -> list[str]:
    shutil.copytree(scene.folder / "old", scene.run)
    return ["train", str(scene.config), "model.d_ff=96"]


def train(*overrides):
    return lambda scene: ["train", str(scene.config), *overrides]


def after(change, *arguments):
    """A case that spoils the scene and then runs a command; {} in its arguments is the scene's folder."""

    def case(scene: Scene) -> list[str]:
        change(scene)
        return [argument.replace("{}", str(scene.folder)) for argument in (arguments or ("train", "{}/tiny.yaml"))]

    return case


CASES = {
    # name: (what is done, exit code, what the message says)
    "unknown key": (train("model.n_layer=3"), 2, r"model\.n_layer.*did you mean.*model\.n_layers"),
    "unknown section in the file": (after(lambda s: s.append("optimiser: {}\n")), 2, r"tiny\.yaml:\d+.*optimiser"),
    "wrong type": (train("train.steps=many"), 2, r"train\.steps.*many"),
    "yaml that is not": (after(lambda s: s.append("a: [1,\n")), 2, r"tiny\.yaml:\d+"),
    "a config that is not there": (after(lambda s: None, "train", "{}/nothing.yaml"), 2, r"nothing\.yaml"),
    "a preset that is not there": (after(lambda s: None, "train", "llama3-8bb"), 2, r"llama3-8b"),
    "extends in a circle": (after(lambda s: s.append("extends: tiny.yaml\n")), 2, r"tiny\.yaml"),
    "heads that do not divide": (train("model.n_kv_heads=3"), 2, r"n_heads = 4.*n_kv_heads = 3"),
    "a batch of half rows": (train("train.global_batch_tokens=100"), 2, r"global_batch_tokens = 100"),
    "a row longer than the model": (train("train.seq_len=64", "train.global_batch_tokens=512"), 2, r"seq_len.*64"),
    "a pipeline and rows that do not divide": (
        train("mesh.data=4", "mesh.pipeline=2", "pipeline.microbatches=3"), 2, r"pipeline\.microbatches = 3.*rows"
    ),
    "experts without experts": (train("mesh.expert=2"), 2, r"mesh\.expert.*refused"),
    "context": (train("mesh.context=2", "model.attention_implementation=reference"), 2, r"mesh\.context.*refused"),
    "a mesh of too many devices": (train("mesh.data=16"), 6, r"16 devices and there are 8"),
    "a mesh that does not divide the heads": (
        train("mesh.data=1", "mesh.fsdp=1", "mesh.tensor=8"), 2, r"model\.n_heads = 4.*mesh\.tensor = 8"
    ),
    "names without their policy": (train("model.remat.names=[q]"), 2, r"remat"),
    "wandb without wandb": (train("metrics.wandb=project"), 2, r"wandb"),
    "a model smaller than its tokenizer": (train("model.vocab_size=300"), 2, r"model\.vocab_size = 300.*384"),
    "no store": (train("data.store=/nowhere/store"), 3, r"/nowhere/store"),
    "no tokenizer": (train("tokenizer.path=/nowhere/tokenizer"), 3, r"/nowhere/tokenizer"),
    "a damaged manifest": (after(lambda s: spoil(s.folder / "data/store/manifest.json")), 3, r"manifest\.json"),
    "a store without its tokens": (after(lambda s: shutil.rmtree(s.folder / "data/store/train/tokens")), 3, r"tokens"),
    "a damaged tokenizer": (
        after(lambda s: (s.folder / "data/tokenizer/tokenizer.json").write_text("{")), 3, r"tokenizer\.json"
    ),
    "documents of bad utf-8": (lambda s: sources(s, "text", b"\xff\xfe\xfa", "bad.txt"), 3, r"bad\.txt"),
    "lines that are not json": (
        lambda s: sources(s, "jsonl", b'{"text": "ok"}\n{"text": \n', "bad.jsonl"), 3, r"bad\.jsonl:2"
    ),
    "documents that are not there": (
        after(
            lambda s: s.edit(data={"sources": [{"kind": "text", "paths": ["/nowhere"]}], "store": f"{s.folder}/new"}),
            "data", "prepare", "{}/tiny.yaml",
        ), 3, r"/nowhere",
    ),
    "every checkpoint damaged": (all_checkpoints_damaged, 4, r"damaged"),
    "another model than the checkpoint's": (other_width, 4, r"model\.d_ff.*64.*96"),
    "a run that is not one": (after(lambda s: None, "eval", "{}/data"), 4, r"not a run's folder"),
    "a step that was not kept": (
        after(lambda s: None, "eval", "{}/old", "--step", "77"), 4, r"/77: there is no such.*steps here are 2"
    ),
    "an export onto something": (
        after(lambda s: None, "export", "{}/old", "{}/data", "--to", "hf"), 5, r"data"
    ),
    "an import of something else": (after(lambda s: None, "import", "hf:{}/data", "{}/new"), 3, r"config\.json"),
    "a run's folder that is a file": (after(lambda s: s.run.write_text("")), 5, r"run"),
    "a coordinator without a port": (train("distributed.coordinator=here", "distributed.num_processes=2"), 6, r"here"),
}  # fmt: skip


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_has_one_clear_error_and_leaves_nothing_half_written(
    case, store, trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where the extra is not installed
    prepare, code, message = CASES[case]
    scene = Scene(tmp_path, store, trained)
    arguments = prepare(scene)
    before = tree(tmp_path)
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert re.search(message, captured.err, re.DOTALL), captured.err
    # A lock or a log may stay; nothing that a rerun would take for a store, a checkpoint, a run or an export may.
    left = tree(tmp_path) - before
    trusted = {"manifest.json", "config.yaml", "run.json", "metrics.jsonl", "tokenizer.json", "model.safetensors"}
    assert not [path for path in left if Path(path).name in trusted], left
    assert not (tmp_path / "run" / "checkpoints").exists() or "damaged" in case or "another" in case


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", mount]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.fixture
def read_only(small_disk):
    """A file system that cannot be written."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    return small_disk


def test_a_full_disk_ends_the_run_with_one_error_and_no_checkpoint_that_is_trusted(store, small_disk, tmp_path, capsys):
    config = runs.write_config(
        tmp_path / "tiny.yaml", store, small_disk / "run", mesh=ALL_DEVICES, checkpoint={"every": 2, "keep_last": 20}
    )
    assert main(["train", str(config)]) == 5
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert str(small_disk) in error
    for line in runs.lines(small_disk / "run"):
        json.dumps(line)
    # With room again the same command finishes, from whatever was whole.
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert main(["train", str(config)]) == 0
    assert [line["step"] for line in runs.training_lines(small_disk / "run")] == list(range(1, 21))


@pytest.mark.parametrize("command", ["train", "prepare", "tokenizer", "export"])
def test_a_read_only_folder_is_a_storage_error_that_names_it(command, store, trained, read_only, tmp_path, capsys):
    out = str(read_only / "out")
    config = str(runs.write_config(tmp_path / "tiny.yaml", store, Path(out), mesh=ALL_DEVICES))
    arguments = {
        "train": ["train", config],
        "prepare": ["data", "prepare", config, f"data.store={out}", "data.sources=[{kind: python-stdlib}]"],
        "tokenizer": ["tokenizer", "train", config, f"tokenizer.path={out}", "data.sources=[{kind: python-stdlib}]"],
        "export": ["export", str(trained / "run"), out, "--to", "hf"],
    }[command]
    assert main(arguments) == 5
    assert out in capsys.readouterr().err
