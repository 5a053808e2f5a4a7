"""What a run says while it runs: a bar on a terminal, plain lines elsewhere, and all of it in RUN_DIR/log.txt."""

import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from maxlm.errors import StorageError

WIDTH = 100
LINE_EVERY_SECONDS = 10.0


class Console:
    """Where a run speaks: standard output and RUN_DIR/log.txt. On processes other than the first it is silent."""

    def __init__(self, run_dir: Path | None = None, *, main: bool = True, stream: IO[str] | None = None):
        """Appends to `run_dir`/log.txt, making the folder; with None it only prints. StorageError if it cannot."""
        self.main = main
        self.stream = stream if stream is not None else sys.stdout
        self.bar: Bar | None = None
        self._log: IO[str] | None = None
        self._log_path = run_dir / "log.txt" if run_dir is not None else None
        if main and self._log_path is not None:
            try:
                self._log_path.parent.mkdir(parents=True, exist_ok=True)
                self._log = self._log_path.open("a", buffering=1, encoding="utf-8")
            except OSError as error:
                raise StorageError(f"{self._log_path} cannot be written: {error.strerror}") from error

    @property
    def is_terminal(self) -> bool:
        return self.stream.isatty()

    def say(self, message: str) -> None:
        """Prints a message, above the bar if there is one, and writes it to log.txt with the time."""
        if not self.main:
            return
        self.log(message)
        if self.bar is not None:
            self.bar.print(message)
        else:
            print(message, file=self.stream, flush=True)

    def log(self, message: str) -> None:
        """Writes a message to log.txt alone."""
        if self._log is None:
            return
        clock = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            self._log.write("".join(f"{clock}  {line}\n" for line in message.splitlines() or [""]))
        except OSError as error:
            raise StorageError(f"{self._log_path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
            self._log = None


class Progress:
    """The progress of training: a bar, or a line at steps 1, 2, 4, 8, ... and then every few seconds."""

    def __init__(self, console: Console, kind: Literal["auto", "bar", "lines", "none"], *, total_steps: int, step: int):
        """`step` is the last one done: 0, or where a run resumes from."""
        self.console = console
        self.total_steps = total_steps
        self.n_here = 0
        self._last_line = -math.inf
        self._seconds_per_step: float | None = None
        if kind == "auto":
            kind = "bar" if console.is_terminal else "lines"
        self.kind = kind if console.main else "none"
        if self.kind == "bar" and step < total_steps:
            console.bar = Bar(console, step=step, total_steps=total_steps)

    def update(self, step: int, line: dict[str, Any], seconds: float | None) -> None:
        """Shows step `step`, whose metrics are `line` (as in metrics.jsonl) and which took `seconds`."""
        if self.kind == "none":
            return
        self.n_here += 1
        if seconds is not None:
            # A mean that forgets over about 20 steps: steady enough to read, quick enough to follow a change.
            before = self._seconds_per_step
            self._seconds_per_step = seconds if before is None else 0.95 * before + 0.05 * seconds
        shown = self._shown(step, line)
        if self.console.bar is not None:
            self.console.bar.update(step, shown)
        now = time.monotonic()
        is_power = self.n_here & (self.n_here - 1) == 0
        if is_power or step == self.total_steps or now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            width = len(f"{self.total_steps:,}")
            text = "  ".join(
                [f"step {step:>{width},}/{self.total_steps:,}", *(f"{name} {value}" for name, value in shown)]
            )
            if self.kind == "bar":
                self.console.log(text)
            else:
                self.console.say(text)

    def _shown(self, step: int, line: dict[str, Any]) -> list[tuple[str, str]]:
        loss, mfu = line.get("loss"), line.get("mfu")
        rate = line.get("tokens_per_second")
        left = self._seconds_per_step * (self.total_steps - step) if self._seconds_per_step is not None else None
        shown = [
            ("loss", f"{loss:7.4f}" if loss is not None else "    nan"),
            ("tokens/s", f"{short_number(rate):>6}" if rate is not None else "     -"),
            ("MFU", f"{100 * mfu:4.1f}%" if mfu is not None else "    -"),
            ("ETA", f"{short_time(left):>7}" if left is not None else "      -"),
        ]
        if line.get("skipped_steps"):
            shown.append(("skipped", f"{line['skipped_steps']:,}"))
        return shown


class Bar:
    """A live bar of one line, at most 100 columns wide, by rich."""

    def __init__(self, console: Console, *, step: int, total_steps: int):
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichConsole(file=console.stream, highlight=False)
        self._rich.width = min(self._rich.width, WIDTH)
        self._bar = RichProgress(
            TextColumn("[bold]{task.completed:,}[/]/{task.total:,}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}"),
            console=self._rich,
            refresh_per_second=4,  # a redraw takes a millisecond of a core that the run may need
            expand=True,
        )
        self._task = self._bar.add_task(
            "train", total=total_steps, completed=step, shown="[dim]first step: compiling[/]"
        )
        self._bar.start()

    def update(self, step: int, shown: list[tuple[str, str]]) -> None:
        text = "  ".join(f"[dim]{name}[/] {value.strip()}" for name, value in shown)
        self._bar.update(self._task, completed=step, shown=text)

    def print(self, message: str) -> None:
        self._rich.print(message, markup=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


def short_number(value: float) -> str:
    """950, 12.3k, 1.23M, 45.6B: three digits that count."""
    if not math.isfinite(value):
        return str(value)
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{unit}"
    return f"{value:.0f}" if abs(value) >= 99.95 or value == int(value) else f"{value:.3g}"


def short_time(seconds: float) -> str:
    """0:07, 12:34, 3:04:05, 12d 03h."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(round(seconds), 0)
    if whole >= 100 * 3600:
        return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
