"""Checkpoints come back bit for bit, on any mesh, or say what is wrong; never with other values."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxlm.checkpoint import CheckpointConfig, Checkpoints, restore_params
from maxlm.checkpoint_files import MANIFEST, write_manifest
from maxlm.errors import CheckpointError, StorageError
from maxlm.parallel.mesh import MeshConfig, make_mesh

ONE, EIGHT = MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)
SPECS = {"table": jax.P("tensor", "fsdp"), "norm": jax.P(), "stack": jax.P(None, ("data", "fsdp"), None)}
SHAPES = {"table": (16, 8), "norm": (8,), "stack": (3, 8, 16)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The kinds of node and leaf that a training state has."""

    params: Any
    opt_state: Any
    step: jax.Array
    rings: tuple[jax.Array, ...]


def mesh_of(config: MeshConfig, n_devices: int) -> jax.sharding.Mesh:
    return make_mesh(config, jax.devices()[:n_devices])


def make_state(mesh: jax.sharding.Mesh, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> State:
    """A state of every kind of leaf, with every bit pattern of bfloat16 that there is among its values."""

    def put(x: np.ndarray, spec: jax.P) -> jax.Array:
        return jax.make_array_from_callback(x.shape, jax.NamedSharding(mesh, spec), lambda index: x[index])

    rng = np.random.default_rng(seed)
    params = {
        "embedding": {"tokens": put(rng.normal(size=shapes["table"]).astype(np.float32), SPECS["table"])},
        "decoder": {"0": {"w": put(np.asarray(rng.normal(size=shapes["stack"]), jnp.bfloat16), SPECS["stack"])}},
        "norm": {"scale": put(np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 1, 2, 3], np.float32), SPECS["norm"])},
    }
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optax.adamw(1e-3).init)(params)
    rng_arrays = [np.asarray(rng.normal(size=4), np.float32) for _ in range(2)]
    return State(
        params=params,
        opt_state=opt_state,
        step=put(np.int32(seed), jax.P()),
        rings=tuple(put(x, jax.P()) for x in (*rng_arrays, np.int32(1))),
    )


def abstract(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """The state's shapes, its shardings moved to `mesh`."""

    def place(x: jax.Array) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if isinstance(x.sharding, jax.NamedSharding) else jax.P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def bits(tree: Any) -> list[bytes]:
    return [f"{x.dtype}{x.shape}".encode() + np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


def keys(**settings: Any) -> CheckpointConfig:
    return CheckpointConfig(**settings)


def saved(folder: Path, *steps: int, mesh: jax.sharding.Mesh | None = None, **settings: Any) -> Checkpoints:
    """Checkpoints of `steps`, each of the state with the step as its seed."""
    mesh = mesh or mesh_of(ONE, 1)
    checkpoints = Checkpoints(folder, keys(**{"keep_last": 9, **settings}))
    for step in steps:
        save(checkpoints, step, make_state(mesh, step))
    checkpoints.wait()
    return checkpoints


def save(checkpoints: Checkpoints, step: int, state: Any, **extra: Any) -> bool:
    return checkpoints.save(step, state, meta={"step": step, "loss": 1.5}, config_yaml=f"name: s{step}\n", **extra)


@pytest.mark.parametrize(
    ("before", "after"), [((ONE, 1), (EIGHT, 8)), ((EIGHT, 8), (ONE, 1)), ((EIGHT, 8), (EIGHT, 8))]
)
def test_a_state_is_restored_bit_for_bit_on_any_mesh(tmp_path, before, after):
    before, after = mesh_of(*before), mesh_of(*after)
    state = make_state(before, 3)
    with jax.set_mesh(before), Checkpoints(tmp_path / "c", keys()) as checkpoints:
        assert save(checkpoints, 3, state)
    want = abstract(state, after)
    with jax.set_mesh(after):
        restored, meta = Checkpoints(tmp_path / "c", keys()).restore(want)
    assert bits(restored) == bits(state)
    assert meta == {"step": 3, "loss": 1.5}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(want), strict=True):
        assert x.sharding == wanted.sharding


def test_what_was_saved_does_not_change_when_the_step_reuses_its_memory(tmp_path):
    mesh = mesh_of(EIGHT, 8)
    state = make_state(mesh, 1)
    want = abstract(state, mesh)
    expected = bits(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keys()) as checkpoints:
        save(checkpoints, 1, state)
        for _ in range(5):
            state = overwrite(state)
        restored, _ = checkpoints.restore(want)
    assert bits(restored) == expected


def test_the_config_and_meta_lie_in_each_checkpoint(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    assert checkpoints.read_config() == "name: s2\n"
    assert checkpoints.read_config(1) == "name: s1\n"
    assert checkpoints.read_meta(1)["step"] == 1
    assert (tmp_path / "1" / "config.yaml").read_text() == "name: s1\n"
    with pytest.raises(CheckpointError, match="7: there is no such checkpoint; the other steps here are 1, 2"):
        checkpoints.read_meta(7)


def test_no_checkpoint_is_not_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "nothing", keys())
    assert checkpoints.steps() == []
    assert checkpoints.restore(abstract(make_state(mesh_of(ONE, 1)), mesh_of(ONE, 1))) is None
    assert not (tmp_path / "nothing").exists()


def test_a_step_is_saved_once_unless_forced(tmp_path):
    mesh = mesh_of(ONE, 1)
    checkpoints = saved(tmp_path, 5)
    other = make_state(mesh, 6)
    assert not save(checkpoints, 5, other)
    assert bits(checkpoints.restore(abstract(other, mesh))[0]) == bits(make_state(mesh, 5))
    assert save(checkpoints, 5, other, force=True)
    assert bits(checkpoints.restore(abstract(other, mesh))[0]) == bits(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5"]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 2}, [50, 60]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 60]),
        ({"keep_last": 1, "at": (30, 70)}, [30, 60]),
        ({"keep_last": 1, "keep_best": 2}, [20, 30, 60]),
        ({"keep_last": 1, "keep_best": 9}, [20, 30, 40, 60]),
    ],
)
def test_the_last_every_so_manieth_and_best_are_kept(tmp_path, settings, kept):
    state = make_state(mesh_of(ONE, 1))
    metrics = {10: None, 20: 2.0, 30: 1.0, 40: 3.0, 50: float("nan"), 60: None}
    with Checkpoints(tmp_path, keys(asynchronous=False, **settings)) as checkpoints:
        for step, metric in metrics.items():
            save(checkpoints, step, state, metric=metric)
        assert checkpoints.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


# Damage.


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "a flip at the start": lambda path: flip(path, 0),
    "a flip in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "a flip at the end": lambda path: flip(path, -1),
    "truncation": truncate,
    "emptying": lambda path: os.truncate(path, 0),
    "deletion": Path.unlink,
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the checkpoints 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("two")
    saved(folder, 1, 2, mesh=mesh_of(EIGHT, 8)).close()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_reported_and_the_checkpoint_before_is_used(two_checkpoints, tmp_path, caplog, damage):
    mesh = mesh_of(ONE, 1)
    want, before = abstract(make_state(mesh), mesh), bits(make_state(mesh, 1))
    names = files_of(two_checkpoints / "2")
    assert {"manifest.json", "meta.json", "config.yaml"} < {str(name) for name in names}
    assert sum("/d/" in str(name) for name in names) >= 3, "the arrays' data is not among the files"
    for i, name in enumerate(names):
        folder = tmp_path / str(i)
        shutil.copytree(two_checkpoints, folder)
        DAMAGES[damage](folder / "2" / name)
        caplog.clear()
        restored, meta = Checkpoints(folder, keys()).restore(want)
        assert bits(restored) == before, f"{damage} of {name}"
        assert meta["step"] == 1
        messages = "\n".join(record.getMessage() for record in caplog.records)
        assert f"{folder}/2 is damaged (" in messages
        assert str(name) in messages
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2.damaged"]
        shutil.rmtree(folder)


def test_every_flipped_byte_of_the_array_data_is_noticed(two_checkpoints, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(two_checkpoints, folder)
    checkpoints = Checkpoints(folder, keys())
    data = max((folder / "2").rglob("*/d/*"), key=lambda path: path.stat().st_size)
    size = data.stat().st_size
    for position in range(0, size, max(1, size // 40)):
        flip(data, position)
        with pytest.raises(CheckpointError, match=f"2 is damaged: .*{data.name} has changed"):
            restore_params(folder, abstract(make_state(mesh_of(ONE, 1)).params, mesh_of(ONE, 1)), step=2)
        flip(data, position)
    assert checkpoints.restore(abstract(make_state(mesh_of(ONE, 1)), mesh_of(ONE, 1)))[1]["step"] == 2


def test_a_step_whose_checkpoint_was_damaged_can_be_saved_again(two_checkpoints, tmp_path):
    folder, mesh = tmp_path / "c", mesh_of(ONE, 1)
    shutil.copytree(two_checkpoints, folder)
    want = abstract(make_state(mesh), mesh)
    for _ in range(2):
        (folder / "2" / "meta.json").unlink()
        with Checkpoints(folder, keys()) as checkpoints:
            assert checkpoints.restore(want)[1]["step"] == 1
            save(checkpoints, 2, make_state(mesh, 7))
    assert bits(Checkpoints(folder, keys()).restore(want)[0]) == bits(make_state(mesh, 7))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "2.damaged", "2.damaged.2"]


def test_when_all_are_damaged_the_run_does_not_begin_anew_by_itself(two_checkpoints, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(two_checkpoints, folder)
    for step in "12":
        truncate(folder / step / "meta.json")
    with pytest.raises(
        CheckpointError, match=r"every checkpoint here is damaged \(2: meta.json has .* 1: meta.json has"
    ):
        Checkpoints(folder, keys()).restore(abstract(make_state(mesh_of(ONE, 1)), mesh_of(ONE, 1)))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_a_damaged_config_is_read_from_the_checkpoint_before(two_checkpoints, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(two_checkpoints, folder)
    flip(folder / "2" / "config.yaml", 3)
    assert Checkpoints(folder, keys()).read_config() == "name: s1\n"
    with pytest.raises(CheckpointError, match=r"2 is damaged: config.yaml has changed"):
        Checkpoints(folder, keys()).read_config(2)


def test_a_manifest_cannot_point_outside_its_checkpoint(two_checkpoints, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(two_checkpoints, folder)
    manifest = json.loads((folder / "2" / MANIFEST).read_bytes())
    del manifest["crc32"]
    manifest["files"]["../1/meta.json"] = manifest["files"].pop("meta.json")
    write_manifest(folder / "2", manifest)
    with pytest.raises(CheckpointError, match="which is outside the checkpoint"):
        restore_params(folder, {}, step=2)


def test_half_written_checkpoints_are_neither_used_nor_kept(two_checkpoints, tmp_path):
    folder, mesh = tmp_path / "c", mesh_of(ONE, 1)
    shutil.copytree(two_checkpoints, folder)
    shutil.copytree(folder / "2", folder / "3.writing")
    shutil.copytree(folder / "2", folder / "0.deleting")
    with Checkpoints(folder, keys()) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(abstract(make_state(mesh), mesh))[1]["step"] == 2
        save(checkpoints, 3, make_state(mesh, 3))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


KILLED_WHILE_SAVING = """
import sys, jax, numpy as np
from maxlm.checkpoint import CheckpointConfig, Checkpoints
state = {"params": {"w": jax.numpy.asarray(np.random.default_rng(0).normal(size=(1 << 22,)))}}
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=2))
for step in range(1, 1000):
    checkpoints.save(step, state, meta={"step": step}, config_yaml="")
    print(step, flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])
def test_what_a_kill_in_the_middle_of_a_save_leaves_is_never_trusted(tmp_path, delay):
    arguments = [sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(3):
            process.stdout.readline()
        time.sleep(delay)
        process.kill()
    mesh = mesh_of(ONE, 1)
    want = {"w": jax.ShapeDtypeStruct((1 << 22,), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))}
    params, meta = restore_params(tmp_path, want)
    assert meta["step"] >= 2
    assert np.array_equal(params["w"], np.random.default_rng(0).normal(size=(1 << 22,)).astype(np.float32))


# Checkpoints of something else.


def test_another_shape_dtype_or_tree_is_refused_by_name(tmp_path):
    mesh = mesh_of(ONE, 1)
    checkpoints = saved(tmp_path, 1)
    wide = make_state(mesh, shapes=SHAPES | {"table": (32, 8)})
    differs = r"params.embedding.tokens is float32\[16, 8\] in the checkpoint and float32\[32, 8\] in this run"
    with pytest.raises(CheckpointError, match=differs):
        checkpoints.restore(abstract(wide, mesh))
    state = abstract(make_state(mesh), mesh)
    norm = state.params["norm"]
    norm["bias"] = norm.pop("scale")
    with pytest.raises(
        CheckpointError, match=r"norm.bias float32\[8\] is not in the checkpoint; params.norm.scale .* not in"
    ):
        checkpoints.restore(state)
    state = abstract(make_state(mesh), mesh)
    scale = state.params["norm"]["scale"]
    state.params["norm"]["scale"] = jax.ShapeDtypeStruct(scale.shape, jnp.bfloat16, sharding=scale.sharding)
    with pytest.raises(CheckpointError, match=r"params.norm.scale is float32\[8\] .* and bfloat16\[8\] in this run"):
        checkpoints.restore(state)
    assert checkpoints.steps() == [1]


def test_parameters_are_restored_without_the_optimizer(two_checkpoints):
    mesh = mesh_of(EIGHT, 8)
    state = make_state(mesh, 2)
    params, meta = restore_params(two_checkpoints, abstract(state.params, mesh))
    assert bits(params) == bits(state.params)
    assert meta["step"] == 2
    params, _ = restore_params(two_checkpoints, abstract(state.params, mesh), step=1)
    assert bits(params) == bits(make_state(mesh, 1).params)
    with pytest.raises(CheckpointError, match=r"params.norm.scale float32\[8\] is not in this run"):
        restore_params(two_checkpoints, {k: v for k, v in abstract(state.params, mesh).items() if k != "norm"})


def test_no_checkpoint_to_take_parameters_from_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        restore_params(tmp_path, {})
    with pytest.raises(CheckpointError, match="3: there is no such checkpoint"):
        restore_params(tmp_path, {}, step=3)


# Disks.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_an_error_and_its_checkpoint_is_never_trusted(small_disk):
    mesh = mesh_of(ONE, 1)
    folder = small_disk / "checkpoints"
    checkpoints = saved(folder, 1)
    big = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1 << 20,)).astype(np.float32))}}
    save(checkpoints, 2, big)
    with pytest.raises(StorageError, match=rf"{folder}/2.writing: no space left on device; make room on that disk"):
        checkpoints.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["1"]
    assert save(checkpoints, 3, make_state(mesh, 3)), "the failure is raised once, and the next save works"
    assert checkpoints.restore(abstract(make_state(mesh), mesh))[1]["step"] == 3
    with pytest.raises(StorageError, match="no space left"):
        saved(folder, asynchronous=False).save(4, big, meta={}, config_yaml="")
    assert checkpoints.steps() == [1, 3]


def test_the_failure_of_a_save_in_the_background_is_raised_by_the_next_save(small_disk):
    state = {"params": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1 << 20,)).astype(np.float32))}}
    checkpoints = Checkpoints(small_disk, keys())
    save(checkpoints, 1, state)
    with pytest.raises(StorageError, match="no space left"):
        save(checkpoints, 2, state)
    assert checkpoints.steps() == []
    checkpoints.close()


def test_a_read_only_folder_is_a_storage_error(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    checkpoints = Checkpoints(small_disk / "checkpoints", keys())
    with pytest.raises(
        StorageError, match="read-only file system; the file system is read-only: choose another run_dir"
    ):
        save(checkpoints, 1, make_state(mesh_of(ONE, 1)))


def test_a_path_through_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a directory"):
        save(Checkpoints(tmp_path / "file" / "c", keys()), 1, make_state(mesh_of(ONE, 1)))
