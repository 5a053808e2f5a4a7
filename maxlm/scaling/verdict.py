"""Whether to believe a fit: everything that speaks against it, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from maxlm.scaling.law import Law
from maxlm.scaling.losses import Huber
from maxlm.scaling.result import FitResult
from maxlm.scaling.table import Finding, RunTable

if TYPE_CHECKING:
    from maxlm.scaling.fitting import Solution

# Columns whose spread a law needs, and what to call them.
SPREAD_OF = {
    "n_params": "size", "n_params_nonembedding": "size", "n_tokens": "token count", "flops": "budget",
    "n_params_active": "active size",
}  # fmt: skip
SAME = 1.05
NARROW = 4.0
ROWS_PER_PARAMETER = 4
OUTLIER = 5.0
# Noise of a loss below which nothing is called an outlier: losses are written to about this.
LEAST_NOISE = 1e-5
# Eigenvalues of the curvature, scaled to a unit diagonal: the ratio below which a direction is flat.
FLAT = 1e-8
# Intervals: of an exponent, beyond 0.1 and this share of it; of a best size, high / low.
WIDE, WIDE_OPTIMUM = 0.5, 3.0
BAD_RESIDUALS = 0.05
EXTRAPOLATION = 30.0
MIN_BACKTEST_ERROR = 0.005
LEFT_OUT = 0.5


def judge(law: Law, solution: Solution, result: FitResult, resamples: int) -> list[Finding]:
    """What is to be said of a fit beyond what its table said."""
    rows = result.rows
    found = [*designs(rows, law), *minimum(law, solution, result), *flat(law, solution)]
    found += outliers(rows, solution.residuals, result.residual_scale)
    if result.residual_scale > BAD_RESIDUALS and law.target == "loss":
        told = f"the law misses the losses by {result.residual_scale:.1%} (robust): it does not describe these runs"
        found.append(Finding("misfit", told, severe=True))
    if resamples:
        found += intervals(result, resamples)
    found += beyond(result)
    if len(rows) < LEFT_OUT * result.rows_in_table and not law.best_of and not law.of_optima:
        told = f"over half of the table was left out: {len(rows)} of {result.rows_in_table} rows are fitted"
        found.append(Finding("left out", told, severe=True))
    return found


def designs(rows: RunTable, law: Law) -> list[Finding]:
    """Tables that cannot tell the law's parameters apart, whatever the losses are."""
    found = []
    names = [name for name in law.columns if name in SPREAD_OF and name != "flops"]
    logs = {name: np.log(rows.columns[name]) for name in names}
    for name in names:
        found += _spread(rows.columns[name], SPREAD_OF[name])
    two = [name for name in names if name in ("n_params", "n_params_nonembedding", "n_tokens")]
    single = any(np.ptp(values) < np.log(SAME) for values in logs.values())
    if len(two) == 2 and not single and law.target == "loss":
        flops = rows.columns["flops"]
        if flops.max() < SAME * flops.min():
            told = f"all runs have one budget, {np.median(flops):.3g} FLOPs: N and D move against each other, and"
            what = "their terms cannot be told apart, nor from E; add budgets"
            found.append(Finding("one budget", f"{told} {what}", severe=True))
        elif np.abs(np.corrcoef(logs[two[0]], logs[two[1]])[0, 1]) > 0.995:
            told = "N and D rise together (one ratio of tokens to parameters): their terms cannot be told apart"
            found.append(Finding("one ratio", f"{told}; add runs at other ratios", severe=True))
    if "flops" in law.columns and law.columns == ("flops",):
        found += _spread(rows.columns["flops"], "budget")
    if "unique_tokens" in law.columns and np.all(rows.columns["n_tokens"] <= 1.01 * rows.columns["unique_tokens"]):
        told = "no run repeats its data (unique_tokens is n_tokens everywhere): R_D_star cannot be told"
        found.append(Finding("no repetition", told, severe=True))
    n, wanted = len(rows), ROWS_PER_PARAMETER * len(law.parameters)
    if n < wanted:
        told = f"few rows: {n} for {len(law.parameters)} parameters; intervals from so few are rough, {wanted} would do"
        found.append(Finding("few rows", told, severe=True))
    return found


def _spread(values: np.ndarray, what: str) -> list[Finding]:
    ratio = float(values.max() / values.min())
    if ratio < SAME:
        told = f"all runs have one {what}, {np.median(values):.4g}: how the loss depends on it cannot be told"
        return [Finding(f"one {what}", f"{told}; its term and the constant trade off. Add other {what}s", severe=True)]
    if ratio < NARROW:
        told = f"narrow: the largest {what} is only {ratio:.3g} times the smallest"
        return [Finding("narrow", f"{told}; exponents from that do not extrapolate", severe=True)]
    return []


def minimum(law: Law, solution: Solution, result: FitResult) -> list[Finding]:
    """Convergence, starts that disagree, and bounds."""
    found = []
    if not result.converged:
        told = f"not converged: the relative gradient is {result.gradient_norm:.1e} after every start"
        found.append(Finding("not converged", told, severe=True))
    if result.starts_agreeing == 1 and result.starts > 1:
        told = f"only 1 of {result.starts} starts found the best objective: a better minimum may be missed"
        found.append(Finding("starts", told, severe=True))
    found += [
        Finding("bound", f"{told}: the table does not determine it", severe=True)
        for told in law.at_bounds(solution.fitted.theta)
    ]
    return found


def flat(law: Law, solution: Solution) -> list[Finding]:
    """Directions in which parameters trade off without the predictions changing."""
    fitted = solution.fitted
    _, jacobian = law.evaluate(fitted.theta[None], fitted.z)
    jacobian = jacobian[0]
    delta = fitted.delta if fitted.kind == "huber" else np.inf
    matrix = (jacobian * Huber(delta).weight(solution.residuals)) @ jacobian.T
    size = np.sqrt(np.diag(matrix))
    nothing = size <= 1e-9 * size.max()
    free = np.flatnonzero(~nothing)
    found = [
        Finding("flat", f"no row's prediction depends on {law.parameters[at]}: its value means nothing", severe=True)
        for at in np.flatnonzero(nothing)
    ]
    if not len(free):
        return found
    values, vectors = np.linalg.eigh(matrix[np.ix_(free, free)] / np.outer(size[free], size[free]))
    for value, vector in zip(values, vectors.T, strict=True):
        if value < FLAT * values[-1]:
            names = [law.parameters[free[at]] for at in np.flatnonzero(np.abs(vector) > 0.3 * np.abs(vector).max())]
            told = f"flat direction: {' and '.join(names)} trade off; the rows do not determine them one by one"
            found.append(Finding("flat", told, severe=True))
    return found


def outliers(rows: RunTable, residuals: np.ndarray, scale: float) -> list[Finding]:
    """Rows that the fit misses by over five robust standard deviations. They stay: Huber's loss bounds their pull."""
    away = np.abs(residuals - np.median(residuals))
    far = away > OUTLIER * max(scale, LEAST_NOISE)
    if not far.any():
        return []
    worst = float(residuals[np.argmax(away)])
    told = (
        f"outliers, over {OUTLIER:g} standard deviations from the fit (the worst by {-worst:+.1%}); look at these runs"
    )
    return [rows.finding("outlier", far, told, severe=bool(far.mean() > 0.1))]


def intervals(result: FitResult, resamples: int) -> list[Finding]:
    """Intervals that say that a parameter is not known, and resamples that failed."""
    found = []
    lost = resamples - len(result.samples)
    if lost > 0.01 * resamples:
        told = f"{lost} of {resamples} resamples did not converge; intervals are of the others"
        found.append(Finding("resamples", told, severe=lost > 0.1 * resamples))
    for name, estimate in result.parameters.items():
        width = estimate.high - estimate.low
        if exponent(name) and not width <= 0.1 + WIDE * abs(estimate.value):
            told = f"{name} is only known to be in {estimate.low:.3g} to {estimate.high:.3g}, too wide to extrapolate"
            found.append(Finding("wide", told, severe=True))
    for point in result.optimum:
        if not np.isfinite(point.n_params.value):
            found.append(Finding("no optimum", f"at {point.flops:.3g} FLOPs the law has no best size", severe=True))
            break
        if not point.n_params.factor <= WIDE_OPTIMUM:
            told = f"the best size is only known to be in {point.n_params.low:.3g} to {point.n_params.high:.3g}"
            found.append(Finding("wide", f"at {point.flops:.3g} FLOPs {told}", severe=True))
            break
    return found


def exponent(name: str) -> bool:
    """Whether a parameter is one whose interval should be narrow: coefficients vary by orders with their exponents."""
    return name in ("a", "b", "eta", "gamma", "delta", "lambda", "slope") or name.startswith(("alpha", "beta"))


def beyond(result: FitResult, tolerance: float | None = None) -> list[Finding]:
    """Answers far outside the table, and a back-test that missed by over `tolerance` (None: what the noise allows)."""
    found = []
    if result.optimum:
        largest = float(np.max(result.rows.columns["flops"]))
        far = [point.flops for point in result.optimum if point.flops > EXTRAPOLATION * largest]
        if far:
            told = f"extrapolating: {max(far):.3g} FLOPs are {max(far) / largest:.0f} times the table's largest run"
            found.append(Finding("extrapolation", told))
    test = result.backtest
    if test is None:
        return found
    allowed = max(3 * result.residual_scale, MIN_BACKTEST_ERROR) if tolerance is None else tolerance
    if abs(test.worst_error) > allowed:
        told = f"back-test: fitted to smaller runs, {test.target} of the largest is missed by {test.worst_error:+.2%}"
        by = f"{allowed:.2%} would be within the noise"
        found.append(Finding("back-test", f"{told}; {by}", severe=abs(test.mean_error) > allowed))
    return found


def verdict(result: FitResult) -> str:
    """One sentence for a person who reads nothing else."""
    severe: Sequence[Finding] = [finding for finding in result.findings if finding.severe]
    if not severe:
        return "Nothing found speaks against this fit; read it with its intervals."
    kinds = list(dict.fromkeys(finding.kind for finding in severe))
    return f"Do not trust this fit: {', '.join(kinds)}. The warnings say why."
