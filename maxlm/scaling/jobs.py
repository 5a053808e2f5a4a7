"""One run of a sweep as a process: `maxlm train` in the run's folder, its output kept, its end written down."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from maxlm.checkpoint_files import read_manifest
from maxlm.config import diff, load_config, to_yaml
from maxlm.errors import ConfigError, StorageError
from maxlm.files import write_atomically
from maxlm.scaling.collect import is_saved, read_metrics, record_attempt
from maxlm.scaling.ladder import Ladder, PlannedRun
from maxlm.training.metrics import METRICS_FILE

OUTPUT = "output.txt"
"""in a run's folder: what its processes said, errors too"""
LINKING = ".linking"
SAID_LINES = 3
"""last lines of the output that are kept of a run that failed"""


def write_config(run: PlannedRun) -> None:
    """Writes a run's config.yaml into its folder, for whoever trains it: the sweep, a scheduler, a person.

    Raises ConfigError where the folder has a run of another config that has begun.
    """
    folder = Path(run.config.run_dir)
    path = folder / "config.yaml"
    if path.is_file():
        before = load_config(path)
        changed = diff(before, run.config)
        if not changed:
            return
        if read_metrics(folder) or (folder / "checkpoints").exists():
            listed = "".join(f"\n  {name}: {then!r} there, {now!r} now" for name, then, now in changed)
            raise ConfigError(
                f"{folder}: this run has begun with other settings than the sweep now gives it:{listed}\nPut the old "
                "ones back, or take another folder (folder)."
            )
    write_atomically(path, to_yaml(run.config))


def begin_from_trunk(run: PlannedRun, trunk: PlannedRun) -> None:
    """Gives a branch its trunk's checkpoint, as hard links where the disk has them, and its trunk's metrics up to it.

    A branch that has a checkpoint already is left as it is. Raises StorageError.
    """
    here, there = Path(run.config.run_dir), Path(trunk.config.run_dir)
    checkpoints = here / "checkpoints"
    if any(path.name.isdecimal() for path in checkpoints.glob("*")):
        return
    source, linking = there / "checkpoints" / str(run.begins), checkpoints / f"{run.begins}{LINKING}"
    read_manifest(source)
    lines = (line for line in read_metrics(there) if line["step"] <= run.begins)
    write_atomically(here / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(linking, ignore_errors=True)
        try:
            shutil.copytree(source, linking, copy_function=os.link)
        except (OSError, shutil.Error):
            shutil.rmtree(linking, ignore_errors=True)
            shutil.copytree(source, linking)
        linking.rename(checkpoints / str(run.begins))
    except (OSError, shutil.Error) as error:
        raise StorageError(f"{checkpoints}: the checkpoint of {trunk.name} cannot be copied here: {error}") from error


def is_ready(run: PlannedRun, ladder: Ladder) -> bool:
    """Whether a run can start: a branch only when its trunk has saved the step where it begins."""
    return run.trunk is None or is_saved(Path(ladder.run(run.trunk).config.run_dir), run.begins)


class Job:
    """A run that is being trained by a process of ours."""

    def __init__(self, run: PlannedRun, slot: int, n_slots: int, environment: dict[str, str]):
        """Starts it, in a session of its own: an interrupt from the terminal comes to it through us alone."""
        self.run, self.slot = run, slot
        self.folder = Path(run.config.run_dir)
        self.stopped = False
        self._log_begins = (self.folder / OUTPUT).stat().st_size if (self.folder / OUTPUT).exists() else 0
        with (self.folder / OUTPUT).open("ab") as output, _cores(slot, n_slots):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "maxlm.cli", "train", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment | devices_of(slot, n_slots),
                start_new_session=True,
            )

    def stop(self) -> None:
        """Asks the run to save and leave."""
        if not self.stopped and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.stopped = True

    def poll(self) -> int | None:
        """The exit code once the run has ended, which is then written down; None before."""
        code = self.process.poll()
        if code == -signal.SIGTERM and self.stopped:
            code = 0  # stopped before it was far enough to have anything to save
        if code is not None:
            record_attempt(self.folder, code, self.last_words())
        return code

    def last_words(self) -> str:
        """The last lines that this process said."""
        with (self.folder / OUTPUT).open("rb") as output:
            output.seek(self._log_begins)
            text = output.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-SAID_LINES:])


def devices_of(slot: int, n_slots: int) -> dict[str, str]:
    """The share of a slot in the GPUs that CUDA_VISIBLE_DEVICES names; {} where it names none, or fewer than slots."""
    visible = [name for name in re.split(r"\s*,\s*", os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()) if name]
    if n_slots == 1 or len(visible) < n_slots:
        return {}
    share = len(visible) // n_slots
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[slot * share : (slot + 1) * share])}


class _cores:  # noqa: N801
    """While it is open, what is started gets the slot's share of this process's cores (Linux)."""

    def __init__(self, slot: int, n_slots: int):
        self.before: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        share = len(self.before) // n_slots
        self.mine = set(sorted(self.before)[slot * share : (slot + 1) * share]) if n_slots > 1 and share else None

    def __enter__(self) -> None:
        if self.mine:
            os.sched_setaffinity(0, self.mine)

    def __exit__(self, *_: object) -> None:
        if self.mine:
            os.sched_setaffinity(0, self.before)
