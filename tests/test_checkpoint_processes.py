"""Checkpoints of many processes: one folder, one decision, any number of processes after."""

from __future__ import annotations

import json

import pytest

from maxlm.checkpoint import Checkpoints
from maxlm.checkpoint_files import MANIFEST
from tests.processes import report, run_processes
from tests.test_checkpoint import EIGHT, ONE, abstract, bits, files_of, flip, keys, make_state, mesh_of, saved

MANY = """
import logging, sys
from pathlib import Path
from maxlm.parallel import distributed
distributed.initialize(distributed.DistributedConfig(timeout_seconds=60))
import jax
from maxlm.run_lock import RunLock
from tests.test_checkpoint import *
n = jax.process_count()
mesh = make_mesh(MeshConfig(fsdp=-1, tensor=2 if n > 1 else 1))
"""
SAVES = """
with jax.set_mesh(mesh), RunLock(sys.argv[1]), Checkpoints(sys.argv[1], keys()) as checkpoints:
    for step in (1, 2):
        assert save(checkpoints, step, make_state(mesh, step))
    assert not save(checkpoints, 2, make_state(mesh, 9))
"""
RESTORES = """
logging.basicConfig()
state = make_state(mesh, int(sys.argv[2]))
with jax.set_mesh(mesh), Checkpoints(sys.argv[1], keys()) as checkpoints:
    restored, meta = checkpoints.restore(abstract(state, mesh))
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
    assert meta["step"] == int(sys.argv[2])
    save(checkpoints, 10 + n, restored)
"""


@pytest.mark.processes
def test_a_checkpoint_of_two_processes_is_restored_by_one_and_by_four(tmp_path):
    run_processes(2, ["-c", MANY + SAVES, tmp_path], devices_per_process=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "run.lock"]
    assert not list(tmp_path.rglob("sums.*"))
    # Half of the files are checked by either process; damage to any is everybody's.
    names = files_of(tmp_path / "2")
    assert {"ocdbt.process_0", "ocdbt.process_1"} < {part for name in names for part in name.parts}
    mesh = mesh_of(ONE, 1)
    restored, _ = Checkpoints(tmp_path, keys()).restore(abstract(make_state(mesh), mesh))
    assert bits(restored) == bits(make_state(mesh, 2))
    run_processes(4, ["-c", MANY + RESTORES, tmp_path, "2"], devices_per_process=2)
    restored, meta = Checkpoints(tmp_path, keys()).restore(abstract(make_state(mesh), mesh))
    assert bits(restored) == bits(make_state(mesh, 2))
    assert meta["step"] == 14


@pytest.mark.processes
@pytest.mark.parametrize("share", [0, 1])
def test_damage_that_one_of_two_processes_finds_sends_both_to_the_checkpoint_before(tmp_path, share):
    saved(tmp_path / "c", 1, 2, mesh=mesh_of(EIGHT, 8)).close()
    names = sorted(json.loads((tmp_path / "c" / "2" / MANIFEST).read_bytes())["files"])
    flip(tmp_path / "c" / "2" / names[share], 0)
    outputs = run_processes(2, ["-c", MANY + RESTORES, tmp_path / "c", "1"], devices_per_process=2)
    assert f"2 is damaged ({names[share]} has changed" in outputs[0].stderr, report(outputs[0])
    assert "damaged" not in outputs[1].stderr, report(outputs[1])
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["1", "12", "2.damaged"]


APART = """
folder = Path(sys.argv[1]) / str(jax.process_index())
with jax.set_mesh(mesh), Checkpoints(folder, keys()) as checkpoints:
    save(checkpoints, 1, make_state(mesh))
"""


@pytest.mark.processes
def test_processes_that_do_not_share_the_folder_are_told(tmp_path):
    outputs = run_processes(2, ["-c", MANY + APART, tmp_path], devices_per_process=2, check=False)
    for output in outputs:
        assert output.returncode == 5, report(output)
        assert "in process 1; run_dir must be on a file system that all processes share" in output.stderr
