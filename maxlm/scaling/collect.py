"""What the runs of a sweep have come to, read from their folders alone; and the one table of them all."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from maxlm.checkpoint_files import DamagedError, read_manifest
from maxlm.run_lock import NAME as LOCK
from maxlm.scaling.data import train_tokens
from maxlm.scaling.ladder import Ladder, PlannedRun
from maxlm.scaling.table import write_table
from maxlm.training.metrics import METRICS_FILE

State = Literal["waiting", "running", "done", "diverged", "failed"]
TABLE = "runs.csv"
ATTEMPTS = "attempts.jsonl"
"""in a run's folder: a line for each time that `maxlm sweep run` saw it end"""
SILENT_SECONDS = 900.0
"""a run on another machine that has said nothing for so long is taken to be cut off"""


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    run: str
    state: State
    step: int
    steps: int
    loss: float | None
    """held-out, of the last step; None before that"""
    train_loss: float | None
    """the mean over the last tenth of the run so far"""
    bits_per_byte: float | None
    seconds: float
    """of all steps, those of a trunk among them"""
    tokens_per_second: float | None
    seconds_left: float | None
    note: str = ""
    """why it failed or is said to have diverged"""

    @property
    def ended(self) -> bool:
        """Whether there is a final result, good or bad."""
        return self.state in ("done", "diverged")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def progress_of(run: PlannedRun, divergence_rise: float) -> Progress:
    """Reads a run's folder. A run that was cut off is `waiting`: its next start goes on with it."""
    folder = Path(run.config.run_dir)
    lines = read_metrics(folder)
    training = [line for line in lines if "grad_norm" in line]
    last = lines[-1] if lines else {}
    final = next((line for line in lines if "eval_bits_per_byte" in line and line["step"] == run.steps), None)
    loss = final["eval_loss"] if final else None
    step = last.get("step", 0)
    seconds = _seconds(training)
    rate = training[-1].get("tokens_per_second") if training else None
    state, note = _state(run, folder, step)
    if state == "done":
        note = _diverged(training, final, math.log(run.config.model.vocab_size), divergence_rise)
        state = "diverged" if note else "done"
    elif state == "running" and "loss" in last.get("nonfinite", ()):
        note = f"the loss of step {step:,} is not finite"
    left = (run.steps - step) * run.config.train.global_batch_tokens / rate if rate else None
    return Progress(
        run=run.name,
        state=state,
        step=step,
        steps=run.steps,
        loss=loss,
        train_loss=_finite(_mean(_tenths(training)[-1])) if training else None,
        bits_per_byte=final["eval_bits_per_byte"] if final else None,
        seconds=seconds,
        tokens_per_second=rate,
        seconds_left=left if state == "running" else None,
        note=note,
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a torn last one; [] where there is none."""
    try:
        text = (folder / METRICS_FILE).read_text()
    except FileNotFoundError:
        return []
    lines = []
    for line in text.split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:  # half a line, where the machine lost power
            continue
    return lines


def _state(run: PlannedRun, folder: Path, step: int) -> tuple[State, str]:
    if is_saved(folder, run.steps):
        return "done", ""
    if trained_from(folder) is not None:
        return "running", ""
    attempts = read_attempts(folder)
    if attempts and attempts[-1]["exit_code"] != 0:
        return "failed", f"exit code {attempts[-1]['exit_code']}: {attempts[-1]['said']}"
    return "waiting", f"cut off after step {step:,}" if step else ""


def is_saved(folder: Path, step: int) -> bool:
    """Whether a run has a whole checkpoint of a step; that its arrays are intact is checked by whoever reads them."""
    try:
        read_manifest(folder / "checkpoints" / str(step))
    except DamagedError:
        return False
    return True


def trained_from(folder: Path) -> Literal["here", "elsewhere"] | None:
    """Whether a process of this machine or of another trains in a folder just now, by what the run's lock says.

    The lock is tried only where it seems to be held: tried at any time, it could turn away a run that just starts.
    """
    try:
        holder = json.loads((folder / LOCK).read_bytes())
        process, host = int(holder["pid"]), holder["host"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if host == socket.gethostname():
        return "here" if _is_alive(process) and _is_locked(folder / LOCK) else None
    newest = max(path.stat().st_mtime for path in (folder / LOCK, folder / METRICS_FILE) if path.exists())
    return "elsewhere" if time.time() - newest < SILENT_SECONDS else None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _is_locked(path: Path) -> bool:
    """Whether somebody holds a lock: the number of a process that died may be another's by now."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """How the run has ended so far: `exit_code`, `said` (its last words), `ended`."""
    try:
        lines = (folder / ATTEMPTS).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def record_attempt(folder: Path, exit_code: int, said: str) -> None:
    """Adds an end to those of a run."""
    line = {"exit_code": exit_code, "said": said, "ended": time.strftime("%Y-%m-%d %H:%M:%S")}
    with (folder / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _seconds(training: list[dict[str, Any]]) -> float:
    """Seconds of all steps: each line has the mean since the one before it."""
    total, before = 0.0, 0
    for line in training:
        total += (line["step_seconds"] or 0.0) * (line["step"] - before)
        before = line["step"]
    return total


def _tenths(training: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The logged lines in up to ten parts, the last of them full."""
    n = max(1, -(-len(training) // 10))
    return [training[max(0, stop - n) : stop] for stop in range(len(training), 0, -n)][::-1]


def _mean(lines: list[dict[str, Any]]) -> float:
    """The mean cross-entropy of lines, without steps that were skipped for not being finite; NaN where all were."""
    losses = [line["nll"] for line in lines if line["nll"] is not None]
    return sum(losses) / len(losses) if losses else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _diverged(training: list[dict[str, Any]], final: dict[str, Any] | None, uniform: float, rise: float) -> str:
    """Why a run that made all its steps has diverged; empty where it has not."""
    if final is not None and final["eval_loss"] is None:
        return "the held-out loss is not finite"
    if final is not None and final["eval_loss"] >= uniform:
        return f"the held-out loss, {final['eval_loss']:.3f}, is not under {uniform:.3f}, that of guessing"
    means = [_mean(lines) for lines in _tenths(training)]
    if means and not math.isfinite(means[-1]):
        return "the training loss is not finite"
    lowest = min((mean for mean in means if math.isfinite(mean)), default=math.inf)
    if means and means[-1] > lowest + rise:
        return f"the training loss ended at {means[-1]:.3f} and had been {lowest:.3f}, which is over {rise:g} lower"
    return ""


def progress(ladder: Ladder) -> list[Progress]:
    """Where every run of a sweep is, in the grid's order."""
    return [progress_of(run, ladder.sweep.spec.divergence_rise) for run in ladder.runs]


def rows(ladder: Ladder, found: list[Progress]) -> list[dict[str, Any]]:
    """The table of a sweep: a row each run, planned figures and results; results of runs not done are None."""
    unique = train_tokens(ladder.sweep.base.data)
    table = []
    for run, state in zip(ladder.runs, found, strict=True):
        train = run.config.train
        table.append(
            {
                "run": run.name,
                "budget": run.budget,
                "status": state.state,
                "n_params": run.count.total,
                "n_tokens": run.tokens,
                "loss": state.loss if state.ended else None,
                "flops": run.flops,
                "n_params_nonembedding": run.count.non_embedding,
                "n_params_active": run.count.active,
                "unique_tokens": min(unique, run.tokens) if unique else None,
                "learning_rate": run.config.optimizer.learning_rate,
                "batch_tokens": train.global_batch_tokens,
                "seed": train.seed,
                "bits_per_byte": state.bits_per_byte if state.ended else None,
                "seconds": state.seconds,
                "train_loss": state.train_loss if state.ended else None,
                "note": state.note,
            }
        )
    return table


def collect(ladder: Ladder, *, parquet: bool = False) -> list[Progress]:
    """Reads all runs and writes FOLDER/runs.csv anew, and runs.parquet where asked. Raises DataError, StorageError."""
    found = progress(ladder)
    table = rows(ladder, found)
    write_table(ladder.sweep.folder / TABLE, table)
    if parquet:
        write_table((ladder.sweep.folder / TABLE).with_suffix(".parquet"), table)
    return found
