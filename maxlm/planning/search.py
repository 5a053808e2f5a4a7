"""The search for a mesh, a remat policy and a number of microbatches: many by arithmetic, a few by the compiler.

Every combination that the code allows is priced by the roofline, in memory and in time. What cannot fit or cannot be
fastest goes. Of the rest the most promising are compiled one after the other, each choice knowing what came of those
before; the plans of those that fit are ranked by predicted time. Compilations are kept (`planning/cache.py`), and
the order of choices depends on nothing else, so a search that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from maxlm.errors import ConfigError
from maxlm.files import write_atomically
from maxlm.planning.candidates import (
    SLACK,
    Candidate,
    Plan,
    Shortlist,
    bias_of,
    changes,
    corrected_bytes,
    remat_name,
    required_bytes,
    shortlisted,
)
from maxlm.planning.hardware import GIB
from maxlm.planning.topology import Topology

if TYPE_CHECKING:
    from maxlm.config import RunConfig


# At most so many of one mesh are compiled, and so many that differ only in how `data` and `fsdp` share the devices,
# while others wait: the rest would be near-copies.
A_MESH = A_KIND = 2


@dataclass(frozen=True)
class Trial:
    """A candidate that was planned: its plan, or why there is none."""

    candidate: Candidate
    plan: Plan | None
    failed: str | None = None

    @property
    def fits(self) -> bool:
        return self.plan is not None and bool(self.plan["fits"])

    @property
    def step_seconds(self) -> tuple[float, float] | None:
        """The predicted range, best and worst, of one that fits."""
        return tuple(self.plan["prediction"]["step_seconds"]) if self.plan is not None and self.fits else None

    @property
    def rank_by(self) -> tuple[float, float]:
        """The middle of the predicted range, then its worst; infinite for one that does not fit."""
        best, worst = self.step_seconds or (math.inf, math.inf)
        return (best + worst) / 2, worst


@dataclass(frozen=True)
class SearchResult:
    """What a search found: every plan it made, the best first."""

    config: RunConfig
    source: str
    """the config as it was named: a file or a preset"""
    overrides: tuple[str, ...]
    topology: Topology
    shortlist: Shortlist
    trials: tuple[Trial, ...]
    """those that fit by predicted time, then those that do not"""

    @property
    def best(self) -> Trial | None:
        """The fastest that fits, if any does."""
        return self.trials[0] if self.trials and self.trials[0].fits else None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        rows = [self._row(trial, i + 1) for i, trial in enumerate(self.trials)]
        return {
            "config": self.source,
            "overrides": list(self.overrides),
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "accelerator": self.topology.accelerator,
            "devices": self.topology.n_devices,
            "capacity_bytes": self.topology.hbm_bytes_per_device,
            "slack": SLACK,
            "considered": self.shortlist.considered,
            "refused": self.shortlist.refused,
            "too_large": self.shortlist.too_large,
            "slower": self.shortlist.slower,
            "compiled": len(self.trials),
            "ranking": rows,
            "best": rows[0] if self.best else None,
            "best_plan": self.best.plan if self.best else None,
        }

    def _row(self, trial: Trial, rank: int) -> dict[str, Any]:
        candidate, plan = trial.candidate, trial.plan or {}
        prediction = (plan.get("prediction") or {}) if trial.fits else {}
        return {
            "rank": rank if trial.fits else None,
            "label": candidate.label,
            "own": candidate.own,
            "changes": changes(self.config, candidate.config),
            "mesh": dict(candidate.sizes),
            "zero": candidate.config.mesh.zero,
            "remat": remat_name(candidate.config.model.remat),
            "accumulation": candidate.config.train.accumulation,
            "fits": trial.fits,
            "required_bytes": required_bytes(trial.plan),
            "step_seconds": list(trial.step_seconds) if trial.step_seconds else None,
            **{name: prediction.get(name) for name in ("tokens_per_second", "mfu", "bound", "basis")},
            "roofline": {
                "step_seconds": list(candidate.roofline.step_seconds),
                "memory_bytes": candidate.memory_bytes,
            },
            "failed": trial.failed,
        }


def search(
    config: RunConfig,
    topology: Topology,
    *,
    plan_one: Callable[[RunConfig], Plan],
    source: str | Path,
    overrides: Sequence[str] = (),
    compile_best: int = 8,
    progress: bool = True,
) -> SearchResult:
    """Looks for the fastest way to run a config on a topology, and plans the `compile_best` most promising ones.

    Args:
        plan_one: makes the plan of a config; see `maxlm.plan.make_plan`. It should not look for relief.
        source: the name that the config was loaded by, which `write_config` extends; `overrides` likewise.
        progress: shows a bar on standard error, if that is a terminal.

    The config as it was given is planned first where it can run, so that the others have something to be compared with.

    Raises ConfigError where no mesh suits the model and the batch, and the first error where every plan failed.
    """
    shortlist = shortlisted(config, topology)
    trials: list[Trial] = []
    errors: list[Exception] = []
    with _bar(compile_best, progress) as show:
        while len(trials) < compile_best:
            candidate = next_candidate(shortlist.pool, trials, compile_best, topology.hbm_bytes_per_device)
            if candidate is None:
                break
            show(len(trials), candidate, min(trials, key=lambda trial: trial.rank_by, default=None))
            try:
                trials.append(Trial(candidate, plan_one(candidate.config)))
            except Exception as error:  # compilers refuse in many ways; one refusal must not lose the other plans
                errors.append(error)
                trials.append(Trial(candidate, None, failed=f"{type(error).__name__}: {_first_line(error)}"))
    if errors and len(errors) == len(trials):
        raise errors[0]
    trials.sort(key=lambda trial: (*trial.rank_by, trial.failed is not None, required_bytes(trial.plan) or 0))
    return SearchResult(config, str(source), tuple(overrides), topology, shortlist, tuple(trials))


def next_candidate(pool: Sequence[Candidate], trials: Sequence[Trial], budget: int, capacity: int) -> Candidate | None:
    """Which candidate to plan after those that were: the fastest that is still worth it, or None.

    Where one of a mesh did not fit, larger ones of that mesh are not tried, and where one fitted, slower ones are not.
    Near-copies of those that were tried (`A_MESH`, `A_KIND`, only another `mesh.zero`) wait for the others. The
    roofline's memory is corrected by what the compiler said so far; of those that then seem too large by no more than
    `SLACK`, a quarter of the budget is tried. When half of it is spent and nothing fits, speed gives way to surety.
    """
    if not trials and pool and pool[0].own:
        return pool[0]
    done = {trial.candidate.choice for trial in trials}
    left = [c for c in pool if c.choice not in done and not any(_settles(trial, c) for trial in trials)]
    if not left:
        return None
    biases = [bias_of(t.candidate, size) for t in trials if (size := required_bytes(t.plan)) is not None]
    bias = median(biases) if biases else 1.0
    if 2 * len(trials) >= budget and not any(trial.fits for trial in trials):
        sure = [c for c in left if corrected_bytes(c, bias) <= capacity * (1 - SLACK)]
        return min(sure, key=lambda c: c.seconds) if sure else min(left, key=lambda c: c.memory_bytes)
    remats = {(t.candidate.mesh, t.candidate.config.model.remat) for t in trials}
    tries, kinds = [t.candidate.mesh for t in trials], [t.candidate.kind for t in trials]
    n_unsure = sum(corrected_bytes(t.candidate, bias) > capacity for t in trials)
    limit = capacity * (1 + SLACK if 4 * n_unsure < budget else 1)
    likely = [c for c in left if corrected_bytes(c, bias) <= limit]
    fresh = [
        c
        for c in likely
        if tries.count(c.mesh) < A_MESH
        and kinds.count(c.kind) < A_KIND
        and (c.mesh, c.config.model.remat) not in remats
    ]
    return min(fresh or likely or left, key=lambda c: (c.seconds, c.memory_bytes))


def _settles(trial: Trial, candidate: Candidate) -> bool:
    """Whether what came of one says enough of another one of the same mesh."""
    if trial.failed is not None:
        return trial.candidate.mesh == candidate.mesh
    if trial.candidate.placement != candidate.placement:
        return False
    if trial.fits:
        return candidate.seconds >= trial.candidate.seconds
    return candidate.memory_bytes >= trial.candidate.memory_bytes


def write_config(result: SearchResult, path: str | Path) -> None:
    """Writes the best that was found as a config that extends the original one, for `maxlm train` and `maxlm plan`.

    It has the original's name, the overrides that were given and the keys that were chosen. Raises ConfigError where
    nothing fits or the file is the original one, StorageError where it cannot be written.
    """
    from maxlm.config_file import dump, extended_as, find

    path = Path(path)
    if result.best is None:
        raise ConfigError(f"nothing that was planned fits {result.topology.name}; there is no config to write")
    original = find(result.source)
    if path.exists() and path.samefile(original):
        raise ConfigError(f"{path}: is the config that was searched from; give the new one another name")
    tree = {"extends": extended_as(original, path), "name": result.config.name}
    write_atomically(path, _header(result, result.best) + dump(tree | _written_keys(result, result.best)))


def _written_keys(result: SearchResult, best: Trial) -> dict[str, Any]:
    """The keys of the overrides and of the choices, nested, with their values in the best config."""
    from maxlm.config_file import nested
    from maxlm.config_keys import flatten

    leaves = flatten(best.candidate.config)
    wanted = set(changes(result.config, best.candidate.config))
    for text in result.overrides:
        name = text.partition("=")[0].strip()
        # An override may name a section, or reach into a list, which is one leaf.
        wanted |= {leaf for leaf in leaves if f"{leaf}.".startswith(f"{name}.") or f"{name}.".startswith(f"{leaf}.")}
    return nested({leaf: leaves[leaf] for leaf in leaves if leaf in wanted})


def _header(result: SearchResult, best: Trial) -> str:
    topology = result.topology
    slices, of_slices = (f" --slices {n}", f"{n} slices of ") if (n := topology.slices) > 1 else ("", "")
    command = " ".join([f"maxlm plan {result.source} --topology {topology.name}{slices} --search", *result.overrides])
    low, high = best.step_seconds or (math.nan, math.nan)
    basis = (best.plan or {})["prediction"]["basis"]
    required = required_bytes(best.plan) or 0
    lines = (
        f"Found by `{command}`: the fastest that fits, by prediction, of {len(result.trials)} planned "
        f"and {result.shortlist.considered:,} considered.",
        f"Topology: {of_slices}{topology.name} ({topology.accelerator}, {topology.n_devices} devices)",
        f"Choice: {best.candidate.label}",
        f"Predicted step time: {low:.4g} to {high:.4g} s ({basis})",
        f"Predicted memory: {required / GIB:.2f} of {topology.hbm_bytes_per_device / GIB:.2f} GiB a device",
    )
    return "".join(f"# {line}\n" for line in lines)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[int, Candidate, Trial | None], None]]:
    """A bar on standard error, where that is a terminal; gives the function that moves it."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda done, candidate, best: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=total)

        def show(done: int, candidate: Candidate, best: Trial | None) -> None:
            so_far = f"  (best so far {best.rank_by[0]:.3g} s)" if best is not None and best.fits else ""
            bar.update(task, completed=done, description=candidate.label + so_far)

        yield show
