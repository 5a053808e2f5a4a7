"""The step planned is the step run, and the compilers are found or asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from maxlm.config import load_config
from maxlm.plan import make_plan
from maxlm.planning.compile import (
    CompilerMissingError,
    heap_bytes,
    lower_on,
    program_hash,
    require_compiler,
    topology_devices,
)
from maxlm.planning.hardware import CHIPS
from maxlm.planning.topology import parse_topology
from maxlm.planning.xla_options import OPTIONS
from tests import runs, tiny
from tests.processes import ROOT

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
SMALL = ("model.n_layers=2", "model.d_model=128", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=256",
         "model.head_dim=64", "model.vocab_size=512", "train.seq_len=256",
         "train.global_batch_tokens=4096")  # fmt: skip


@pytest.mark.processes
def test_the_step_planned_is_the_step_run(tmp_path: Path):
    store = runs.make_store(tmp_path)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    path = runs.write_config(tmp_path / "run.yaml", store, tmp_path / "run", mesh=mesh, train={"steps": 5})
    command = [sys.executable, "-m", "maxlm.cli", "train", str(path), "--simulate-devices", "8"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    ran = json.loads((tmp_path / "run" / "run.json").read_text())["program_sha256"]
    planned, _ = lower_on(load_config(str(path)), jax.devices()[:8])
    assert program_hash(planned) == ran


def test_another_step_has_another_hash():
    def hash_of(**sections):
        return program_hash(lower_on(tiny.config(**sections), jax.devices()[:2])[0])

    assert hash_of() == hash_of()
    assert hash_of() != hash_of(train={"accumulation": 2})
    assert hash_of() != hash_of(mesh={"fsdp": 1, "tensor": 2})


@pytest.mark.skipif(bool(importlib.util.find_spec("jax_cuda12_plugin")), reason="the CUDA compiler is installed")
def test_without_its_compiler_a_plan_says_how_to_install_it_and_the_roofline_answers():
    topology = parse_topology("h100:2x8")
    with pytest.raises(CompilerMissingError, match=r"h100:2x8 needs .* pip install 'maxlm\[cuda12\]'"):
        require_compiler(topology)
    plan = make_plan(load_config("llama-20m", ["train.global_batch_tokens=65536"]), topology)
    assert plan["compiled"] is None
    assert "maxlm[cuda12]" in plan["not_compiled_because"]
    assert plan["fits"]
    assert 0 < plan["prediction"]["step_seconds"][0] <= plan["prediction"]["step_seconds"][1]
    assert plan["prediction"]["basis"] == "roofline"


def test_every_option_is_of_a_known_chip_and_has_its_reason():
    assert set(OPTIONS) <= {chip.name for chip in CHIPS}
    assert all(option.reason for options in OPTIONS.values() for option in options.values())


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x2", "v5e:4x8", "v5e-256", "v5p-128", "v5p:2x4x4", "v6e:8x8", "tpu7x-128"])
def test_every_topology_has_its_devices(name: str):
    topology = parse_topology(name)
    devices = topology_devices(topology)
    assert len(devices) == topology.n_devices
    assert {device.device_kind for device in devices} <= set(topology.chip.device_kinds)


@needs_libtpu
def test_slices_are_spread_by_the_first_axis_that_they_divide():
    config = load_config("llama-20m", ["mesh.data=2", "mesh.fsdp=16", "train.global_batch_tokens=65536"])
    _, mesh = lower_on(config, topology_devices(parse_topology("v5e:4x4", 2)))
    by_data = mesh.devices.reshape(2, 16)
    assert [{device.slice_index for device in replica} for replica in by_data] == [{0}, {1}]


@needs_libtpu
def test_a_step_that_does_not_fit_names_the_buffers_and_the_lines_that_made_them(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("MAXLM_CACHE", str(tmp_path))
    large = ("model.n_layers=64", "model.d_model=1024", "model.remat.policy=full", "train.global_batch_tokens=4194304")
    config = load_config("llama-20m", [*SMALL, *large])
    ran_out = make_plan(config, parse_topology("v5e:2x2"), relief=False)["out_of_memory"]
    assert ran_out["used"] > ran_out["capacity"] == pytest.approx(15.75 * 2**30)
    largest = ran_out["buffers"]
    kept = 64 * 2 * 2**20 * 1024  # the input of every layer, bfloat16, of a quarter of the tokens
    assert (largest[0]["bytes"], largest[0]["kind"]) == (kept, "activations")
    assert largest[0]["source"].startswith("maxlm/models/block.py:")


def test_the_heap_is_of_the_devices_own_memory():
    assignment = """BufferAssignment:
allocation 0: size 8208384, color 1, parameter 0, shape |f32[128256,16]| at ShapeIndex {}, maybe-live-out:
 value: <3430 param.61 @0> (size=29360128,offset=0): f32[32,16,14336]{2,1,0:T(8,128)}
allocation 258: size 9330852352, preallocated-temp:
 value: <140 add.1046 @0> (size=512,offset=0): s32[]{:T(128)}
allocation 262: size 109051904, color 1, preallocated-temp:
"""
    assert heap_bytes(assignment) == 9330852352


@needs_libtpu
@pytest.mark.processes
def test_two_plans_at_once_do_not_fight_and_the_second_time_nothing_is_compiled(tmp_path: Path):
    command = [sys.executable, "-m", "maxlm.cli", "plan", "llama-20m", "--topology", "v5e:2x2", "--json", *SMALL]
    environment = {**os.environ, "MAXLM_CACHE": str(tmp_path), "LIBTPU_INIT_ARGS": ""}

    def plans(n: int) -> list[dict]:
        kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, cwd=ROOT, env=environment, **kept) for _ in range(n)]
        outputs = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0] * n, outputs
        return [json.loads(output) for output, _ in outputs]

    one, other = plans(2)
    assert one["compiled"]["cycles"]["total"] == other["compiled"]["cycles"]["total"] > 0
    assert one["compiled"]["memory"] == other["compiled"]["memory"]
    assert {each["kind"] for each in one["compiled"]["collectives"]} >= {"all-gather"}
    memory = one["compiled"]["memory"]
    live = sum(one["compiled"]["memory_by_kind"].values())
    # In so small a program the gaps between buffers are as large as they are; in a large one live is 0.99 of the heap.
    assert 0.95 * live < memory["argument"] + memory["heap"]
    assert memory["heap"] <= memory["temp"]
    assert one["fits"]
    (again,) = plans(1)
    # Equal to the microsecond: it is the first compilation's time.
    assert again["compiled"]["compile_seconds"] in (each["compiled"]["compile_seconds"] for each in (one, other))
