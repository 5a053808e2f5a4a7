"""What a run writes down of itself: metrics.jsonl, TensorBoard, Weights & Biases, progress, a profile.

Metrics are handled one step late. `record` is called when step n has been dispatched, and turns the arrays of step n-1
into numbers: the host waits for a step only while the device has the next one to do.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from maxlm.errors import ConfigError, MaxlmError, StorageError
from maxlm.files import write_atomically
from maxlm.section import Section, key
from maxlm.training.progress import Console, Progress

METRICS_FILE = "metrics.jsonl"


class MetricsConfig(Section):
    """What a run writes down of itself, and how often."""

    log_every: int = key(
        10, "a line of metrics.jsonl every so many steps; the first and the last always", unit="steps", ge=1
    )
    tensorboard: bool = key(True, "also write TensorBoard event files, to RUN_DIR/tensorboard")
    wandb: str | None = key(None, "also send the metrics to this Weights & Biases project", min_length=1)
    progress: Literal["auto", "bar", "lines", "none"] = key(
        "auto", "how progress is shown: a bar, plain lines, nothing; auto is a bar on a terminal, else lines"
    )


class ProfileConfig(Section):
    """The window of steps that the JAX profiler traces, to RUN_DIR/profile."""

    start_step: int = key(10, "the first step that is traced, counted from 1", unit="steps", ge=1)
    steps: int = key(0, "how many steps are traced; 0 traces none", unit="steps", ge=0)


class _Pending(NamedTuple):
    step: int
    values: Mapping[str, Any]


class Metrics:
    """Takes the metrics of each step and writes, every `log_every` steps, one line for it.

    Steps count from 1. A logged line has, in this order: `step`, `tokens` (seen so far), `loss`, `grad_norm`,
    `learning_rate`, `step_seconds`, `tokens_per_second`, `tokens_per_second_per_device`,
    `model_flops_per_second_per_device`, `mfu`, `data_wait_seconds`, `skipped_steps`, then whatever else the step gave.

    - `step_seconds` is the mean, over the steps since the last line, of the time from one step's end to the next one's.
      The rates follow from it. All are null on the first line if compiling cannot be told from the step (see `mark`).
    - `data_wait_seconds` is the sum since the last line, `skipped_steps` the count since the run began.
    - A number that is not finite is null, and `nonfinite` lists the names of those.
    - float32 values are written as the float64 of the same value, with as many digits as tell it from its neighbours:
      equal text means equal bits.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: MetricsConfig,
        *,
        tokens_per_step: int,
        model_flops_per_token: float,
        peak_flops_per_device: float | None,
        n_devices: int,
        total_steps: int,
        resume_step: int = 0,
        main: bool = True,
        console: Console | None = None,
    ):
        """Opens the files of the run; those that are there already are cut back to `resume_step`, the last step kept.

        Args:
            tokens_per_step: tokens of the global batch.
            model_flops_per_token: forward and backward, from `models/flops.py`.
            peak_flops_per_device: None if it is not known; then `mfu` is null.
            main: whether this is the process that writes. The others only keep pace.
            console: where to speak; by default standard output and RUN_DIR/log.txt.

        Raises:
            StorageError: `run_dir` cannot be written. ConfigError: `metrics.wandb` without the package.
        """
        self.run_dir = Path(run_dir)
        self.config = config
        self.tokens_per_step = tokens_per_step
        self.model_flops_per_token = model_flops_per_token
        self.peak_flops_per_device = peak_flops_per_device
        self.n_devices = n_devices
        self.total_steps = total_steps
        self.main = main
        self.console = console or Console(self.run_dir, main=main)
        self._pending: _Pending | None = None
        self._clock: float | None = None
        self._seconds = 0.0
        self._n_timed = 0
        self._data_wait = 0.0
        self._file: IO[str] | None = None
        self._sinks: list[Any] = []
        if main:
            self._sinks = _open_sinks(self.run_dir, config, resume_step)
            self._file = _open_metrics_file(self.run_dir / METRICS_FILE, resume_step, self.console)
        self._progress = Progress(self.console, config.progress, total_steps=total_steps, step=resume_step)

    def record(self, step: int, device_metrics: Mapping[str, Any], *, data_wait_seconds: float = 0.0) -> None:
        """Takes the metrics of `step`, just dispatched, and handles those of the step before it.

        `device_metrics` are scalar arrays: `loss`, `grad_norm`, `learning_rate`, `skipped_steps` (a running count) and
        any others. They are not waited for now. `data_wait_seconds` is how long this step waited for its batch.
        """
        for value in device_metrics.values():
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        self._finish_pending()
        self._pending = _Pending(step, device_metrics)
        self._data_wait += data_wait_seconds

    def record_eval(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes an evaluation line: `step`, `tokens`, and `values` (`eval_loss`, `eval_bits_per_byte`)."""
        self.flush()
        if self.main:
            line = {"step": step, "tokens": step * self.tokens_per_step, **_as_numbers(values)}
            self._write(line)
            shown = "  ".join(f"{name} {_short(line[name])}" for name in values)
            self.console.say(f"step {step:,}  {shown}")
        self.mark()

    def flush(self) -> None:
        """Waits for the step in flight and writes what is due, to the disk: for saves, evaluations and the end."""
        self._finish_pending()
        if self._file is not None:
            with _writing(self.run_dir / METRICS_FILE):
                self._file.flush()
                os.fsync(self._file.fileno())
        self.mark()

    def mark(self) -> None:
        """Starts the stop-watch: the next step counts from here.

        `flush` and `record_eval` do so by themselves. Call it after compiling, before the first step, and after a save
        that waited; with no mark before the first step, that step's time is not known and is left out.
        """
        self._clock = time.perf_counter()

    def say(self, message: str) -> None:
        """Prints a message, above the progress bar, and writes it to log.txt."""
        self.console.say(message)

    def close(self) -> None:
        """Flushes and closes every file. Also an end by an error calls it: then the step in flight is given up."""
        try:
            if sys.exc_info()[0] is None:
                self.flush()
        finally:
            for sink in self._sinks:
                sink.close()
            self._sinks = []
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
                self._file = None
            self.console.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if exc_info[0] is not None:
            self._pending = None
        self.close()

    def _finish_pending(self) -> None:
        """Waits for the pending step, takes its time, shows it, and writes its line if one is due."""
        if self._pending is None:
            return
        step, device_values = self._pending
        self._pending = None
        # Every process waits, so that none runs ahead of its devices; only the first one writes.
        values = _as_numbers(device_values)
        now = time.perf_counter()
        seconds = None if self._clock is None else now - self._clock
        self._clock = now
        if seconds is not None:
            self._seconds += seconds
            self._n_timed += 1
        if not self.main:
            return
        line = self._line(step, values, self._seconds / self._n_timed if self._n_timed else None)
        self._progress.update(step, line, seconds)
        if step % self.config.log_every == 0 or step in (1, self.total_steps):
            self._write(line)
            self._seconds, self._n_timed, self._data_wait = 0.0, 0, 0.0

    def _line(self, step: int, values: dict[str, Any], step_seconds: float | None) -> dict[str, Any]:
        rate = self.tokens_per_step / step_seconds if step_seconds else None
        per_device = rate / self.n_devices if rate is not None else None
        flops = per_device * self.model_flops_per_token if per_device is not None else None
        peak = self.peak_flops_per_device
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "loss": values.pop("loss", None),
            "grad_norm": values.pop("grad_norm", None),
            "learning_rate": values.pop("learning_rate", None),
            "step_seconds": step_seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": per_device,
            "model_flops_per_second_per_device": flops,
            "mfu": flops / peak if flops is not None and peak else None,
            "data_wait_seconds": self._data_wait,
            "skipped_steps": int(values.pop("skipped_steps", 0)),
        }
        return {**line, **values}

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            with _writing(self.run_dir / METRICS_FILE):
                # One write a line, so that a kill leaves whole lines.
                self._file.write(to_json(line) + "\n")
                self._file.flush()
        for sink in self._sinks:
            sink.write(line)


def to_json(line: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl. A float that is not finite becomes null and is named under `nonfinite`."""
    nonfinite = [name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
    safe = {name: None if name in nonfinite else value for name, value in line.items()}
    if nonfinite:
        safe["nonfinite"] = nonfinite
    return json.dumps(safe, allow_nan=False)


def _as_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Scalar arrays to Python numbers, waiting for them; integers stay integers, all else becomes a float."""
    import numpy as np

    numbers = {}
    for name, value in values.items():
        array = np.asarray(value)
        numbers[name] = int(array) if array.dtype.kind in "iub" else float(array)
    return numbers


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an OSError into a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise StorageError(f"{path} cannot be written: {why}. Make room, or choose another run_dir.") from error


def _open_metrics_file(path: Path, resume_step: int, console: Console) -> IO[str]:
    """Opens metrics.jsonl to append, after cutting what a run that resumes at `resume_step` will write again.

    Lines of later steps go, and so do lines that are not whole (a disk that was full, a machine that lost power).
    The file is replaced in one rename, so a kill in between leaves the old one.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = path.read_bytes().split(b"\n")
            kept = [line for line in before if _step_of(line, path) <= resume_step]
            after = b"".join(line + b"\n" for line in kept)
            if after != b"\n".join(before):
                write_atomically(path, after)
                n_cut = sum(1 for line in before if line) - len(kept)
                console.log(f"{path.name}: {n_cut} lines after step {resume_step} were taken out; they come again")
        return path.open("a", encoding="utf-8")


def _step_of(line: bytes, path: Path) -> float:
    """The step of a line of metrics.jsonl; infinity for one that is empty or damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _open_sinks(run_dir: Path, config: MetricsConfig, resume_step: int) -> list[Any]:
    sinks: list[Any] = []
    if config.wandb is not None:
        sinks.append(_Wandb(run_dir, config.wandb))
    if config.tensorboard:
        sinks.append(_TensorBoard(run_dir / "tensorboard", resume_step))
    return sinks


class _TensorBoard:
    """Event files, in the records of tensorboardX but written in place.

    Its SummaryWriter hands them to a thread: a full disk would end the thread, and the run would wait on its queue.
    """

    def __init__(self, folder: Path, resume_step: int):
        from importlib import import_module

        from tensorboardX.event_file_writer import EventsWriter

        # protobuf makes these classes when it is imported, where no type checker sees them.
        event_pb2 = import_module("tensorboardX.proto.event_pb2")
        self.folder = folder
        self._event = event_pb2.Event
        self._summary = import_module("tensorboardX.proto.summary_pb2").Summary
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The name has the time in seconds; the suffix keeps a quick restart from writing over the file before it.
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}.{resume_step}")
            # A session that starts at a step makes the viewer forget what earlier files hold from that step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._events.write_event(event_pb2.Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def write(self, line: dict[str, Any]) -> None:
        scalars = [
            self._summary.Value(tag=_tag(name), simple_value=value)
            for name, value in line.items()
            if name != "step" and value is not None
        ]
        event = self._event(wall_time=time.time(), step=line["step"], summary=self._summary(value=scalars))
        with _writing(self.folder):
            self._events.write_event(event)
            self._events.flush()

    def close(self) -> None:
        with _writing(self.folder):
            self._events.close()


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


class _Wandb:
    """A Weights & Biases run, named after the run folder, where its id is kept: a resumed run goes on with it."""

    def __init__(self, run_dir: Path, project: str):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"metrics.wandb is {project!r}, but the package wandb is not installed. "
                "Install it with `pip install 'maxlm[wandb]'`, or set metrics.wandb=null."
            ) from error
        id_file = run_dir / "wandb_id.txt"
        with _writing(id_file):
            run_dir.mkdir(parents=True, exist_ok=True)
            known = id_file.read_text().strip() if id_file.exists() else ""
            try:
                self.run = wandb.init(
                    project=project, name=run_dir.resolve().name, dir=str(run_dir), id=known or None, resume="allow"
                )
            except wandb.Error as error:
                raise MaxlmError(
                    f"Weights & Biases did not start (metrics.wandb is {project!r}): {error} "
                    "Log in with `wandb login`, keep it local with WANDB_MODE=offline, or set metrics.wandb=null."
                ) from error
            id_file.write_text(f"{self.run.id}\n")
        # The run's own step is the axis: W&B's counter refuses to go back, as a resumed run does.
        self.run.define_metric("*", step_metric="step")

    def write(self, line: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in line.items() if value is not None})

    def close(self) -> None:
        self.run.finish()


class Profiler:
    """Traces the steps of a window with `jax.profiler`, to RUN_DIR/profile (for XProf, TensorBoard or Perfetto)."""

    def __init__(self, run_dir: str | Path, config: ProfileConfig):
        self.folder = Path(run_dir) / "profile"
        self.first = config.start_step
        self.last = config.start_step + config.steps - 1
        self.is_tracing = False

    def before(self, step: int) -> None:
        """Call it before step `step` is dispatched. A run that resumes inside the window traces what is left of it."""
        if not self.is_tracing and self.first <= step <= self.last:
            import jax

            jax.profiler.start_trace(str(self.folder))
            self.is_tracing = True

    def after(self, step: int, device_metrics: Any) -> bool:
        """Call it after step `step` was dispatched. At the window's end it waits for that step, and returns True."""
        if not self.is_tracing or step < self.last:
            return False
        import jax

        jax.block_until_ready(device_metrics)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that is still going, as when the run ends within the window."""
        if self.is_tracing:
            import jax

            self.is_tracing = False
            jax.profiler.stop_trace()


def peak_memory_bytes() -> int:
    """The most memory used so far, of this process's fullest device; of the process itself on a CPU."""
    import jax

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if peaks:
        return max(peaks)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
