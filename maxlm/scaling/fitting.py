"""A law fitted to a table of runs: `fit`, from the file to the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maxlm.errors import DataError
from maxlm.scaling.allocation import SPLITS, best_split
from maxlm.scaling.best import best_runs, best_settings
from maxlm.scaling.bootstrap import Fitted, resampled
from maxlm.scaling.engine import Minima, minimise
from maxlm.scaling.law import Centre, Law
from maxlm.scaling.laws import find_law
from maxlm.scaling.losses import LossKind
from maxlm.scaling.result import Backtest, Estimate, FitOptions, FitResult, HeldOut, Optimum
from maxlm.scaling.table import Finding, RunTable, contradictions, read_table, usable
from maxlm.scaling.verdict import judge, verdict

# Starts agree with the best when their objectives are this near.
AGREE = 1e-6
# Half the square of a residual of pure rounding.
ROUNDING = 5e-17
OTHER_STARTS = 2
# Runs with several rows each: draws of fewer say little of what another ladder would have given.
MIN_RUNS = 8
HELD_OUT, MAX_HELD_OUT = 0.1, 1 / 3
SAME_SCALE = 1.25


@dataclass(frozen=True)
class Solution:
    """The best fit of a law to rows, all that the starts found, and the means that natural parameters need."""

    fitted: Fitted
    minima: Minima
    centre: Centre

    @property
    def best(self) -> int:
        """The start whose objective is least."""
        return int(np.argmin(self.minima.objective))

    @property
    def natural(self) -> np.ndarray:
        """The parameters of the law's equation, `[p]`."""
        return self.fitted.law.natural(self.fitted.theta[None], self.centre)[0]

    @property
    def agreeing(self) -> np.ndarray:
        """Which starts ended at the best objective."""
        value = self.minima.objective
        return value <= value[self.best] * (1 + AGREE) + len(self.fitted.y) * ROUNDING

    @property
    def residuals(self) -> np.ndarray:
        """Predicted less measured, `[n]`: of log losses, or of what the law is linear in."""
        return self.fitted.law.evaluate(self.fitted.theta[None], self.fitted.z)[0][0] - self.fitted.y


def fit(
    table: RunTable | Path | str,
    law: str = "chinchilla",
    options: FitOptions | None = None,
    *,
    columns: Mapping[str, str] | None = None,
) -> FitResult:
    """Fits the law of this name (`maxlm sweep fit --laws`) to a table, or to the file or sweep's folder that has it.

    `columns` says which column of the file is which of ours. Nothing wrong with the table is passed over: see the
    result's `warnings`, `trusted` and `verdict`. Raises DataError where a column is missing or there are too few rows
    to fit at all, ConfigError where there is no such law.
    """
    options = options or FitOptions()
    rows = table if isinstance(table, RunTable) else read_table(table, columns)
    if law in ("approach1", "approach2"):
        from maxlm.scaling.frontier import fit_frontier

        return fit_frontier(rows, law, options)
    return fit_law(rows, find_law(law), options)


def fit_law(table: RunTable, law: Law, options: FitOptions) -> FitResult:
    """`fit`, for a law that the engine minimises."""
    rows, findings = prepare(table, law)
    delta = law.delta if options.delta is None else options.delta
    solution = solve(law, rows.columns, options.loss, delta)
    inner, drawn = np.empty((0, len(law.parameters))), clusters(rows)
    if options.resamples:
        inner = resampled(solution.fitted, drawn, options.resamples, options.seed)
    n_drawn = int(drawn.max()) + 1
    if n_drawn < len(rows):
        told = f"the {len(rows)} rows are of {n_drawn} runs, which the bootstrap draws whole"
        findings.append(Finding("runs", told, severe=n_drawn < MIN_RUNS))
    samples = law.natural(inner, solution.centre)
    natural = solution.natural
    result = FitResult(
        law=law.name,
        equation=law.equation,
        source=law.source,
        parameters={name: Estimate.of(natural[at], samples[:, at]) for at, name in enumerate(law.parameters)},
        objective=float(solution.minima.objective[solution.best]),
        converged=bool(solution.minima.converged[solution.best]),
        starts=len(solution.minima.objective),
        starts_agreeing=int(solution.agreeing.sum()),
        start_objectives=tuple(float(value) for value in solution.minima.objective),
        gradient_norm=float(solution.minima.gradient[solution.best]),
        loss=options.loss,
        delta=delta if options.loss == "huber" else None,
        rows=rows,
        rows_in_table=len(table),
        residual_scale=spread(solution.residuals),
        samples=samples,
        resample="runs" if options.resamples else "none",
        optimum=optima(law, natural, samples, rows, options.budgets),
        backtest=backtest(rows, law, options.loss, delta) if options.backtest else None,
    )
    findings += judge(law, solution, result, options.resamples)
    result = replace(result, findings=tuple(findings))
    return replace(result, verdict=verdict(result))


def prepare(table: RunTable, law: Law) -> tuple[RunTable, list[Finding]]:
    """The rows that `law` is fitted to, and what was found on the way. Raises DataError where they are too few."""
    if law.of_optima and "loss" in table.columns:
        table, findings = usable(table, (*law.needs, "loss"))
    else:
        table, findings = usable(table, law.needs)
    findings += contradictions(table)
    if law.of_optima:
        table, more = best_settings(table, law.target)
        findings += more
    elif law.best_of:
        table, more = best_runs(table, law.best_of, law.name)
        findings += more
    if len(table) <= len(law.parameters):
        told = (
            f"{law.name} has {len(law.parameters)} parameters and needs more rows than that, {len(table)} can be fitted"
        )
        raise DataError("; ".join([f"{table.source}: {told}", *(finding.message for finding in findings)]))
    return table, findings


def solve(law: Law, columns: Mapping[str, np.ndarray], kind: LossKind, delta: float) -> Solution:
    """The best fit from every start of the law's grid."""
    centre = law.centre(columns)
    z, y = law.variables(columns) - centre.variables, law.measured(columns, centre)
    starts = law.starts(z, y)
    minima = minimise(law, z, y, np.ones(len(y)), starts, kind, delta)
    best = int(np.argmin(minima.objective))
    worse = minima.converged & (minima.objective > minima.objective[best] * (1 + AGREE) + len(y) * ROUNDING)
    others = minima.theta[worse][np.argsort(minima.objective[worse], kind="stable")][:OTHER_STARTS]
    if not len(others):
        # One minimum: then from afar, so that a resample that has another one shows it.
        others = starts[np.linspace(0, len(starts) - 1, OTHER_STARTS).astype(int)]
    return Solution(Fitted(law, z, y, minima.theta[best], others, kind, delta), minima, centre)


def clusters(rows: RunTable) -> np.ndarray:
    """What is drawn together, `[n]` from 0: the rows of one run, where it has several (its points, or branches)."""
    runs = rows.text.get("run") or []
    if len(set(runs)) == len(runs) or not all(runs):
        return np.arange(len(rows))
    return np.unique(runs, return_inverse=True)[1].reshape(-1)


def spread(residuals: np.ndarray) -> float:
    """Their standard deviation, as the median absolute deviation tells it."""
    return float(1.4826 * np.median(np.abs(residuals - np.median(residuals))))


def optima(
    law: Law, natural: np.ndarray, samples: np.ndarray, rows: RunTable, budgets: tuple[float, ...]
) -> tuple[Optimum, ...]:
    """N*, D* and the loss for each budget; by default the table's largest and ten times that. None for laws without."""
    if law.name not in SPLITS:
        return ()
    largest = float(np.max(rows.columns["flops"]))
    found = []
    for flops in budgets or (largest, 10 * largest):
        split = best_split(law, np.vstack([natural, samples]), flops)
        found.append(Optimum(flops, *(Estimate.of(values[0], values[1:]) for values in split)))
    return tuple(found)


def backtest(rows: RunTable, law: Law, kind: LossKind, delta: float) -> Backtest | None:
    """The largest runs predicted by a fit to the rest; None where too few would be left to fit.

    Largest in FLOPs, or in what the law has instead: the highest tenth of the rows, and all within a factor of 1.25 of
    the largest. Where that is over a third of the rows, only those that are exactly the largest.
    """
    measure = next((name for name in ("flops", *law.columns) if name in rows.columns), law.columns[0])
    scale = 1 / rows.columns[measure] if measure == "loss" else rows.columns[measure]
    held = scale >= min(scale.max() / SAME_SCALE, np.quantile(scale, 1 - HELD_OUT))
    if held.mean() > MAX_HELD_OUT:
        held = scale >= scale.max()
    small, large = rows.take(~held), rows.take(held)
    if len(small) <= len(law.parameters):
        return None
    predicted = law.predict(solve(law, small.columns, kind, delta).natural, large.columns)
    actual = large.columns[law.target]
    error = predicted / actual - 1
    worst = int(np.argmax(np.abs(error)))
    return Backtest(
        measure=measure,
        factor=float(scale.max() / scale[~held].max()),
        rows_fitted=len(small),
        held_out=tuple(
            HeldOut(line, float(a), float(p), float(e))
            for line, a, p, e in zip(large.lines, actual, predicted, error, strict=True)
        ),
        mean_error=float(np.mean(error)),
        worst_error=float(error[worst]),
        target=law.target,
    )
