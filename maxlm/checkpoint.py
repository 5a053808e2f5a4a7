"""Checkpoints over Orbax: asynchronous save, retention, resume, falling back to the last good one.

A checkpoint is written as `STEP.writing` and renamed to `STEP` when all of it is there:

    STEP/state/          Orbax (OCDBT, zarr3): every array of the state under its dotted name, in pieces by device
    STEP/meta.json       what the run says of it
    STEP/config.yaml     the resolved config
    STEP/manifest.json   shape and dtype of every array; size and CRC-32 of every file

Of the array data OCDBT checks only its index: a flipped bit in a chunk comes back as another number. So every file is
checked against the manifest before it is read. Nothing is compressed: of trained float32 zstd takes 8% away, and makes
saving four to six times as slow, loading three times.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from maxlm.checkpoint_files import (
    DamagedError,
    describe_array,
    read_manifest,
    read_verified,
    remove,
    storage_error,
    sum_files,
    verify_files,
    write_manifest,
)
from maxlm.errors import CheckpointError, MaxlmError, StorageError
from maxlm.files import write_synced
from maxlm.parallel.distributed import barrier, broadcast_json, gather_json, is_main
from maxlm.section import Section, key

T = TypeVar("T")
log = logging.getLogger("maxlm")

STATE, META, CONFIG = "state", "meta.json", "config.yaml"
WRITING, DELETING, DAMAGED = ".writing", ".deleting", ".damaged"
_BARRIER_SECONDS = 1200
_save_numbers = itertools.count()


class CheckpointConfig(Section):
    """When the run is saved, and which of its checkpoints are kept."""

    every: int = key(
        1000, "steps between two saves; the last step and a stop by signal save as well", unit="steps", ge=1
    )
    keep_last: int = key(3, "newest checkpoints that are kept", unit="checkpoints", ge=1)
    keep_every: int | None = key(None, "checkpoints at multiples of this step are kept for ever", unit="steps", ge=1)
    at: tuple[int, ...] = key((), "steps that are saved besides, and kept for ever", unit="steps")
    keep_best: int = key(0, "checkpoints of lowest evaluation loss that are kept besides", unit="checkpoints", ge=0)
    asynchronous: bool = key(True, "write in the background while training goes on")


class Checkpoints:
    """The checkpoints of a run in `folder`. With many processes, all make the same calls on one shared folder.

    Whoever may write holds the run's `RunLock`. An error of a save in the background is raised by the next call.
    """

    def __init__(self, folder: Path | str, config: CheckpointConfig):
        self.folder = Path(os.path.abspath(folder))
        self.config = config
        self._orbax: Any = None
        self._thread: threading.Thread | None = None
        self._failure: MaxlmError | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        import jax

        if kind is None:
            self.close()
        elif self._thread is not None and jax.process_count() == 1:  # others may be gone, and never finish their part
            self._thread.join()

    # Reading.

    def steps(self) -> list[int]:
        """The steps that have a wholly written checkpoint, ascending; whether it is still intact is not looked at."""
        return _steps(self.folder)

    def restore(self, abstract_state: T) -> tuple[T, dict[str, Any]] | None:
        """The state and meta of the newest intact checkpoint, or None where there is none at all.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct` with shardings; the mesh may be another than at the save.
        Damaged checkpoints that are newer are reported, and renamed to `STEP.damaged` so that the step can be saved
        again. Raises CheckpointError when the checkpoint is of another state, or when all there are are damaged.
        """
        self.wait()
        step, damaged = _newest_intact(self.folder)
        if step is None:
            return None
        state = _read(self.folder / str(step), abstract_state, "")
        if is_main():
            for bad in damaged:
                _quarantine(self.folder / str(bad))
        barrier(f"checkpoint {step} restored")
        return state, self.read_meta(step)

    def read_config(self, step: int | None = None) -> str:
        """config.yaml of the checkpoint of `step`, or of the newest where it is intact; else CheckpointError."""
        return _read_text(self.folder, CONFIG, step)

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """meta.json of the checkpoint of `step`, or of the newest where it is intact; else CheckpointError."""
        return json.loads(_read_text(self.folder, META, step))

    # Writing.

    def save(
        self,
        step: int,
        state: Any,
        *,
        meta: Mapping[str, Any],
        config_yaml: str,
        metric: float | None = None,
        force: bool = False,
    ) -> bool:
        """Saves `state`, a pytree of jax arrays, and returns once they are copied: they may then be donated.

        The rest goes on in the background unless `config.asynchronous` is false; a save that is still running is
        waited for. `metric` (lower is better) is what `keep_best` goes by. Where the step is saved already, nothing is
        done and False returned, unless `force`. Raises StorageError where the folder cannot be written.
        """
        import jax
        import orbax.checkpoint as ocp

        self.wait()
        prepared = broadcast_json(self._prepare(step, meta, config_yaml, force) if is_main() else None)
        if "error" in prepared:
            raise StorageError(prepared["error"])
        if prepared["saved"]:
            return False
        writing = self.folder / f"{step}{WRITING}"
        self._check_shared(writing)
        arrays = dict(zip(*_names_and_leaves(state)[:2], strict=True))
        if self._orbax is None:
            _quiet_orbax()
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
            self._orbax = ocp.AsyncCheckpointer(handler)
        try:
            self._orbax.save(writing / STATE, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            remove(writing)
            raise storage_error(writing, error) from error
        if metric is not None and not math.isfinite(metric):
            metric = None
        manifest = {
            "step": step,
            "metric": metric,
            "processes": jax.process_count(),
            "arrays": {name: describe_array(x) for name, x in arrays.items()},
        }
        synchronize = ocp.multihost.get_barrier_sync_fn()
        self._thread = threading.Thread(
            target=self._finish, name=f"checkpoint-{step}", args=(manifest, next(_save_numbers), synchronize)
        )
        self._thread.start()
        if not self.config.asynchronous:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns when no save is running; raises the error of the last one if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Waits for the save that is running, as `wait`, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def _prepare(self, step: int, meta: Mapping[str, Any], config_yaml: str, force: bool) -> dict[str, Any]:
        """Process 0 clears what dead saves left, and starts `STEP.writing`."""
        if not force and (self.folder / str(step)).exists():
            return {"saved": True}
        writing = self.folder / f"{step}{WRITING}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if path.suffix in (WRITING, DELETING) and path.stem.isdecimal():
                    remove(path)
            writing.mkdir()
            write_synced(writing / META, json.dumps(dict(meta), indent=1) + "\n")
            write_synced(writing / CONFIG, config_yaml)
        except OSError as error:
            remove(writing)
            return {"error": str(storage_error(writing, error))}
        return {"saved": False}

    def _check_shared(self, writing: Path) -> None:
        """Raises StorageError, in all processes, where some do not see what process 0 has just made."""
        blind = [i for i, sees in enumerate(gather_json((writing / META).exists())) if not sees]
        if blind:
            raise StorageError(
                f"{self.folder} of process 0 is not the folder of that name in process {', '.join(map(str, blind))}; "
                "run_dir must be on a file system that all processes share"
            )

    def _finish(self, manifest: dict[str, Any], number: int, synchronize: Callable[..., None]) -> None:
        """In the background: waits for the data, sums every file, and makes it a checkpoint by renaming."""
        import jax

        step, me = manifest["step"], jax.process_index()
        writing = self.folder / f"{step}{WRITING}"

        def meet(what: str) -> None:
            synchronize(key=f"maxlm-checkpoint-{number}-{what}", timeout_ms=_BARRIER_SECONDS * 1000)

        try:
            self._orbax.wait_until_finished()
            sums = sum_files(writing, me, jax.process_count())
            if jax.process_count() > 1:
                write_synced(writing / f"sums.{me}", json.dumps(sums))
                meet("summed")
            if me == 0:
                for other in range(1, jax.process_count()):
                    sums |= json.loads((writing / f"sums.{other}").read_bytes())
                for path in writing.glob("sums.*"):
                    path.unlink()
                write_manifest(writing, manifest | {"files": sums})
                self._commit(writing, self.folder / str(step))
                self._retain()
            if jax.process_count() > 1:
                meet("committed")
        except BaseException as error:
            self._failure = storage_error(writing, error)
            self._failure.__cause__ = error
            if me == 0:
                remove(writing)

    def _commit(self, writing: Path, final: Path) -> None:
        if final.exists():  # a forced save
            old = final.with_suffix(DELETING)
            final.rename(old)
            writing.rename(final)
            remove(old)
        else:
            writing.rename(final)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _retain(self) -> None:
        """Deletes what `config` does not keep; a folder is renamed first, so that a half-deleted one is never read."""
        steps, config = self.steps(), self.config
        keep = set(steps[-config.keep_last :]) | set(config.at)
        if config.keep_every:
            keep |= {step for step in steps if step % config.keep_every == 0}
        if config.keep_best:
            metrics = {step: metric for step in steps if (metric := _metric(self.folder / str(step))) is not None}
            keep |= set(sorted(metrics, key=lambda step: (metrics[step], -step))[: config.keep_best])
        for step in steps:
            if step not in keep:
                old = self.folder / f"{step}{DELETING}"
                try:
                    (self.folder / str(step)).rename(old)
                except OSError as error:
                    log.warning("checkpoint %s is to be deleted and cannot be: %s", old.with_suffix(""), error.strerror)
                else:
                    remove(old)


def restore_params(folder: Path | str, abstract_params: T, step: int | None = None) -> tuple[T, dict[str, Any]]:
    """The parameters and meta of the checkpoint of `step`, or of the newest intact one; no optimizer state is read.

    `folder` is a run's `checkpoints` and is not written to. `abstract_params` is a tree of `jax.ShapeDtypeStruct` with
    shardings. Raises CheckpointError where there is no such checkpoint, where it is damaged, or of other parameters.
    """
    folder = Path(os.path.abspath(folder))
    if step is None:
        step, _ = _newest_intact(folder)
        if step is None:
            raise CheckpointError(
                f"{folder}: there is no checkpoint here; train first, or give the folder of another run"
            )
    else:
        _check_step(folder, step)
        if problem := _agreed_problem(folder / str(step)):
            raise CheckpointError(f"{folder / str(step)} is damaged: {problem}{_others(folder, step)}")
    return _read(folder / str(step), abstract_params, "params"), json.loads(_read_text(folder, META, step))


def _steps(folder: Path) -> list[int]:
    try:
        return sorted(int(p.name) for p in folder.iterdir() if re.fullmatch(r"0|[1-9]\d*", p.name) and p.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(folder, error) from error


def _agreed_problem(checkpoint: Path) -> str | None:
    """What is damaged in a checkpoint, or None; every process reads its share of the files, and all get one answer."""
    import jax

    problems = gather_json(verify_files(checkpoint, jax.process_index(), jax.process_count()))
    return next((problem for problem in problems if problem), None)


def _newest_intact(folder: Path) -> tuple[int | None, list[int]]:
    """The newest intact step (None where there is no checkpoint), and the damaged ones after it, which are reported.

    Raises CheckpointError when there are checkpoints and all are damaged: to begin anew is not ours to decide.
    """
    steps = broadcast_json(_steps(folder))
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        problem = _agreed_problem(folder / str(step))
        if problem is None:
            if damaged and is_main():
                for bad, what in damaged.items():
                    log.warning(
                        "checkpoint %s is damaged (%s); going on from %s", folder / str(bad), what, folder / str(step)
                    )
            return step, list(damaged)
        damaged[step] = problem
    if damaged:
        listed = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
        raise CheckpointError(
            f"{folder}: every checkpoint here is damaged ({listed}); mend the files from a copy, or move the folder "
            "away to begin at step 0"
        )
    return None, []


def _check_step(folder: Path, step: int) -> None:
    """Raises CheckpointError where `step` has no checkpoint, naming the steps that have one."""
    if step not in _steps(folder):
        raise CheckpointError(f"{folder / str(step)}: there is no such checkpoint{_others(folder, step)}")


def _others(folder: Path, step: int) -> str:
    others = [str(other) for other in _steps(folder) if other != step]
    return f"; the other steps here are {', '.join(others)}" if others else ""


def _quarantine(checkpoint: Path) -> None:
    numbered = (f"{checkpoint.name}{DAMAGED}{f'.{i}' if i > 1 else ''}" for i in itertools.count(1))
    target = next(path for name in numbered if not (path := checkpoint.with_name(name)).exists())
    try:
        checkpoint.rename(target)
    except OSError as error:
        raise storage_error(checkpoint, error) from error
    log.warning("the damaged checkpoint is kept as %s; delete it when you have no use for it", target)


def _metric(checkpoint: Path) -> float | None:
    try:
        return read_manifest(checkpoint)["metric"]
    except DamagedError:
        return None


def _read_text(folder: Path, name: str, step: int | None) -> str:
    if step is not None:
        _check_step(folder, step)
    problem = "there is no checkpoint here"
    for candidate in [step] if step is not None else reversed(_steps(folder)):
        try:
            return read_verified(folder / str(candidate), name).decode()
        except DamagedError as error:
            problem = f"{candidate} is damaged: {error}"
    raise CheckpointError(f"{folder}: {problem}")


def _names_and_leaves(tree: Any) -> tuple[list[str], list[Any], Any]:
    """The dotted names of the leaves of `tree`, its leaves, and its structure."""
    import jax

    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    if len(set(names)) != len(names):
        raise ValueError("two leaves of the state have one dotted name; a key may not hold a dot")
    return names, [leaf for _, leaf in paths], treedef


def _read(checkpoint: Path, abstract: T, prefix: str) -> T:
    """The part of an intact checkpoint under `prefix` (all of it under ""), on the shardings of `abstract`."""
    import jax
    import orbax.checkpoint as ocp

    names, leaves, treedef = _names_and_leaves(abstract)
    start = f"{prefix}." if prefix else ""
    wanted = {f"{start}{name}": leaf for name, leaf in zip(names, leaves, strict=True)}
    stored = {name: array for name, array in read_manifest(checkpoint)["arrays"].items() if name.startswith(start)}
    _check_fit(checkpoint, stored, {name: describe_array(leaf) for name, leaf in wanted.items()})
    _quiet_orbax()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as orbax:
            arrays = orbax.restore(
                checkpoint / STATE,
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: the files are as they were written, but cannot be read into this run: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    return jax.tree.unflatten(treedef, [arrays[name] for name in wanted])


def _check_fit(checkpoint: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CheckpointError, naming the first arrays that differ between the checkpoint and the run."""
    differences = []
    for name in sorted(stored.keys() | wanted.keys(), key=lambda name: (not name.startswith("params."), name)):
        if name not in stored:
            differences.append(f"{name} {_show(wanted[name])} is not in the checkpoint")
        elif name not in wanted:
            differences.append(f"{name} {_show(stored[name])} is not in this run")
        elif stored[name] != wanted[name]:
            differences.append(
                f"{name} is {_show(stored[name])} in the checkpoint and {_show(wanted[name])} in this run"
            )
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(
            f"{checkpoint} is of another model, optimizer or precision: {'; '.join(differences[:3])}{more}. "
            f"Use the config that it was saved with ({checkpoint / CONFIG}), or another run_dir"
        )


def _show(array: dict[str, Any]) -> str:
    return f"{array['dtype']}{array['shape']}"


class _NotOrbax(logging.Filter):
    """Drops what Orbax logs through absl: its errors reach the user as ours, without stack traces."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


def _quiet_orbax() -> None:
    absl = logging.getLogger("absl")
    if not any(isinstance(item, _NotOrbax) for item in absl.filters):
        absl.addFilter(_NotOrbax())
