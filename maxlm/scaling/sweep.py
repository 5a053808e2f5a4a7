"""A sweep executed: data once, then every run as a process of its own, so many at once, from wherever it stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from maxlm.errors import ConfigError, MaxlmError, StorageError
from maxlm.scaling.collect import TABLE, Progress, collect, progress, progress_of, record_attempt, trained_from
from maxlm.scaling.data import prepare_data
from maxlm.scaling.jobs import Job, begin_from_trunk, is_ready, write_config
from maxlm.scaling.ladder import Ladder, PlannedRun, make_ladder
from maxlm.scaling.spec import load_sweep

POLL_SECONDS = 0.2


def plan(spec: str | Path) -> Ladder:
    """The grid of a specification, a file or a packaged sweep's name. Raises ConfigError."""
    return make_ladder(load_sweep(spec))


def status(spec: str | Path) -> list[Progress]:
    """Where the runs of a sweep are, in the grid's order. Raises ConfigError."""
    return progress(plan(spec))


def run(
    spec: str | Path,
    *,
    jobs: int = 1,
    only: Sequence[int] = (),
    parquet: bool = False,
    say: Callable[[str], None] = print,
) -> list[Progress]:
    """Trains all runs of a sweep that have not ended yet, `jobs` at once; returns where each of its runs is then.

    The same call goes on with a sweep that was cut off at any point. Runs that failed earlier are started again; one
    that fails now `retries` times more. `only` are numbers of tasks (`tasks`), for a scheduler: these runs alone.
    On SIGINT or SIGTERM the runs save and stop, and it returns. Raises MaxlmError where runs have failed, naming them.
    """
    ladder = plan(spec)
    chosen = select(ladder, only)
    with sweep_folder(ladder) as folder:
        for each in ladder.runs:
            write_config(each)
        prepare_data(ladder.sweep.base, say)
    executor = _Executor(ladder, chosen, jobs, _environment(folder, only=bool(only)), say)
    with _stopping(executor):
        executor.run(lambda: collect(ladder))
    found = collect(ladder, parquet=parquet)
    summarise(found, folder, say)
    failed = [each for each in found if each.state == "failed" and each.run in {one.name for one in chosen}]
    if failed and not executor.stopping:
        listed = "".join(f"\n  {each.run}: {each.note}" for each in failed)
        raise MaxlmError(
            f"{len(failed)} of {len(chosen)} runs failed; the same command starts them again, and each one's "
            f"output.txt has what it said:{listed}"
        )
    return found


def tasks(ladder: Ladder) -> list[list[PlannedRun]]:
    """The runs as tasks for a scheduler: one run each, and a trunk with its branches one together."""
    found: dict[str, list[PlannedRun]] = {}
    for run in ladder.runs:
        found.setdefault(run.trunk or run.name, []).append(run)
    return list(found.values())


def select(ladder: Ladder, only: Sequence[int]) -> list[PlannedRun]:
    """The runs of some tasks, numbered from 0; all where none is named. Raises ConfigError for one there is not."""
    numbered = tasks(ladder)
    if wrong := [number for number in only if number >= len(numbered)]:
        raise ConfigError(f"--only {wrong[0]}: there are {len(numbered)} tasks, 0 to {len(numbered) - 1}")
    return [run for number in only for run in numbered[number]] if only else list(ladder.runs)


@contextlib.contextmanager
def sweep_folder(ladder: Ladder) -> Iterator[Path]:
    """The sweep's folder, made, while no other process prepares in it. Raises StorageError."""
    folder = ladder.sweep.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "prepare.lock").open("a")
    except OSError as error:
        raise StorageError(
            f"{folder}: the sweep's folder cannot be written ({error.strerror}); choose another"
        ) from error
    with lock:
        with contextlib.suppress(
            OSError
        ):  # a file system without locks: a scheduler prepares in a job before the others
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def prepare(spec: str | Path, say: Callable[[str], None] = print) -> None:
    """Makes a sweep's folder, its runs' configs, its tokenizer and its token store, and starts no run."""
    ladder = plan(spec)
    with sweep_folder(ladder):
        for each in ladder.runs:
            write_config(each)
        prepare_data(ladder.sweep.base, say)


def summarise(found: Sequence[Progress], folder: Path, say: Callable[[str], None]) -> None:
    """Says how many runs are in which state, and what is wrong with those that have not gone well."""
    counts = {
        state: sum(each.state == state for each in found) for state in dict.fromkeys(each.state for each in found)
    }
    for each in found:
        if each.state == "diverged":
            say(f"{each.run} diverged: {each.note}")
    say(f"{', '.join(f'{count} {state}' for state, count in counts.items())}; their table is {folder / TABLE}")


def _environment(folder: Path, *, only: bool) -> dict[str, str]:
    """The runs' environment. Here they share what the compiler made: of one shape there are often several runs."""
    environment = dict(os.environ)
    if not only:  # a scheduler's machines may have other processors, which do not run each other's code
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str((folder / "compiled").absolute()))
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    return environment


@dataclass
class _Executor:
    """Keeps `jobs` runs going until none is left."""

    ladder: Ladder
    chosen: Sequence[PlannedRun]
    jobs: int
    environment: dict[str, str]
    say: Callable[[str], None]
    stopping: bool = False
    _going: list[Job] = field(default_factory=list)
    _failures: dict[str, int] = field(default_factory=dict)

    def run(self, changed: Callable[[], object]) -> None:
        """Until all have ended, or `stop`. `changed` is called whenever a run has."""
        waiting = self._left()
        while (waiting and not self.stopping) or self._going:
            for job in list(self._going):
                if (code := job.poll()) is not None:
                    self._going.remove(job)
                    if self._ended(job, code) and not self.stopping:
                        waiting.insert(0, job.run)
                    changed()
            if not self.stopping:
                self._start(waiting)
            if self.stopping:
                self.leave()  # one that was just being started when the signal came, too
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Asks all runs to save and stop."""
        self.stopping = True
        self.leave()

    def leave(self) -> None:
        """Asks the runs that are going to save and stop; none is, where `run` returned."""
        for job in self._going:
            job.stop()

    def _left(self) -> list[PlannedRun]:
        left = []
        for run in self.chosen:
            state = self._progress(run)
            if state.ended:
                continue
            left.append(run)
            if state.state == "failed":
                self.say(f"{run.name} failed before ({state.note}); it is started again")
            elif state.state == "running":
                self.say(f"{run.name} is being trained already, at step {state.step:,}")
            elif state.step:
                self.say(f"{run.name} goes on after step {state.step:,}")
        return left

    def _progress(self, run: PlannedRun) -> Progress:
        return progress_of(run, self.ladder.sweep.spec.divergence_rise)

    def _start(self, waiting: list[PlannedRun]) -> None:
        """Fills the slots that are free with the first runs that can start; drops those that others have finished."""
        others = 0
        for run in list(waiting):
            if len(self._going) + others >= self.jobs:
                return
            if (where := trained_from(Path(run.config.run_dir))) is not None:
                # It outlived the sweep that started it, or another sweep has it: it is waited for.
                others += where == "here"
            elif self._progress(run).ended:
                waiting.remove(run)
            elif is_ready(run, self.ladder):
                waiting.remove(run)
                self._start_one(run)
            elif not any(other.name == run.trunk for other in (*waiting, *(job.run for job in self._going))):
                waiting.remove(run)
                self._give_up(run)

    def _give_up(self, run: PlannedRun) -> None:
        """Marks a branch as failed whose trunk has ended without the checkpoint that it begins from."""
        why = f"{run.trunk}, which it branches off, has no checkpoint of step {run.begins:,}"
        record_attempt(Path(run.config.run_dir), 1, why)
        self.say(f"{run.name} is not started: {why}")

    def _start_one(self, run: PlannedRun) -> None:
        if run.trunk is not None:
            begin_from_trunk(run, self.ladder.run(run.trunk))
        slot = min(set(range(self.jobs)) - {job.slot for job in self._going})
        self._going.append(Job(run, slot, self.jobs, self.environment))
        self.say(f"{run.name} started: {run.count.total:,} parameters, {run.steps:,} steps, {run.tokens:,} tokens")

    def _ended(self, job: Job, code: int) -> bool:
        """Says how a run ended; whether it is to be started again."""
        state = self._progress(job.run)
        if state.ended:
            loss = "no held-out text" if state.loss is None else f"held-out loss {state.loss:.4f}"
            self.say(f"{job.run.name} {state.state}: {loss}" + (f" ({state.note})" if state.note else ""))
            return False
        if job.stopped and code == 0:
            self.say(f"{job.run.name} saved and stopped after step {state.step:,}")
            return False
        if code == 0:  # somebody stopped this run alone
            self.say(f"{job.run.name} was stopped after step {state.step:,}; the same command goes on with it")
            return False
        if trained_from(job.folder) is not None:
            self.say(f"{job.run.name} is being trained by another process, and is waited for")
            return True
        failures = self._failures[job.run.name] = self._failures.get(job.run.name, 0) + 1
        retries = self.ladder.sweep.spec.retries
        again = failures <= retries
        more = f"; started again ({failures} of {retries})" if again else ""
        self.say(f"{job.run.name} failed, exit code {code}: {job.last_words()}{more}")
        return again


@contextlib.contextmanager
def _stopping(executor: _Executor) -> Iterator[None]:
    """While it is open, SIGINT and SIGTERM stop the sweep's runs in good order; a second one is as ever."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: FrameType | None) -> None:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        executor.say("stopping: the runs save first; the same command goes on")
        executor.stop()

    for number in handlers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        executor.leave()
        for each, handler in handlers.items():
            signal.signal(each, handler)
