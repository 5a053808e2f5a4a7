"""A table of runs, from our sweeps or from anyone's CSV, and what is wrong with it, in words.

Numbers are float64 columns; other columns (`run`, `status`) are kept as text. Reading keeps every row: `usable` then
leaves out what cannot be fitted and says so, and `contradictions` names what can be fitted but not believed blindly.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from maxlm.errors import DataError
from maxlm.files import write_atomically

# The first name is ours; the others are what tables of others call it. Compared in lower case, with `_` for the rest.
ALIASES: dict[str, tuple[str, ...]] = {
    "n_params": ("params", "parameters", "num_params", "model_size", "n"),
    "n_tokens": ("tokens", "training_tokens", "num_tokens", "d"),
    "loss": ("final_loss", "val_loss", "validation_loss", "eval_loss", "test_loss"),
    "flops": ("flop", "training_flops", "training_flop", "compute", "c"),
    "n_params_nonembedding": ("params_nonembedding", "non_embedding_params", "n_non_embedding"),
    "n_params_active": ("active_params", "active_parameters", "n_active"),
    "unique_tokens": ("unique", "u_d"),
    "learning_rate": ("lr", "peak_lr"),
    "batch_tokens": ("global_batch_tokens", "batch_size_tokens"),
    "seed": (),
    "accuracy": ("acc", "task_accuracy"),
    "budget": ("flop_budget",),
    "bits_per_byte": ("bpb",),
    "seconds": (),
}
POSITIVE = tuple(name for name in ALIASES if name not in ("seed", "accuracy", "seconds"))
NOTHING = ("", "nan", "na", "n/a", "none", "null", "-")
# Rows of a sweep whose status is none of these have no final loss.
DONE = ("done", "finished", "completed", "ok", "")
# FLOPs of a transformer are 6ND but for attention and embeddings, which of small models are up to about half of it.
FLOPS_TOLERANCE = 1.5
SHOWN_ROWS = 8


@dataclass(frozen=True)
class Finding:
    """Something wrong with a table or a fit, in words. `rows` are the table's, by `RunTable.lines`.

    A `severe` one is a reason not to trust the fit.
    """

    kind: str
    message: str
    rows: tuple[int, ...] = ()
    severe: bool = False


@dataclass(frozen=True)
class RunTable:
    """Runs as rows: `columns`, float64 `[n]`, NaN where there is nothing; `text` `[n]`; `lines`, theirs in the file."""

    columns: dict[str, np.ndarray]
    text: dict[str, list[str]] = field(default_factory=dict)
    lines: tuple[int, ...] = ()
    source: str = "table"

    def __post_init__(self) -> None:
        if not self.lines:
            object.__setattr__(self, "lines", tuple(range(1, len(self) + 1)))

    def __len__(self) -> int:
        lists = [*self.columns.values(), *self.text.values()]
        return len(lists[0]) if lists else 0

    def take(self, keep: np.ndarray) -> RunTable:
        """The rows where `keep` (bool `[n]`, or indices) says so."""
        index = np.arange(len(self))[keep]
        return replace(
            self,
            columns={name: values[index] for name, values in self.columns.items()},
            text={name: [values[i] for i in index] for name, values in self.text.items()},
            lines=tuple(self.lines[i] for i in index),
        )

    def with_column(self, name: str, values: np.ndarray) -> RunTable:
        """The table with one more column, or another one of that name."""
        return replace(self, columns={**self.columns, name: np.asarray(values, np.float64)})

    def name_rows(self, rows: np.ndarray) -> str:
        """The rows `rows` (bool `[n]`) for a message: names of runs where the table has them, else line numbers."""
        index = np.flatnonzero(rows)
        runs = self.text.get("run")
        names = (
            [runs[i] for i in index] if runs and len(set(runs)) == len(runs) else [str(self.lines[i]) for i in index]
        )
        what = "run" if runs and len(set(runs)) == len(runs) else "line"
        more = f" and {len(names) - SHOWN_ROWS} more" if len(names) > SHOWN_ROWS else ""
        return f"{what}{'s' if len(names) > 1 else ''} {', '.join(names[:SHOWN_ROWS])}{more}"

    def finding(self, kind: str, rows: np.ndarray, message: str, *, severe: bool = False) -> Finding:
        """A finding about `rows` (bool `[n]`), which begins with their names."""
        lines = tuple(self.lines[i] for i in np.flatnonzero(rows))
        return Finding(kind, f"{self.name_rows(rows)}: {message}", lines, severe)


def read_table(path: Path | str, columns: Mapping[str, str] | None = None) -> RunTable:
    """Reads a CSV or Parquet file, or the `runs.csv` of a sweep's folder.

    `columns` says which column of the file is which of ours (`{"n_params": "Size"}`), beyond the aliases known.
    Raises DataError, which names the file, and the line and column where there is one.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "runs.csv"
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file; give a CSV or Parquet file, or a sweep's folder with its runs.csv"
        )
    header, rows = _read_parquet(path) if path.suffix in (".parquet", ".pq") else _read_csv(path)
    if not rows:
        raise DataError(
            f"{path}: no rows; a table of runs has a header such as n_params,n_tokens,loss and a row for each run"
        )
    ours = _our_names(path, header, columns or {})
    numbers: dict[str, np.ndarray] = {}
    text: dict[str, list[str]] = {}
    for at, theirs in enumerate(header):
        name = ours[theirs]
        values = [row[at] for _, row in rows]
        if name in ALIASES:
            numbers[name] = np.array([_number(path, line, theirs, row[at]) for line, row in rows], np.float64)
        else:
            text[name] = ["" if value is None else str(value) for value in values]
    return RunTable(numbers, text, tuple(line for line, _ in rows), str(path))


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not a text file (byte {error.start}); tables are CSV in UTF-8, or .parquet"
        ) from error
    reader = csv.reader(io.StringIO(content, newline=""))
    header = [name.strip() for name in next(reader, [])]
    rows = []
    for row in reader:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise DataError(f"{path}, line {reader.line_num}: {len(row)} cells under a header of {len(header)}")
        rows.append((reader.line_num, row))
    return header, rows


def _read_parquet(path: Path) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install 'maxlm[sweep]', or give a CSV") from error
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
    columns = [column.to_pylist() for column in table.columns]
    return list(table.column_names), [(i + 1, list(row)) for i, row in enumerate(zip(*columns, strict=True))]


def _our_names(path: Path, header: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """From each name of the header to ours."""
    for name, theirs in given.items():
        if name not in ALIASES:
            raise DataError(
                f"column {name}={theirs}: {name} is not a column that a law reads; those are {', '.join(ALIASES)}"
            )
        if theirs not in header:
            raise DataError(f"{path}: no column {theirs!r}, which was to be {name}; there are {', '.join(header)}")
    known = {alias: name for name, aliases in ALIASES.items() for alias in (name, *aliases)}
    chosen = {theirs: name for name, theirs in given.items()}
    # A name given or exactly ours goes before an alias: a table may have both `loss` and `eval_loss`.
    taken = {*given, *(name for name in header if name in ALIASES)}
    ours: dict[str, str] = {}
    for theirs in header:
        plain = re.sub(r"[^a-z0-9]+", "_", theirs.lower()).strip("_")
        name = chosen.get(theirs) or (theirs if theirs in ALIASES else known.get(plain, theirs))
        if name in ALIASES and name != theirs and theirs not in chosen:
            name = theirs if name in taken else name
            taken.add(name)
        ours[theirs] = f"{name} (of the file)" if name in given and theirs not in chosen else name
    if len(set(ours.values())) < len(header):
        raise DataError(f"{path}: two columns have the same name; the header is {', '.join(header)}")
    return ours


def _number(path: Path, line: int, column: str, value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, int | float):
        return float(value)
    text = str(value).strip()
    if text.lower() in NOTHING:
        return math.nan
    try:
        return float(text.replace(",", ""))
    except ValueError:
        raise DataError(f"{path}, line {line}, column {column}: {text!r} is not a number") from None


def write_table(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes rows as CSV, or as Parquet where the name ends so; whole or not at all.

    Columns are those of any row, in the order in which they come first. Floats are at full precision.
    Raises DataError where pyarrow is needed and missing, StorageError where the file cannot be written.
    """
    path, rows = Path(path), [dict(row) for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix in (".parquet", ".pq"):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise DataError(f"{path}: Parquet needs pyarrow: pip install 'maxlm[sweep]', or name a .csv") from error
        sink = io.BytesIO()
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), sink)
        write_atomically(path, sink.getvalue())
        return path
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = (row.get(name) for name in names)
        writer.writerow(
            "" if value is None else repr(float(value)) if isinstance(value, float) else value for value in values
        )
    write_atomically(path, sink.getvalue())
    return path


def _cell(value: Any) -> Any:
    return "" if value is None else repr(float(value)) if isinstance(value, float) else value


def usable(table: RunTable, needed: Sequence[str]) -> tuple[RunTable, list[Finding]]:
    """The rows that a law can be fitted to, and what was left out or filled in.

    `needed` are columns of which a law reads every row. Left out: rows of runs that are not done, rows where a needed
    number is missing, not finite or not above 0, and all but one of rows that are equal in everything. Tokens that are
    not there are FLOPs / 6N, FLOPs 6ND (of active parameters, where there are such). Raises DataError where a column is
    missing, or no row is left.
    """
    findings: list[Finding] = []
    table = _fill_in(table, needed, findings)
    missing = [name for name in needed if name not in table.columns]
    if missing:
        there = ", ".join([*table.columns, *table.text]) or "none"
        raise DataError(
            f"{table.source}: no column {' and no column '.join(missing)}; there are {there}. "
            "Where it has another name: --column NAME=THEIRS"
        )
    keep = np.ones(len(table), bool)
    if "status" in table.text:
        unfinished = np.array([status.strip().lower() not in DONE for status in table.text["status"]])
        if unfinished.any():
            what = ", ".join(sorted({table.text["status"][i] for i in np.flatnonzero(unfinished)}))
            findings.append(table.finding("status", unfinished, f"left out, the runs are not done ({what})"))
        keep &= ~unfinished
    for name in needed:
        values = table.columns[name]
        bad = keep & ~(np.isfinite(values) & ((values > 0) | (name not in POSITIVE)))
        if bad.any():
            shown = ", ".join(sorted({_show(value) for value in values[bad]}))
            findings.append(table.finding("not a number", bad, f"left out, {name} is {shown}"))
        keep &= ~bad
    twins = keep & _repeated(table, keep)
    if twins.any():
        findings.append(table.finding("duplicate", twins, "left out, equal in every column to a row above"))
    keep &= ~twins
    if not keep.any():
        raise DataError(f"{table.source}: no row can be fitted. " + "; ".join(finding.message for finding in findings))
    return table.take(keep), findings


def _fill_in(table: RunTable, needed: Sequence[str], findings: list[Finding]) -> RunTable:
    columns = table.columns
    if "n_tokens" in needed and "n_tokens" not in columns and {"flops", "n_params"} <= set(columns):
        table = table.with_column("n_tokens", columns["flops"] / (6 * columns["n_params"]))
        findings.append(Finding("derived", "no column n_tokens: tokens are taken to be FLOPs / 6N"))
    columns = table.columns
    if "n_params_nonembedding" in needed and "n_params_nonembedding" not in columns and "n_params" in columns:
        table = table.with_column("n_params_nonembedding", columns["n_params"])
        told = "n_params is taken for it, and if it counts embeddings, exponents come out larger (arXiv:2406.12907)"
        findings.append(Finding("derived", f"no column n_params_nonembedding: {told}"))
    columns = table.columns
    sizes = [columns[name] for name in ("n_params_active", "n_params", "n_params_nonembedding") if name in columns]
    if "flops" not in columns and "n_tokens" in columns and sizes:
        size = sizes[0]
        table = table.with_column("flops", 6 * size * columns["n_tokens"])
        if "flops" in needed:
            findings.append(Finding("derived", "no column flops: FLOPs are taken to be 6ND"))
    return table


def _repeated(table: RunTable, keep: np.ndarray) -> np.ndarray:
    """Rows equal in everything but the name of the run to one before them; of those that are kept."""
    text = [values for name, values in table.text.items() if name != "run"]
    seen: set[tuple[Any, ...]] = set()
    repeated = np.zeros(len(table), bool)
    for i in np.flatnonzero(keep):
        row = (*(float(values[i]).hex() for values in table.columns.values()), *(values[i] for values in text))
        repeated[i] = row in seen
        seen.add(row)
    return repeated


def _show(value: float) -> str:
    return "missing or not a number" if math.isnan(value) else f"{value:g}"


def contradictions(table: RunTable) -> list[Finding]:
    """FLOPs that cannot be of the row's parameters and tokens: over `FLOPS_TOLERANCE` away from 6ND (6 N_active D).

    A table that counts all its FLOPs otherwise is told so once, and its rows are compared with each other.
    """
    columns = table.columns
    if not {"flops", "n_params", "n_tokens"} <= set(columns):
        return []
    size = columns.get("n_params_active", columns["n_params"])
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = columns["flops"] / (6 * size * columns["n_tokens"])
    known = np.isfinite(ratio) & (ratio > 0)
    if not known.any():
        return []
    logs = np.log(np.where(known, ratio, 1.0))
    usual, findings = float(np.median(logs[known])), []
    if abs(usual) > math.log(FLOPS_TOLERANCE):
        told = f"flops contradict 6ND throughout, they are about {math.exp(usual):.3g} times it"
        findings.append(Finding("flops", f"{told}: attention, embeddings or the backward pass are counted otherwise"))
    else:
        usual = 0.0
    off = known & (np.abs(logs - usual) > math.log(FLOPS_TOLERANCE))
    if off.any():
        low, high = f"{ratio[off].min():.3g}", f"{ratio[off].max():.3g}"
        shown = low if low == high else f"{low} to {high}"
        told = f"flops contradict 6ND, they are {shown} times it: one of the three numbers is wrong"
        findings.append(table.finding("flops", off, told, severe=bool(off.mean() > 0.1)))
    return findings


def binned(values: np.ndarray, spread: float) -> np.ndarray:
    """Numbers from 0 for clusters of positive `values` `[n]`, from the lowest up, each within the factor `spread`."""
    found = np.empty(len(values), int)
    start, at = -np.inf, -1
    for i in np.argsort(values, kind="stable"):
        if values[i] > start * spread or at < 0:
            start, at = values[i], at + 1
        found[i] = at
    return found


def budgets(table: RunTable, spread: float) -> np.ndarray:
    """Which FLOP budget each run is of, numbered from the smallest: the column `budget`, or FLOPs within `spread`."""
    declared = table.columns.get("budget")
    if declared is not None and np.all(np.isfinite(declared) & (declared > 0)):
        return binned(declared, 1.001)
    return binned(table.columns["flops"], spread)
