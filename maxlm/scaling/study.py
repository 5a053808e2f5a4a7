"""A table of runs and everything that the fits say of it: what the report draws and tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from maxlm.errors import DataError
from maxlm.evaluation.report import number, points, read_run
from maxlm.scaling.allocation import best_split
from maxlm.scaling.bootstrap import INTERVAL
from maxlm.scaling.fitting import fit
from maxlm.scaling.frontier import BUDGET_SPREAD
from maxlm.scaling.laws import find_law
from maxlm.scaling.result import Estimate, FitOptions, FitResult
from maxlm.scaling.table import DONE, RunTable, budgets, read_table, usable

LAWS = ("chinchilla", "approach2", "approach1", "kaplan-nd")
"""The first is what the page is about; the others stand beside it."""
TITLES = {
    "chinchilla": "approach 3", "approach2": "approach 2", "approach1": "approach 1", "kaplan-nd": "Kaplan's form",
}  # fmt: skip
METHODS = {
    "chinchilla": "the law L(N, D) fitted to every run",
    "approach2": "a parabola for each budget",
    "approach1": "the lowest curve at each FLOP count",
    "kaplan-nd": "Kaplan's law L(N, D) fitted to every run",
}
PENDING = ("waiting", "running", "planned", "pending", "queued")
"""What a run is called that may still come to something."""
CURVE_POINTS = 160
FIRST_SHARE = 0.01
"""Of a run: its curve is drawn from here on, below it is the fall from a uniform guess."""


@dataclass(frozen=True)
class Curve:
    """A run's training: losses `[k]`, nats a token, by FLOPs and tokens spent, means in even steps of log FLOPs."""

    run: str
    n_params: float
    flops: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    held_out: float | None
    status: str

    @property
    def failed(self) -> bool:
        """Whether it came to nothing: failed, diverged or the like."""
        return self.status != "done" and self.status not in PENDING


@dataclass(frozen=True)
class Row:
    """A run as the page lists it. `predicted` is the main fit's; None where the run has no size, or there is no fit."""

    name: str
    line: int
    n_params: float
    n_tokens: float
    flops: float
    loss: float
    status: str
    used: bool
    reason: str
    predicted: float | None

    @property
    def pending(self) -> bool:
        """Whether it has no result yet and may still have one."""
        return self.status in PENDING

    @property
    def residual(self) -> float | None:
        """measured / predicted - 1; None where either is not there."""
        known = self.predicted is not None and np.isfinite(self.loss)
        return self.loss / self.predicted - 1 if known and self.predicted else None


@dataclass(frozen=True)
class Study:
    """The table, the fits by the name of their law, what was refused and why, and training curves where there are."""

    name: str
    table: RunTable
    fits: dict[str, FitResult]
    refused: dict[str, str]
    options: FitOptions
    curves: tuple[Curve, ...] = ()
    no_curves: str = ""
    envelope_of_curves: bool = False

    @property
    def main(self) -> FitResult | None:
        """Approach 3, the law that the page is about."""
        return self.fits.get(LAWS[0])

    @cached_property
    def rows(self) -> list[Row]:
        """Every run of the table, fitted or not, in its order."""
        return [self._row(at) for at in range(len(self.table))]

    def _row(self, at: int) -> Row:
        line = self.table.lines[at]
        column = {name: float(values[at]) for name, values in self.table.columns.items()}
        size, tokens = column.get("n_params", np.nan), column.get("n_tokens", np.nan)
        flops = column.get("flops", 6 * column.get("n_params_active", size) * tokens)
        tokens = flops / (6 * size) if np.isnan(tokens) else tokens
        used = self.main is not None and line in self.main.rows.lines
        said = [
            finding.message.split(": ", 1)[-1]
            for result in (self.main, *self.fits.values())
            for finding in (result.findings if result is not None else ())
            if line in finding.rows and (not used or finding.kind in ("outlier", "flops"))
        ]
        status = self.table.text["status"][at].strip().lower() if "status" in self.table.text else ""
        return Row(
            name=self.table.text["run"][at] if "run" in self.table.text else f"line {line}",
            line=line,
            n_params=size,
            n_tokens=tokens,
            flops=flops,
            loss=column.get("loss", np.nan),
            status="done" if status in DONE else status,
            used=used,
            reason=self._note(at) or (said[0] if said else ""),
            predicted=self._predicted(size, tokens),
        )

    def _note(self, at: int) -> str:
        """What `maxlm sweep run` says of a run that failed or diverged."""
        return self.table.text["note"][at] if "note" in self.table.text else ""

    def _predicted(self, size: float, tokens: float) -> float | None:
        if self.main is None or not (size > 0 and tokens > 0):
            return None
        columns = {"n_params": np.array([size]), "n_tokens": np.array([tokens])}
        return float(find_law(self.main.law).predict(natural(self.main), columns)[0])

    @cached_property
    def budgets(self) -> np.ndarray:
        """Which budget each fitted row of approach 2 is of, `[n]`."""
        return budgets(self.fits["approach2"].rows, BUDGET_SPREAD)

    @property
    def largest(self) -> float:
        """FLOPs of the largest fitted run."""
        return max((row.flops for row in self.rows if row.used), default=float("nan"))

    @property
    def left_out(self) -> list[Row]:
        """The runs that have ended and are not fitted."""
        return [row for row in self.rows if not row.used and not row.pending]

    def has_optimum(self, law: str) -> bool:
        """Whether a fit has a best size for a budget: a law of which a term vanished has none."""
        return law in self.fits and all(np.isfinite(point.n_params.value) for point in self.fits[law].optimum)

    @property
    def next_flops(self) -> float:
        """The budget of the next model: the largest asked for."""
        return max((point.flops for point in self.main.optimum), default=float("nan")) if self.main else float("nan")


def natural(result: FitResult) -> np.ndarray:
    """The parameters of a fit, `[p]`."""
    return np.array([estimate.value for estimate in result.parameters.values()])


def path(result: FitResult, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log N* and log D* `[1 + B, g]` for budgets `flops [g]`: of the fit itself, then of its resamples."""
    every = np.vstack([natural(result), result.samples])
    if result.law.startswith("approach"):
        log_c = np.log(flops)
        return (
            np.log(every[:, 2:3]) + every[:, 0:1] * log_c,
            np.log(every[:, 3:4]) + every[:, 1:2] * log_c,
        )
    splits = [best_split(find_law(result.law), every, float(each)) for each in flops]
    return np.log(np.stack([size for size, _, _ in splits], axis=1)), np.log(
        np.stack([tokens for _, tokens, _ in splits], axis=1)
    )


def band(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The 95% interval at each budget of the resamples of `path`, `[g]`; None where there are none."""
    resamples = logs[1:]
    resamples = resamples[np.all(np.isfinite(resamples), axis=1)]
    if not len(resamples):
        return None
    low, high = np.exp(np.quantile(resamples, INTERVAL, axis=0))
    return low, high


def exponents(result: FitResult) -> tuple[Estimate, Estimate]:
    """a and b of N* ~ C^a, D* ~ C^b: a law's own, or those that its exponents imply."""
    if result.law.startswith("approach"):
        return result.parameters["a"], result.parameters["b"]
    names = list(result.parameters)
    every = dict(zip(names, np.vstack([natural(result), result.samples]).T, strict=True))
    if result.law == "kaplan-nd":
        share = every["alpha_D"] / (every["alpha_N"] + every["alpha_D"])
    else:
        share = every["beta"] / (every["alpha"] + every["beta"])
    return Estimate.of(share[0], share[1:]), Estimate.of(1 - share[0], 1 - share[1:])


def make_study(
    source: Path | str, options: FitOptions | None = None, *, columns: Mapping[str, str] | None = None
) -> Study:
    """Reads a table or a sweep's folder, and fits all that the report shows. Raises DataError where it cannot be read,
    or has no run with a size, tokens and a loss.

    A law that cannot be fitted is in `refused`, with the reason. Approach 1 of a sweep whose sizes do not recur takes
    the points of the training curves, as Hoffmann et al. do.
    """
    options = options or FitOptions()
    source = Path(source)
    table = read_table(source, columns)
    usable(table, ("n_params", "n_tokens", "loss"))
    curves, no_curves = read_curves(source, table)
    fits, refused, of_curves = {}, {}, False
    for law in LAWS:
        try:
            fits[law] = fit(table, law, options)
        except DataError as error:
            refused[law] = str(error).removeprefix(f"{table.source}: ").removeprefix(f"{law}: ")
    first = fits.get("approach1")
    coarse = first is None or any(finding.kind == "envelope" for finding in first.findings)
    if coarse and (points_table := table_of_curves(curves, table.source)) is not None:
        try:
            fits["approach1"], of_curves = fit(points_table, "approach1", options), True
            refused.pop("approach1", None)
        except DataError as error:
            if first is None:
                refused["approach1"] = str(error).removeprefix(f"{table.source}: ")
    name = source.resolve().name if source.is_dir() else source.stem
    return Study(name, table, fits, refused, options, curves, no_curves, of_curves)


def read_curves(source: Path, table: RunTable) -> tuple[tuple[Curve, ...], str]:
    """The training curves of a sweep's folder, whose runs lie in it by name; or none, and why."""
    if not source.is_dir():
        return (), "a table of results has no training curves; give the sweep's folder for them"
    if "run" not in table.text:
        return (), "the sweep's table does not name its runs, so their folders are not known"
    found = []
    for at, run in enumerate(table.text["run"]):
        folder = source / run
        if run and (folder / "metrics.jsonl").is_file() and (folder / "config.yaml").is_file():
            curve = _curve(run, at, table, folder)
            found += [curve] if curve is not None else []
    return tuple(found), "" if found else "no run's folder with a metrics.jsonl lies beside the table"


def _curve(run: str, at: int, table: RunTable, folder: Path) -> Curve | None:
    record = read_run(folder)
    drawn = points(record.train, "nll") or points(record.train, "loss")
    size, tokens = (float(table.columns[name][at]) for name in ("n_params", "n_tokens"))
    flops = float(table.columns["flops"][at]) if "flops" in table.columns else 6 * size * tokens
    if not drawn or not (size > 0 and tokens > 0 and flops > 0):
        return None
    x, y = (np.array(values, np.float64) for values in zip(*drawn, strict=True))
    keep = x >= max(FIRST_SHARE * x.max(), 1)
    x, y = x[keep], y[keep]
    step = (np.log(x.max() / x.min()) or 1.0) / CURVE_POINTS
    bucket = np.unique(np.floor(np.log(x / x.min()) / step), return_inverse=True)[1].reshape(-1)
    count = np.bincount(bucket)
    ends = [number(line.get("eval_loss")) for line in record.evaluations]
    status = table.text["status"][at].strip().lower() if "status" in table.text else ""
    return Curve(
        run=run,
        n_params=size,
        flops=np.bincount(bucket, x) / count * flops / tokens,
        tokens=np.bincount(bucket, x) / count,
        loss=np.bincount(bucket, y) / count,
        held_out=ends[-1] if ends else None,
        status="done" if status in DONE else status,
    )


def table_of_curves(curves: tuple[Curve, ...], source: str) -> RunTable | None:
    """The points of training curves of runs that are done as a table; None without curves."""
    done = [curve for curve in curves if curve.status == "done"]
    if not done:
        return None
    size = np.concatenate([np.full(len(curve.flops), curve.n_params) for curve in done])
    flops, tokens, loss = (
        np.concatenate([getattr(curve, name) for curve in done]) for name in ("flops", "tokens", "loss")
    )
    return RunTable({"n_params": size, "n_tokens": tokens, "loss": loss, "flops": flops}, source=f"{source}, curves")
