"""Sweeps of real processes: interrupted and gone on with, branched off a trunk, failed, diverged, under a scheduler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxlm.scaling.collect import collect, progress, read_attempts
from maxlm.scaling.jobs import OUTPUT
from maxlm.scaling.sweep import plan
from maxlm.scaling.table import read_table
from tests import runs
from tests.processes import ROOT, environment, run_processes
from tests.scaling import specs

pytestmark = pytest.mark.processes

# A size in two lengths, the shorter branching off the longer, and another size.
KEYS = {
    "sizes": [3.7e3, 8.7e3],
    "tokens_per_parameter": [1, 2],
    "overrides": {"schedule": {"kind": "wsd"}},
    "decay": {"branches": True, "fraction": 0.3},
}


def start(spec: Path, *flags: str) -> subprocess.Popen[str]:
    """`maxlm sweep run` as a process of its own, two runs at once."""
    command = [sys.executable, "-m", "maxlm.cli", "sweep", "run", str(spec), "--jobs", "2", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(spec: Path, *flags: str, code: int = 0) -> str:
    process = start(spec, *flags)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def wait_for_step(folder: Path, step: int) -> None:
    """Until some run under `folder` has logged so many steps."""
    deadline = time.monotonic() + 120
    while not any(len(runs.training_lines(path.parent)) >= step for path in folder.glob("*/metrics.jsonl")):
        assert time.monotonic() < deadline, [path.read_text() for path in folder.glob("*/output.txt")]
        time.sleep(0.01)


def kill_a_run(folder: Path) -> None:
    """Kills one of the processes that hold a run's lock under `folder`."""
    holders = [lock.read_text().strip() for lock in sorted(folder.glob("*/run.lock"))]
    os.kill(next(json.loads(holder)["pid"] for holder in holders if holder), signal.SIGKILL)


def results(folder: Path) -> list[dict]:
    """The rows of a sweep's table, without what is measured by the clock."""
    table = read_table(folder)
    columns = {
        name: [repr(float(value)) for value in values] for name, values in table.columns.items() if name != "seconds"
    }
    columns |= table.text
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return runs.make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """A sweep that ran from beginning to end."""
    spec = specs.write(tmp_path_factory.mktemp("undisturbed") / "spec.yaml", store=store, **KEYS)
    finish(spec, "--parquet")
    return spec


def test_a_sweep_makes_ordinary_run_folders_and_one_table_of_them(undisturbed):
    ladder = plan(undisturbed)
    folder = ladder.sweep.folder
    assert {path.name for path in folder.iterdir() if (path / "config.yaml").exists()} == {r.name for r in ladder.runs}
    table = read_table(folder)
    assert len(table) == 4
    assert table.text["status"] == ["done"] * 4
    for i, run in enumerate(ladder.runs):
        final = runs.evaluation_lines(folder / run.name)[-1]
        assert (final["step"], final["eval_loss"]) == (run.steps, table.columns["loss"][i])
        assert table.columns["flops"][i] == run.flops
        assert (table.columns["n_params"][i], table.columns["n_tokens"][i]) == (run.count.total, run.tokens)
    # Longer is better for either size.
    longer, shorter = table.columns["loss"][::2], table.columns["loss"][1::2]
    assert (longer < shorter).all()
    parquet = read_table(folder / "runs.parquet")
    assert parquet.columns["loss"].tolist() == table.columns["loss"].tolist()
    assert "nothing" not in finish(undisturbed), "a finished sweep starts no run"


def test_a_branch_is_bit_for_bit_the_run_that_was_never_branched(undisturbed, tmp_path):
    branch = plan(undisturbed).runs[3]
    assert branch.trunk is not None
    folder = Path(branch.config.run_dir)
    run_processes(1, runs.command(folder, f"run_dir={tmp_path / 'alone'}"))
    assert len(runs.training_lines(folder)) == branch.steps
    assert specs.losses(folder) == specs.losses(tmp_path / "alone")
    # It really began at its trunk's checkpoint.
    assert f"after step {branch.begins}" in (folder / "log.txt").read_text()


def test_a_sweep_that_was_stopped_and_then_killed_goes_on_to_the_same_table(store, undisturbed, tmp_path):
    spec = specs.write(tmp_path / "spec.yaml", store=store, **KEYS)
    folder = tmp_path / "sweep"
    process = start(spec)
    wait_for_step(folder, 3)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "saved and stopped after step" in said
    assert not (folder / "runs.csv").read_text().count("done")

    process = start(spec)
    wait_for_step(folder, 30)
    process.kill()
    process.wait()
    kill_a_run(folder)  # the other one outlives its sweep
    time.sleep(0.5)
    assert {each.state for each in progress(plan(spec))} != {"done"}

    assert "goes on after step" in finish(spec)
    assert results(folder) == results(plan(undisturbed).sweep.folder)
    for run in plan(undisturbed).runs:
        assert specs.losses(folder / run.name) == specs.losses(Path(run.config.run_dir))


def test_a_failed_run_is_tried_as_often_as_said_marked_and_started_again_by_the_next_command(store, tmp_path):
    keys = {**KEYS, "sizes": [3.7e3], "retries": 1}
    spec = specs.write(tmp_path / "spec.yaml", store=tmp_path / "elsewhere", **keys)
    said = finish(spec, code=1)
    assert "failed, exit code 3" in said
    assert "started again (1 of 1)" in said
    assert "is not started: d8-l1-t2, which it branches off, has no checkpoint" in said
    run = plan(spec).runs[0]
    folder = Path(run.config.run_dir)
    assert [attempt["exit_code"] for attempt in read_attempts(folder)] == [3, 3]
    state, branch = collect(plan(spec))
    assert branch.state == "failed"
    assert (state.state, state.loss) == ("failed", None)
    assert "elsewhere" in state.note
    row = results(tmp_path / "sweep")[0]
    assert (row["status"], row["loss"], row["note"]) == ("failed", "nan", state.note)
    (tmp_path / "elsewhere").symlink_to(store)
    said = finish(spec)
    assert "failed before (exit code 3" in said
    assert [row["status"] for row in results(tmp_path / "sweep")] == ["done", "done"]
    assert (folder / OUTPUT).read_text().count("error:") == 2


@pytest.fixture(scope="module")
def scripts(store, tmp_path_factory):
    """An array job of one run, whose learning rate no model survives; and a scontrol that notes its calls."""
    folder = tmp_path_factory.mktemp("slurm")
    keys = {"sizes": [3.7e3], "tokens_per_parameter": [2], "learning_rate": {"rule": "power", "value": 30.0}}
    specs.write(folder / "spec.yaml", store=store, **keys)
    called = ["--jobs", "7", "--render", "slurm", str(folder / "job"), "--sbatch=--gpus=8"]
    finish(folder / "spec.yaml", *called)
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.txt\n')
    scontrol.chmod(0o755)
    return folder


def test_a_rendered_array_job_is_a_task_a_run_and_proper_bash(scripts):
    for name in ("prepare.sbatch", "runs.sbatch", "submit.sh"):
        subprocess.run(["bash", "-n", scripts / "job" / name], check=True)
    array = (scripts / "job" / "runs.sbatch").read_text()
    assert "#SBATCH --array=0-0%7\n" in array
    assert "#SBATCH --gpus=8\n" in array


def test_a_task_that_is_out_of_time_saves_and_is_queued_again_and_its_divergence_is_marked(scripts):
    env = environment() | {
        "PATH": f"{scripts}/bin:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "42"
    }  # fmt: skip
    subprocess.run(["bash", scripts / "job" / "prepare.sbatch"], cwd=ROOT, env=env, check=True)
    task = subprocess.Popen(["bash", scripts / "job" / "runs.sbatch"], cwd=ROOT, env=env)
    wait_for_step(scripts / "sweep", 2)
    task.terminate()
    task.wait(120)
    assert (scripts / "scontrol.txt").read_text() == "requeue 42_0\n"
    (state,) = progress(plan(scripts / "spec.yaml"))
    assert state.state == "waiting"
    assert 2 <= state.step < state.steps
    subprocess.run(["bash", scripts / "job" / "runs.sbatch"], cwd=ROOT, env=env, check=True, timeout=120)
    (row,) = results(scripts / "sweep")
    assert row["status"] == "diverged"
    (state,) = progress(plan(scripts / "spec.yaml"))
    assert "loss" in state.note
