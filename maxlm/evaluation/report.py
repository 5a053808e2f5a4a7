"""The page of a run: what was run, how it went, on one HTML file that needs nothing else."""

import json
import math
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml

from maxlm.errors import CheckpointError
from maxlm.evaluation.chart import Series, line_chart
from maxlm.evaluation.report_style import SCRIPT, STYLE
from maxlm.files import write_atomically

Line = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says: each step's line once, by step, and the files beside."""

    run_dir: Path
    train: list[Line]
    evaluations: list[Line]
    n_unreadable: int
    config_text: str
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        name = self.config.get("name")
        return name if isinstance(name, str) and name else self.run_dir.resolve().name


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir`/report.html from what the run left there, and returns its path.

    The page is one file with no network and no library: figures, curves as SVG, samples, the resolved config. Lines of
    metrics.jsonl that are torn or not JSON are left out and counted.

    Raises:
        CheckpointError: `run_dir` is not a run's folder; it names what is missing. StorageError: it cannot be written.
    """
    record = read_run(Path(run_dir))
    path = Path(run_dir) / "report.html"
    write_atomically(path, page(record))
    return path


def read_run(run_dir: Path) -> RunRecord:
    """Reads config.yaml and metrics.jsonl, which must be there, and run.json and samples, which may be."""
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is not a folder. Give the run_dir of a run, such as runs/quickstart.")
    missing = [name for name in ("config.yaml", "metrics.jsonl") if not (run_dir / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{run_dir} is not the folder of a run: it has no {' and no '.join(missing)}. "
            "`maxlm train` writes both; give its run_dir, such as runs/quickstart."
        )
    train, evaluations, n_unreadable = _read_metrics(run_dir / "metrics.jsonl")
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = {}
    return RunRecord(
        run_dir=run_dir,
        train=train,
        evaluations=evaluations,
        n_unreadable=n_unreadable,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        about=_read_json_object(run_dir / "run.json"),
        samples=_read_samples(run_dir),
    )


def _read_metrics(path: Path) -> tuple[list[Line], list[Line], int]:
    train: dict[int, Line] = {}
    evaluations: dict[int, Line] = {}
    n_unreadable = 0
    for text in path.read_bytes().split(b"\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            step = None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
            n_unreadable += 1
        elif "eval_loss" in line:
            evaluations[step] = line
        else:
            train[step] = line
    return [train[step] for step in sorted(train)], [evaluations[step] for step in sorted(evaluations)], n_unreadable


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_samples(run_dir: Path) -> list[tuple[str, str]]:
    """(prompt, continuation) of samples.json: a list of objects with `prompt` and `continuation`; or samples.txt."""
    try:
        found = json.loads((run_dir / "samples.json").read_bytes())
        found = found if isinstance(found, list) else [found]
        pairs = [(each.get("prompt", ""), each.get("continuation", "")) for each in found if isinstance(each, dict)]
        return [(str(prompt), str(continuation)) for prompt, continuation in pairs if prompt or continuation]
    except (OSError, ValueError, RecursionError):
        pass
    try:
        text = (run_dir / "samples.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [("", text)] if text.strip() else []


def page(record: RunRecord) -> str:
    """The HTML of a report."""
    sections = [
        _header(record),
        _tiles(record),
        _notes(record),
        _curves(record),
        _samples(record),
        _evaluations(record),
        _details(record),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(record.name)} · maxlm</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _header(record: RunRecord) -> str:
    about = record.about
    facts = []
    if number(about.get("n_params")) is not None:
        facts.append(f"{count(about['n_params'])} parameters")
    if record.train:
        last = record.train[-1]
        tokens, steps = number(last.get("tokens")), _get(record.config, "train", "steps")
        of = f" of {steps:,}" if isinstance(steps, int) and steps != last["step"] else ""
        facts.append(
            f"{count(tokens)} tokens in {last['step']:,}{of} steps" if tokens else f"{last['step']:,}{of} steps"
        )
    for text in (about.get("devices"), _mesh_text(about.get("mesh"))):
        if text:
            facts.append(str(text))
    joined = " <i>·</i> ".join(escape(fact) for fact in facts)
    return f"<header><p class='brand'>maxlm run</p><h1>{escape(record.name)}</h1><p class='facts'>{joined}</p></header>"


def _mesh_text(mesh: Any) -> str:
    if not isinstance(mesh, dict):
        return ""
    return "mesh " + " × ".join(f"{axis} {size}" for axis, size in mesh.items()) if mesh else "mesh of one device"


def _tiles(record: RunRecord) -> str:
    """The figures at the end of the run; rates are medians, which a pause or the first step do not move."""
    last = record.train[-1] if record.train else {}
    evaluated = record.evaluations[-1] if record.evaluations else {}
    rate, mfu = _median(record.train, "tokens_per_second"), _median(record.train, "mfu")
    seconds = training_seconds(record.train)
    skipped = number(last.get("skipped_steps"))
    tiles = [
        ("held-out loss", figure(evaluated.get("eval_loss"), 4), "nats a token"),
        ("bits per byte", figure(evaluated.get("eval_bits_per_byte"), 4), "held-out text"),
        ("train loss", figure(last.get("loss"), 4), f"at step {last['step']:,}" if last else ""),
        ("tokens a second", count(rate) if rate is not None else "–", "median"),
        ("MFU", f"{100 * mfu:.1f}%" if mfu is not None else "–", "median"),
        ("training time", duration(seconds) if seconds is not None else "–", "sum of steps"),
        ("skipped steps", f"{int(skipped):,}" if skipped is not None else "–", f"of {last['step']:,}" if last else ""),
    ]
    cells = "".join(
        f"<div class='tile'><dt>{escape(name)}</dt><dd>{escape(value)}</dd><p>{escape(note)}</p></div>"
        for name, value, note in tiles
    )
    return f"<dl class='tiles'>{cells}</dl>"


def _notes(record: RunRecord) -> str:
    notes = []
    if not record.train:
        notes.append("No step has been logged yet, so there are no curves.")
    if record.n_unreadable:
        notes.append(f"Lines of metrics.jsonl that could not be read, and are left out: {record.n_unreadable:,}.")
    n_nonfinite = sum(1 for line in record.train if line.get("nonfinite"))
    if n_nonfinite:
        notes.append(f"Logged steps with a value that is not finite, which the curves leave out: {n_nonfinite:,}.")
    return "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)


def _curves(record: RunRecord) -> str:
    if not record.train and not record.evaluations:
        return ""
    losses = [
        Series("train", points(record.train, "loss"), "a"),
        Series("held-out", points(record.evaluations, "eval_loss"), "b", dots=True),
    ]
    charts = [
        line_chart(
            losses,
            title=f"Loss against tokens, {scale} axis",
            format_x=count,
            format_y=lambda y: figure(y, 4),
            format_tick=_plain,
            x_label=f"tokens{' (log scale)' if scale == 'log' else ''}",
            log_x=scale == "log",
            width=940,
            height=340,
        )
        for scale in ("linear", "log")
    ]
    legend = "".join(f"<span class='key {each.color}'>{escape(each.name)}</span>" for each in losses if each.points)
    loss = (
        "<section class='card wide'><input type='checkbox' id='log-x'><h2>Loss <small>nats a token</small></h2>"
        f"<p class='legend'>{legend}<label for='log-x'>log tokens</label></p>"
        f"<div class='linear'>{charts[0]}</div><div class='log'>{charts[1]}</div></section>"
    )
    return f"{loss}<div class='pair'>{''.join(_small_charts(record))}</div>"


def _small_charts(record: RunRecord) -> list[str]:
    norms = points(record.train, "grad_norm")
    positive = [y for _, y in norms if y > 0]
    waits = [(tokens, 100 * share) for tokens, share in data_wait_shares(record.train)]
    panels: list[tuple[str, str, Series, dict[str, Any]]] = [
        (
            "Gradient norm",
            "before clipping",
            Series("norm", norms, "c"),
            {
                "log_y": bool(positive) and max(positive) / min(positive) > 30,
                "format_y": lambda y: figure(y, 3),
                "format_tick": _plain,
            },
        ),
        (
            "Learning rate",
            "",
            Series("rate", points(record.train, "learning_rate"), "d"),
            {"from_zero": True, "format_y": lambda y: f"{y:.3g}"},
        ),
        (
            "Throughput",
            "tokens a second",
            Series("tokens/s", points(record.train, "tokens_per_second"), "e"),
            {"from_zero": True, "format_y": count},
        ),
        (
            "Waiting for data",
            "% of the time",
            Series("waiting", waits, "f"),
            {"from_zero": True, "format_y": lambda y: f"{y:.3g}%"},
        ),
    ]
    return [
        f"<section class='card'><h2>{escape(title)} <small>{escape(unit)}</small></h2>"
        f"{line_chart([series], title=f'{title} against tokens', format_x=count, x_label='tokens', **style)}</section>"
        for title, unit, series, style in panels
    ]


def _plain(value: float) -> str:
    return f"{value:g}"


def _samples(record: RunRecord) -> str:
    if not record.samples:
        return ""
    texts = "".join(
        f"<pre class='sample'><b>{escape(prompt)}</b>{escape(continuation)}</pre>"
        for prompt, continuation in record.samples
    )
    return f"<section class='card wide'><h2>What it writes <small>the prompt in bold</small></h2>{texts}</section>"


def _evaluations(record: RunRecord) -> str:
    if not record.evaluations:
        return ""
    rows = "".join(
        f"<tr><td>{line['step']:,}</td><td>{count(line.get('tokens'))}</td><td>{figure(line.get('eval_loss'), 4)}</td>"
        f"<td>{figure(line.get('eval_bits_per_byte'), 4)}</td></tr>"
        for line in record.evaluations[-50:]
    )
    head = "<tr><th>step</th><th>tokens</th><th>held-out loss</th><th>bits per byte</th></tr>"
    return f"<details><summary>Evaluations</summary><table class='numbers'>{head}{rows}</table></details>"


def _details(record: RunRecord) -> str:
    about = dict(record.about)
    versions = about.pop("versions", {})
    command = about.get("command")
    if isinstance(command, list):
        about["command"] = " ".join([Path(str(command[0])).name, *map(str, command[1:])]) if command else ""
    about["mesh"] = _mesh_text(about.get("mesh"))
    names = {"n_params": "parameters", "n_params_nonembedding": "without embedding"}
    rows = [
        (names.get(name, name.replace("_", " ")), f"{value:,}" if isinstance(value, int) else value)
        for name, value in about.items()
    ]
    if isinstance(versions, dict) and versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    rows.append(("folder", record.run_dir.resolve()))
    cells = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in rows
        if value not in ("", None)
    )
    config = f"<pre class='config'>{escape(record.config_text)}</pre>"
    return (
        f"<details open><summary>Where and with what</summary><table>{cells}</table></details>"
        f"<details><summary>The resolved config</summary>{config}</details>"
    )


def points(lines: list[Line], name: str) -> list[tuple[float, float]]:
    """(tokens, value) of the lines that have both as finite numbers."""
    pairs = [(number(line.get("tokens")), number(line.get(name))) for line in lines]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def training_seconds(lines: list[Line]) -> float | None:
    """The time of all steps: each line's mean step time, times the steps since the line before."""
    spans = [seconds for seconds in (_span_seconds(lines, index) for index in range(len(lines))) if seconds is not None]
    return sum(spans) if spans else None


def data_wait_shares(lines: list[Line]) -> list[tuple[float, float]]:
    """(tokens, share of the time that was spent waiting for batches) of each line."""
    shares = []
    for index, line in enumerate(lines):
        seconds, waited, tokens = (
            _span_seconds(lines, index),
            number(line.get("data_wait_seconds")),
            number(line.get("tokens")),
        )
        if seconds and waited is not None and tokens is not None:
            shares.append((tokens, waited / seconds))
    return shares


def _span_seconds(lines: list[Line], index: int) -> float | None:
    seconds = number(lines[index].get("step_seconds"))
    before = lines[index - 1]["step"] if index else 0
    return seconds * (lines[index]["step"] - before) if seconds is not None else None


def _median(lines: list[Line], name: str) -> float | None:
    values = sorted(value for value in (number(line.get(name)) for line in lines) if value is not None)
    return values[len(values) // 2] if values else None


def _get(config: dict[str, Any], section: str, name: str) -> Any:
    found = config.get(section)
    return found.get(name) if isinstance(found, dict) else None


def number(value: Any) -> float | None:
    """`value` if it is a finite number that a float can hold, else None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def figure(value: Any, digits: int) -> str:
    """A number to `digits` significant digits, or a dash."""
    finite = number(value)
    if finite is None:
        return "–"
    if finite == 0 or 1e-3 <= abs(finite) < 1e5:
        decimals = digits - 1 - math.floor(math.log10(abs(finite))) if finite else 0
        return f"{finite:,.{max(decimals, 0)}f}"
    return f"{finite:.{digits - 1}e}"


def count(value: Any) -> str:
    """A count with a unit: 950, 12.3k, 4.07M, 8.03B."""
    finite = number(value)
    if finite is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(finite) >= size * 0.9995:
            return f"{finite / size:.3g}{unit}"
    return f"{finite:.3g}"


def duration(seconds: float) -> str:
    """12.3 s, 4m 05s, 3h 20m, 5d 4h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes}m {round(seconds) % 60:02d}s"
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes // 1440}d {minutes % 1440 // 60}h"
