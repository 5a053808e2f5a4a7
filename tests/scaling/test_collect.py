"""Where a run is, and whether it has diverged, by what lies in its folder."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path

import pytest

from maxlm.cli import main
from maxlm.errors import ConfigError
from maxlm.run_lock import RunLock
from maxlm.scaling.collect import collect, progress_of, record_attempt
from maxlm.scaling.jobs import write_config
from maxlm.scaling.ladder import Ladder
from maxlm.scaling.table import read_table
from maxlm.scaling.tables import plan_row, status_row
from tests.scaling import specs


@pytest.fixture
def grid(tmp_path) -> Ladder:
    return specs.ladder(tmp_path / "s.yaml")


def write_metrics(folder: Path, losses: list[float | None], final: float | None = None, steps: int = 0) -> None:
    """A run's metrics of one line a step, and its evaluation at `steps` where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": i + 1, "loss": loss, "nll": loss, "grad_norm": 1.0, "step_seconds": 0.25, "tokens_per_second": 1024.0}
        for i, loss in enumerate(losses)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if steps:
        text += json.dumps({"step": steps, "eval_loss": final, "eval_bits_per_byte": 3.0}) + "\n"
    (folder / "metrics.jsonl").write_text(text)


def save(folder: Path, step: int) -> None:
    """A checkpoint of nothing, with a manifest as a whole one has it."""
    from maxlm.checkpoint_files import write_manifest

    path = folder / "checkpoints" / str(step)
    path.mkdir(parents=True)
    write_manifest(path, {"step": step, "files": {}})


def ended(grid: Ladder, losses: list[float | None], final: float | None):
    """The state of the grid's first run, done with these losses in its last lines."""
    run = grid.runs[0]
    folder = Path(run.config.run_dir)
    write_metrics(folder, losses, final, run.steps)
    save(folder, run.steps)
    return progress_of(run, grid.sweep.spec.divergence_rise)


def test_a_run_is_waiting_then_cut_off_then_done(grid):
    run = grid.runs[0]
    folder = Path(run.config.run_dir)
    state = progress_of(run, 0.5)
    assert (state.state, state.step, state.loss, state.train_loss) == ("waiting", 0, None, None)
    write_metrics(folder, [5.0, 4.0, 3.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 2.')  # torn
    state = progress_of(run, 0.5)
    assert (state.state, state.step, state.note, state.seconds) == ("waiting", 3, "cut off after step 3", 0.75)
    state = ended(grid, [5.0, 4.0, 3.0], 3.5)
    assert (state.state, state.loss, state.train_loss, state.bits_per_byte) == ("done", 3.5, 3.0, 3.0)
    assert collect(grid)[0] == state


def test_a_run_is_running_only_while_its_lock_is_held(grid):
    """The number in a lock file may be another process's by now, after a power cut."""
    run = grid.runs[0]
    folder = Path(run.config.run_dir)
    write_metrics(folder, [5.0, 4.0])
    with RunLock(folder):
        state = progress_of(run, 0.5)
        assert state.state == "running"
        assert state.seconds_left == (run.steps - 2) * run.config.train.global_batch_tokens / 1024
        assert "k" in status_row(state)["tokens/s"]
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": "2020-01-01 00:00:00"}
    (folder / "run.lock").write_text(json.dumps(holder))
    assert progress_of(run, 0.5).state == "waiting"
    (folder / "run.lock").write_text(json.dumps(holder | {"host": "another"}))
    assert progress_of(run, 0.5).state == "running"
    for name in ("run.lock", "metrics.jsonl"):
        os.utime(folder / name, (0, 0))
    assert progress_of(run, 0.5).state == "waiting", "a machine that has been silent for an hour is gone"


@pytest.mark.parametrize(
    ("losses", "final", "note"),
    [
        ([5.0] * 10 + [3.0] * 80 + [3.6] * 10, 3.6, "ended at 3.600 and had been 3.000"),
        ([5.0] * 10 + [None] * 90, 4.0, "training loss is not finite"),
        ([5.0] * 100, None, "held-out loss is not finite"),
        ([5.0] * 100, math.log(384), "is not under 5.951"),
    ],
)
def test_a_run_that_has_diverged_says_how(losses, final, note, grid):
    state = ended(grid, losses, final)
    assert state.state == "diverged"
    assert note in state.note


@pytest.mark.parametrize(
    "losses",
    [
        [5.0] * 50 + [3.0] * 30 + [3.4] * 20,  # as far as a schedule's noise may go
        [5.0] * 10 + [9.0] * 20 + [3.0] * 70,  # a spike that it recovered from
        [5.0] * 95 + [None] + [4.0] * 4,  # a step that was skipped
        [4.0],
    ],
)
def test_noise_recovered_spikes_and_skipped_steps_are_no_divergence(losses, grid):
    assert ended(grid, losses, 4.0).state == "done"


def test_the_last_failure_is_what_marks_a_run(grid):
    run = grid.runs[0]
    folder = Path(run.config.run_dir)
    folder.mkdir(parents=True)
    record_attempt(folder, 5, "disk full")
    state = progress_of(run, 0.5)
    assert (state.state, state.note) == ("failed", "exit code 5: disk full")
    record_attempt(folder, 0, "saved")
    assert progress_of(run, 0.5).state == "waiting"


def test_a_run_that_has_begun_is_not_given_another_config(grid, tmp_path):
    run = grid.runs[0]
    write_config(run)
    other = specs.ladder(tmp_path / "s.yaml", learning_rate={"rule": "power", "value": 3e-3}).runs[0]
    write_config(other)  # nothing has been trained yet
    write_metrics(Path(run.config.run_dir), [5.0])
    write_config(other)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.003 there, 0\.01 now"):
        write_config(run)


def test_status_shows_every_run_and_brings_the_table_up_to_date(grid, tmp_path, capsys):
    ended(grid, [5.0, 4.0], 3.5)
    assert main(["sweep", "status", str(tmp_path / "s.yaml")]) == 0
    shown = capsys.readouterr().out
    assert all(run.name in shown for run in grid.runs)
    assert "1 done, 5 waiting" in shown
    assert read_table(grid.sweep.folder).text["status"] == ["done"] + ["waiting"] * 5
    assert main(["sweep", "status", str(tmp_path / "s.yaml"), "--json"]) == 0
    assert [state["loss"] for state in json.loads(capsys.readouterr().out)] == [3.5] + [None] * 5


def test_watching_ends_when_every_run_has_ended(grid, tmp_path, capsys):
    for i, run in enumerate(grid.runs):
        folder = Path(run.config.run_dir)
        folder.mkdir(parents=True)
        record_attempt(folder, 3, "no data")
        if i == 2:
            write_metrics(folder, [5.0], 4.0, run.steps)
            save(folder, run.steps)
    assert main(["sweep", "status", str(tmp_path / "s.yaml"), "--watch"]) == 0
    assert "5 failed, 1 done" in capsys.readouterr().out


def test_figures_of_the_grid_are_short_enough_for_a_line(grid):
    assert plan_row(grid.runs[0])["params"] == "8.75k"
