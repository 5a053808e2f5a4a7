"""What a run writes down of itself: one step late, whole, and once."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.errors import ConfigError, StorageError
from maxlm.training.metrics import Metrics, MetricsConfig, ProfileConfig, Profiler, to_json
from maxlm.training.progress import WIDTH, Console, Progress, short_number, short_time

STANDARD_NAMES = [
    "step",
    "tokens",
    "loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "model_flops_per_second_per_device",
    "mfu",
    "data_wait_seconds",
    "skipped_steps",
]
QUIET = {"progress": "none", "tensorboard": False}


def make(run_dir: Path, *, log_every: int = 1, total_steps: int = 100, **changes) -> Metrics:
    arguments = {
        "tokens_per_step": 1000,
        "model_flops_per_token": 6e6,
        "peak_flops_per_device": 1e12,
        "n_devices": 4,
        "total_steps": total_steps,
    }
    config = MetricsConfig(log_every=log_every, **{**QUIET, **changes.pop("config", {})})
    return Metrics(run_dir, config, **{**arguments, **changes})


def values(step: int, **changes) -> dict:
    numbers = {"loss": np.float32(10 / step), "grad_norm": np.float32(1.0), "learning_rate": np.float32(3e-4)}
    return {**numbers, "skipped_steps": np.int32(0), **changes}


def strict_lines(run_dir: Path) -> list[dict]:
    def refuse(token: str):
        raise AssertionError(f"{token} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


class Scalar:
    """A device scalar that notes when it is turned into a number, which is when the host would wait for the device."""

    def __init__(self, value: float, name: str, events: list[str]):
        self.value, self.name, self.events = value, name, events

    def copy_to_host_async(self) -> None:
        self.events.append(f"copy {self.name}")

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.events.append(f"wait {self.name}")
        return np.asarray(self.value, np.float32)


def test_record_waits_for_the_step_before_and_never_for_the_one_just_dispatched(tmp_path):
    events: list[str] = []
    metrics = make(tmp_path)
    for step in (1, 2, 3):
        events.append(f"dispatch {step}")
        metrics.record(step, {"loss": Scalar(1.0, f"{step}", events)})
    assert events == [
        *("dispatch 1", "copy 1"),
        *("dispatch 2", "copy 2", "wait 1"),
        *("dispatch 3", "copy 3", "wait 2"),
    ]
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2]
    metrics.flush()
    assert events[-1] == "wait 3"
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3]


def test_other_processes_keep_pace_but_write_nothing(tmp_path):
    events: list[str] = []
    metrics = make(tmp_path / "run", main=False, config={"tensorboard": True, "progress": "lines"})
    metrics.record(1, {"loss": Scalar(1.0, "1", events)})
    metrics.record(2, {"loss": Scalar(1.0, "2", events)})
    metrics.record_eval(2, {"eval_loss": 1.0})
    metrics.close()
    assert events == ["copy 1", "copy 2", "wait 1", "wait 2"]
    assert not (tmp_path / "run").exists()


def test_a_line_has_the_names_that_other_tools_rely_on_in_order_and_then_the_rest(tmp_path):
    with make(tmp_path) as metrics:
        metrics.record(1, values(1, z_loss=np.float32(0.5)))
        metrics.record_eval(1, {"eval_loss": 2.5, "eval_bits_per_byte": 1.25})
    train, evaluation = strict_lines(tmp_path)
    assert list(train) == [*STANDARD_NAMES, "z_loss"]
    assert evaluation == {"step": 1, "tokens": 1000, "eval_loss": 2.5, "eval_bits_per_byte": 1.25}


def test_rates_follow_from_the_time_between_the_ends_of_steps(tmp_path, monkeypatch):
    clock = iter([10.0, 10.5, 12.5, 12.5])
    monkeypatch.setattr("maxlm.training.metrics.time.perf_counter", lambda: next(clock))
    metrics = make(tmp_path)
    metrics.mark()  # at 10
    metrics.record(1, values(1), data_wait_seconds=0.25)
    metrics.record(2, values(2))  # step 1 ended at 10.5
    metrics.flush()  # step 2 ended at 12.5
    first, second = strict_lines(tmp_path)
    assert first["step_seconds"] == 0.5
    assert first["tokens_per_second"] == 2000.0
    assert first["tokens_per_second_per_device"] == 500.0
    assert first["model_flops_per_second_per_device"] == 500 * 6e6
    assert first["mfu"] == 500 * 6e6 / 1e12
    assert first["data_wait_seconds"] == 0.25
    assert (second["step_seconds"], second["tokens_per_second"], second["data_wait_seconds"]) == (2.0, 500.0, 0.0)


def test_step_seconds_is_the_mean_since_the_last_line_and_leaves_pauses_out(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("maxlm.training.metrics.time.perf_counter", lambda: now[0])
    metrics = make(tmp_path, log_every=4)
    metrics.mark()
    for step, ends in ((1, 1.0), (2, 2.0), (3, 4.0)):
        metrics.record(step, values(step), data_wait_seconds=0.5)
        now[0] = ends
        metrics.flush()
    now[0] = 104.0  # an evaluation of 100 seconds
    metrics.record_eval(3, {"eval_loss": 1.0})
    metrics.record(4, values(4), data_wait_seconds=0.5)
    now[0] = 107.0
    metrics.flush()
    first, _, last = strict_lines(tmp_path)
    assert (first["step"], first["step_seconds"]) == (1, 1.0)
    assert (last["step"], last["step_seconds"], last["data_wait_seconds"]) == (4, 2.0, 1.5)


def test_the_first_step_has_no_time_when_compiling_is_in_it(tmp_path):
    with make(tmp_path) as metrics:
        metrics.record(1, values(1))
        metrics.record(2, values(2))
    first, second = strict_lines(tmp_path)
    assert first["step_seconds"] is None
    assert first["mfu"] is None
    assert second["step_seconds"] > 0


def test_mfu_is_null_where_the_peak_is_not_known(tmp_path):
    with make(tmp_path, peak_flops_per_device=None) as metrics:
        metrics.mark()
        metrics.record(1, values(1))
    (line,) = strict_lines(tmp_path)
    assert line["mfu"] is None
    assert line["tokens_per_second"] > 0


def test_lines_come_at_the_first_step_every_so_many_and_at_the_last(tmp_path):
    with make(tmp_path, log_every=5, total_steps=12) as metrics:
        for step in range(1, 13):
            metrics.record(step, values(step))
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 5, 10, 12]


@given(st.floats(width=32))
def test_equal_text_means_equal_float32_bits(value):
    line = json.loads(to_json({"step": 1, "loss": float(np.float32(value))}))
    if np.isfinite(value):
        assert np.float32(line["loss"]).tobytes() == np.float32(value).tobytes()
    else:
        assert line == {"step": 1, "loss": None, "nonfinite": ["loss"]}


def test_a_number_that_is_not_finite_is_null_and_named(tmp_path):
    with make(tmp_path) as metrics:
        metrics.record(1, values(1, loss=np.float32("nan"), grad_norm=np.float32("inf")))
        metrics.record(2, values(2))
    first, second = strict_lines(tmp_path)
    assert (first["loss"], first["grad_norm"]) == (None, None)
    assert first["nonfinite"] == ["loss", "grad_norm"]
    assert "nonfinite" not in second


def run(run_dir: Path, first: int, last: int, resume_step: int, *, log_every: int = 1) -> None:
    with make(run_dir, resume_step=resume_step, log_every=log_every, total_steps=9) as metrics:
        for step in range(first, last + 1):
            metrics.record(step, values(step))
            if step % 3 == 0:
                metrics.record_eval(step, {"eval_loss": 1.0 / step})


def stable(run_dir: Path) -> list[dict]:
    """The lines without what depends on the clock."""
    timed = {"step_seconds", "mfu", "data_wait_seconds"}
    return [
        {name: value for name, value in line.items() if name not in timed and "per_second" not in name}
        for line in strict_lines(run_dir)
    ]


@pytest.mark.parametrize("log_every", [1, 2])
def test_after_a_resume_every_line_is_there_exactly_once(tmp_path, log_every):
    run(tmp_path / "straight", 1, 9, 0, log_every=log_every)
    run(tmp_path / "resumed", 1, 7, 0, log_every=log_every)
    run(tmp_path / "resumed", 5, 8, 4, log_every=log_every)
    run(tmp_path / "resumed", 4, 9, 3, log_every=log_every)
    assert stable(tmp_path / "resumed") == stable(tmp_path / "straight")


def test_a_torn_last_line_is_dropped(tmp_path):
    run(tmp_path, 1, 5, 0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 5, "tokens": 50')
    run(tmp_path, 6, 9, 5)
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 12))
def test_garbage_in_metrics_jsonl_never_stops_a_resume_nor_stays(tmp_path_factory, garbage, resume_step):
    run_dir = tmp_path_factory.mktemp("run")
    good = b"".join(to_json({"step": step, "loss": 1.0}).encode() + b"\n" for step in range(1, 11))
    (run_dir / "metrics.jsonl").write_bytes(good + garbage)
    with make(run_dir, resume_step=resume_step) as metrics:
        metrics.record(resume_step + 1, values(resume_step + 1))
    steps = [line["step"] for line in strict_lines(run_dir) if "loss" in line]
    assert steps == [*range(1, min(resume_step, 10) + 1), resume_step + 1]


def test_a_kill_while_the_file_is_cut_back_leaves_the_old_file(tmp_path, monkeypatch):
    run(tmp_path, 1, 5, 0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("maxlm.training.metrics.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".metrics")] == []


def events_of(folder: Path) -> list:
    """Every event in the files of a folder, oldest file first (TFRecord: length, crc, bytes, crc)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return events


def test_tensorboard_gets_every_logged_value_and_forgets_what_a_resume_runs_again(tmp_path):
    for resume_step in (0, 2):
        with make(tmp_path, resume_step=resume_step, config={"tensorboard": True}) as metrics:
            for step in range(resume_step + 1, 5):
                metrics.record(step, values(step))
            metrics.record_eval(4, {"eval_loss": 2.0})
    starts = [
        (event.step, event.session_log.status)
        for event in events_of(tmp_path / "tensorboard")
        if event.step and event.HasField("session_log")
    ]
    assert starts == [(1, 1), (3, 1)]
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in events_of(tmp_path / "tensorboard")
        for value in event.summary.value
    }
    assert scalars[(3, "train/loss")] == np.float32(10 / 3)
    assert scalars[(4, "eval/loss")] == 2.0
    assert {step for step, tag in scalars if tag == "train/loss"} == {1, 2, 3, 4}


def test_wandb_without_the_package_is_a_config_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"metrics.wandb is 'mine'.*not installed.*pip install 'maxlm\[wandb\]'"):
        make(tmp_path, config={"wandb": "mine"})


def test_wandb_gets_every_logged_line_and_a_resumed_run_goes_on_with_its_id(tmp_path, monkeypatch):
    """By a stand-in for the package."""
    started, logged, finished = [], [], []

    class Run:
        id = "abc"

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, line):
            logged.append(line)

        def finish(self):
            finished.append(True)

    def init(**keys):
        started.append((keys["project"], keys["name"], keys["id"], keys["resume"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError))
    for first in (1, 3):
        with make(tmp_path / "run", config={"wandb": "mine"}, resume_step=first - 1) as metrics:
            for step in (first, first + 1):
                metrics.record(step, values(step))
    assert started == [("mine", "run", known, "allow") for known in (None, "abc")]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    written = [
        {name: value for name, value in line.items() if value is not None} for line in strict_lines(tmp_path / "run")
    ]
    assert logged == written
    assert len(finished) == 2


def test_a_run_folder_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        make(tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_a_storage_error_that_names_the_file(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with make(tmp_path) as metrics, pytest.raises(StorageError, match=r"log\.txt cannot be written: No space left"):
        metrics.say("hello")
    (tmp_path / "log.txt").unlink()
    metrics = make(tmp_path)
    metrics._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    metrics.record(1, values(1))
    for last_try in (lambda: metrics.record(2, values(2)), metrics.close):
        with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: No space left"):
            last_try()
    assert metrics._file is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_and_elsewhere_lines_that_fit_and_log_txt_has_both(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    for stream in (Terminal(), io.StringIO()):
        run_dir = tmp_path / type(stream).__name__
        console = Console(run_dir, stream=stream)
        skipped = np.int32(1234)
        config = {"progress": "auto"}
        with make(run_dir, console=console, total_steps=1_000_000, config=config) as metrics:
            metrics.say("the mesh: [8, 4]")
            metrics.mark()
            for step in range(1, 10):
                metrics.record(step, values(step, skipped_steps=skipped))
        shown = stream.getvalue()
        assert ("\x1b[" in shown) == isinstance(stream, Terminal)
        assert "the mesh: [8, 4]" in shown
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n")
        assert max(len(line) for line in plain.splitlines()) <= WIDTH
        log = (run_dir / "log.txt").read_text()
        assert "the mesh: [8, 4]" in log
        # Lines at the first step, at powers of two and at the first after ten seconds.
        steps = [int(found.replace(",", "")) for found in re.findall(r"step +([0-9,]+)/1,000,000", log)]
        assert steps == [1, 2, 4, 8]
        assert re.search(r"loss +10\.0000  tokens/s .*MFU .*ETA .*skipped 1,234", log)


def test_the_eta_is_the_steps_left_times_the_seconds_of_one():
    console = Console(stream=io.StringIO())
    progress = Progress(console, "lines", total_steps=100, step=40)
    progress.update(41, {"loss": 1.0}, 2.0)
    assert "ETA    1:58" in console.stream.getvalue()


def test_numbers_and_times_are_shown_short():
    assert [short_number(value) for value in (0, 7, 950, 999.6, 12_345, 1.234e6, 99.96e6, 4.56e10)] == [
        *("0", "7", "950", "1.00k", "12.3k", "1.23M", "100M", "45.6B")
    ]
    assert [short_time(value) for value in (7.4, 754, 11045, 12.125 * 86400)] == ["0:07", "12:34", "3:04:05", "12d 03h"]


def test_the_profiler_traces_the_steps_of_its_window_and_no_others(tmp_path):
    import jax.numpy as jnp

    profiler = Profiler(tmp_path, ProfileConfig(start_step=2, steps=2))
    tracing = []
    for step in range(1, 6):
        profiler.before(step)
        tracing.append(profiler.is_tracing)
        profiler.after(step, jnp.ones(3) * step)
    assert tracing == [False, True, True, False, False]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_resumes_past_the_window_or_has_none_traces_nothing(tmp_path):
    for config, step in ((ProfileConfig(start_step=2, steps=2), 4), (ProfileConfig(start_step=4, steps=0), 4)):
        profiler = Profiler(tmp_path, config)
        profiler.before(step)
        profiler.after(step, None)
        profiler.close()
    assert not (tmp_path / "profile").exists()


def test_peak_memory_holds_what_was_allocated():
    # In a process of its own, where the peak so far is small.
    program = """
import numpy as np
from maxlm.training.metrics import peak_memory_bytes
before = peak_memory_bytes()
block = np.ones(before // 8 + 2**24)  # more than all that was ever held
print(peak_memory_bytes() >= block.nbytes > before > 0)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
