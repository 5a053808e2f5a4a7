"""Approaches 1 and 2 of Hoffmann et al. (arXiv:2203.15556, sections 3.1 and 3.2): the best size of each budget, then
power laws N* = k_N C^a and D* = k_D C^b through them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from maxlm.errors import DataError
from maxlm.scaling.best import cells
from maxlm.scaling.result import Backtest, Estimate, FitOptions, FitResult, HeldOut, Optimum
from maxlm.scaling.table import Finding, RunTable, budgets, contradictions, usable
from maxlm.scaling.verdict import beyond, intervals, verdict

APPROACHES = {
    "approach1": "the envelope of the loss curves of sizes: the size that is best at each of 1,500 FLOP counts",
    "approach2": "isoFLOP parabolas: at each budget the minimum of a parabola of log loss in log N",
}
SOURCE = "Hoffmann et al. 2022, arXiv:2203.15556, section 3"
EQUATION = "N*(C) = k_N C^a, D*(C) = k_D C^b"
COLUMNS = ("n_params", "n_tokens", "loss", "flops")
NAMES = ("a", "b", "k_N", "k_D")
FLOP_COUNTS = 1500
# In the bootstrap, where the envelope is made anew for each resample.
RESAMPLED_COUNTS = 200
BATCH = 250
# A curve of as many points is smoothed by a polynomial of up to this degree in log FLOPs, as Hoffmann et al. smooth.
SMOOTHED_POINTS = 9
MAX_DEGREE = 4
# FLOPs within this factor are one budget, where the table has no column `budget`.
BUDGET_SPREAD = 1.25
MIN_SIZES = 3
# A best size that a line through smaller budgets misses by more than this is not what the line says.
SIZE_ERROR = 0.25


@dataclass(frozen=True)
class Frontier:
    """The best size and tokens of each budget, logarithms `[g]`; `samples [B, 4]` are a, b, k_N and k_D of resamples.

    `scale` is the standard deviation of log losses about what they are read off, 0 where nothing tells it.
    """

    log_flops: np.ndarray
    log_size: np.ndarray
    log_tokens: np.ndarray
    samples: np.ndarray
    scale: float
    findings: list[Finding]


def fit_frontier(table: RunTable, name: str, options: FitOptions) -> FitResult:
    """`fit` for approach1 and approach2. Raises DataError where no budget has a minimum, or only one has."""
    rows, findings = usable(table, COLUMNS)
    findings += contradictions(rows)
    found = (envelope if name == "approach1" else isoflop)(rows, options.resamples, options.seed)
    if len(found.log_flops) < 2:
        told = (
            f"{table.source}: {name} found a best size inside the table at {len(found.log_flops)} budgets and needs 2"
        )
        raise DataError("; ".join([told, *(finding.message for finding in [*findings, *found.findings])]))
    best = power_laws(found.log_flops, found.log_size[None], found.log_tokens[None])
    samples = found.samples[np.all(np.isfinite(found.samples), axis=1)]
    misses = found.log_size - (np.log(best[0, 2]) + best[0, 0] * found.log_flops)
    asked = options.budgets or (float(rows.columns["flops"].max()), 10 * float(rows.columns["flops"].max()))
    objective = 0.5 * float(np.sum(misses**2))
    result = FitResult(
        law=name, equation=EQUATION, source=SOURCE,
        parameters={key: Estimate.of(best[0, at], samples[:, at]) for at, key in enumerate(NAMES)},
        objective=objective, converged=True, starts=1, starts_agreeing=1, start_objectives=(objective,),
        gradient_norm=0.0, loss="squared", delta=None, rows=rows, rows_in_table=len(table), residual_scale=found.scale,
        samples=samples, resample="none" if not options.resamples else "residuals" if found.scale else "sizes",
        optimum=tuple(_optimum(flops, best, samples) for flops in asked),
        backtest=backtest(found) if options.backtest else None,
        details={"minima": [
            {"flops": float(np.exp(c)), "n_params": float(np.exp(n)), "n_tokens": float(np.exp(d))}
            for c, n, d in zip(found.log_flops, found.log_size, found.log_tokens, strict=True)
        ] if name == "approach2" else []},
    )  # fmt: skip
    findings += [*found.findings, *few_budgets(found)]
    if options.resamples:
        findings += intervals(result, options.resamples)
    result = replace(result, findings=(*findings, *beyond(result, SIZE_ERROR)))
    return replace(result, verdict=verdict(result))


def power_laws(log_flops: np.ndarray, log_size: np.ndarray, log_tokens: np.ndarray) -> np.ndarray:
    """a, b, k_N and k_D `[B, 4]` by least squares through `[B, g]` minima; NaN where fewer than two are there."""
    found = []
    for values in (log_size, log_tokens):
        there = np.isfinite(values)
        count = np.maximum(there.sum(axis=1), 1)
        mean_x = np.sum(np.where(there, log_flops, 0), axis=1) / count
        mean_y = np.sum(np.where(there, values, 0), axis=1) / count
        x = np.where(there, log_flops - mean_x[:, None], 0)
        spread = np.sum(x * x, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.sum(x * np.where(there, values - mean_y[:, None], 0), axis=1) / np.where(
                spread > 0, spread, np.nan
            )
        found.append((slope, np.exp(mean_y - slope * mean_x)))
    return np.stack([found[0][0], found[1][0], found[0][1], found[1][1]], axis=1)


def _optimum(flops: float, best: np.ndarray, samples: np.ndarray) -> Optimum:
    both = np.vstack([best, samples])
    size, tokens = both[:, 2] * flops ** both[:, 0], both[:, 3] * flops ** both[:, 1]
    return Optimum(float(flops), Estimate.of(size[0], size[1:]), Estimate.of(tokens[0], tokens[1:]))


def few_budgets(found: Frontier) -> list[Finding]:
    """Too few minima, or too near each other, for an exponent."""
    count = len(found.log_flops)
    reach = float(np.exp(np.ptp(found.log_flops)))
    findings = []
    if count < 3:
        findings.append(
            Finding("few budgets", f"{count} budgets have a minimum: two points make any line", severe=True)
        )
    if reach < 4:
        told = f"narrow: the largest budget with a minimum is only {reach:.3g} times the smallest"
        findings.append(Finding("narrow", told, severe=True))
    return findings


def backtest(found: Frontier) -> Backtest | None:
    """The best size of the largest budget, from the line through the others; None where those are fewer than two."""
    if len(found.log_flops) < 3:
        return None
    order = np.argsort(found.log_flops)
    # Of an envelope's many FLOP counts, the highest tenth; of a few budgets, the highest.
    small, large = order[: -max(1, len(order) // 10)], order[-max(1, len(order) // 10) :]
    law = power_laws(found.log_flops[small], found.log_size[None, small], found.log_tokens[None, small])[0]
    predicted = float(law[2] * np.exp(law[0] * found.log_flops[large].mean()))
    actual = float(np.exp(found.log_size[large].mean()))
    error = predicted / actual - 1
    factor = float(np.exp(found.log_flops[large].max() - found.log_flops[small].max()))
    held = HeldOut(None, actual, predicted, error)
    return Backtest("flops", factor, len(small), (held,), error, error, "the best n_params")


def isoflop(rows: RunTable, resamples: int, seed: int) -> Frontier:
    """Approach 2. Intervals are of residuals drawn among all budgets' and added to their parabolas.

    A budget has few runs: drawing runs would often leave fewer than a parabola needs.
    """
    group = budgets(rows, BUDGET_SPREAD)
    log_n, log_d, y = (np.log(rows.columns[name]) for name in ("n_params", "n_tokens", "loss"))
    log_c = np.log(rows.columns["flops"])
    found, left_out, askew = [], {}, {}
    for at in range(group.max() + 1):
        pick = group == at
        budget = f"{np.exp(np.mean(log_c[pick])):.3g}"
        if np.unique(np.round(log_n[pick], 6)).size < MIN_SIZES:
            left_out.setdefault(f"fewer than {MIN_SIZES} sizes", []).append(budget)
            continue
        curve = _Parabola.through(log_n[pick], log_d[pick], y[pick], float(np.mean(log_c[pick])))
        if curve.problem:
            left_out.setdefault(curve.problem, []).append(budget)
            continue
        if curve.warning:
            askew.setdefault(curve.warning, []).append(budget)
        found.append(curve)
    findings = [Finding("off-centre", f"left out, {why}: {_of(which)}", severe=True) for why, which in left_out.items()]
    findings += [Finding("off-centre", f"{why}: {_of(which)}") for why, which in askew.items()]
    freedom = sum(max(len(curve.y) - 3, 0) for curve in found)
    residuals = np.concatenate([curve.residuals for curve in found if len(curve.y) > 3] or [np.zeros(1)])
    scale = float(np.sqrt(np.sum(residuals**2) / freedom)) if freedom else 0.0
    sizes, tokens = np.empty((resamples, len(found))), np.empty((resamples, len(found)))
    rng = np.random.default_rng(seed)
    widened = residuals * scale / max(float(np.sqrt(np.mean(residuals**2))), 1e-300)
    for at, curve in enumerate(found):
        noisy = curve.predicted + rng.choice(widened, size=(resamples, len(curve.y)))
        sizes[:, at], tokens[:, at] = curve.vertex(noisy)
    if found and not freedom and resamples:
        told = f"no budget has over {MIN_SIZES} sizes: nothing tells the noise, and intervals are points"
        findings.append(Finding("few sizes", told, severe=True))
    log_flops, log_size, log_tokens = np.array([curve.minimum for curve in found]).reshape(-1, 3).T
    samples = power_laws(log_flops, sizes, tokens) if len(found) > 1 else np.empty((0, 4))
    return Frontier(log_flops, log_size, log_tokens, samples, scale, findings)


def _of(budgets: list[str]) -> str:
    return f"budget{'s' if len(budgets) > 1 else ''} of {', '.join(budgets)} FLOPs"


@dataclass(frozen=True)
class _Parabola:
    """Log loss as a parabola of log N at one budget."""

    x: np.ndarray
    middle: float
    y: np.ndarray
    solver: np.ndarray
    tokens: np.ndarray
    log_flops: float

    @classmethod
    def through(cls, log_n: np.ndarray, log_d: np.ndarray, y: np.ndarray, log_flops: float) -> _Parabola:
        middle = float(np.mean(log_n))
        x = log_n - middle
        return cls(x, middle, y, np.linalg.pinv(np.vander(x, 3)), np.polyfit(x, log_d, 1), log_flops)

    @property
    def predicted(self) -> np.ndarray:
        return np.vander(self.x, 3) @ (self.solver @ self.y)

    @property
    def residuals(self) -> np.ndarray:
        return self.y - self.predicted

    @property
    def minimum(self) -> tuple[float, float, float]:
        size, tokens = self.vertex(self.y[None])
        return self.log_flops, float(size[0]), float(tokens[0])

    def vertex(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log N* and log D* `[B]` of losses `y [B, n]`; NaN where the parabola opens downwards."""
        curve, slope, _ = self.solver @ y.T
        with np.errstate(divide="ignore", invalid="ignore"):
            x = np.where(curve > 0, -slope / (2 * curve), np.nan)
        # Twice as far out as runs are there is no telling where a minimum is.
        x = np.clip(x, 2 * self.x.min(), 2 * self.x.max())
        return x + self.middle, np.polyval(self.tokens, x)

    @property
    def problem(self) -> str:
        """Why this parabola has no minimum that could be used; nothing if it has."""
        curve, slope, _ = self.solver @ self.y
        if curve <= 0:
            return "the parabola opens downwards"
        at = -slope / (2 * curve)
        if not self.x.min() <= at <= self.x.max():
            return f"the parabola's minimum is {'smaller' if at < 0 else 'larger'} than any of its runs"
        return ""

    @property
    def warning(self) -> str:
        """What is to be said of one that is used all the same."""
        at = self.minimum[1] - self.middle
        below, above = np.sum(self.x < at), np.sum(self.x > at)
        if min(below, above) < 2:
            return f"off-centre, hardly a run is {'smaller' if below < above else 'larger'} than the minimum"
        return ""


def envelope(rows: RunTable, resamples: int, seed: int) -> Frontier:
    """Approach 1. A size's runs, or the points of its training curve, are its curve, smoothed where there are enough.

    Intervals are of residuals drawn among the points of all curves that are smoothed; where none is, of sizes drawn.
    """
    log_c, log_d, y = (np.log(rows.columns[name]) for name in ("flops", "n_tokens", "loss"))
    size_of = cells(rows, ("n_params",))
    grid = np.linspace(log_c.min(), log_c.max(), FLOP_COUNTS)
    log_n = np.log(rows.columns["n_params"])
    picks = [np.flatnonzero(size_of == at) for at in range(size_of.max() + 1)]
    curves = [_Curve.through(float(log_n[pick[0]]), log_c[pick], log_d[pick], y[pick], grid) for pick in picks]
    if not any(curve.inside.sum() > 1 for curve in curves):
        told = "no size has runs at several FLOP counts: an envelope needs training curves, or sizes that recur"
        raise DataError(f"{rows.source}: approach1: {told}; approach2 fits one run for each size and budget")
    log_size, log_tokens = _lowest(curves, np.stack([curve.smooth @ curve.y for curve in curves])[None])
    inside = np.isfinite(log_size[0])
    findings = []
    if not inside.any():
        told = "at every FLOP count the best size is the smallest or the largest that has one: the frontier is outside"
        findings.append(Finding("edge", told, severe=True))
    freedom = sum(curve.freedom for curve in curves)
    residuals = np.concatenate([curve.residuals for curve in curves if curve.freedom] or [np.zeros(1)])
    scale = float(np.sqrt(np.sum(residuals**2) / freedom)) if freedom else 0.0
    samples = np.empty((0, len(NAMES)))
    if inside.any() and resamples:
        samples = _resampled_envelope(curves, grid, residuals, scale, resamples, seed)
    return Frontier(grid[inside], log_size[0, inside], log_tokens[0, inside], samples, scale, findings)


def _resampled_envelope(
    curves: list[_Curve], grid: np.ndarray, residuals: np.ndarray, scale: float, resamples: int, seed: int
) -> np.ndarray:
    """a, b, k_N and k_D of resamples, `[B, 4]`, on fewer FLOP counts."""
    pick = np.linspace(0, len(grid) - 1, RESAMPLED_COUNTS).astype(int)
    curves = [curve.at(pick) for curve in curves]
    widened = residuals * scale / max(float(np.sqrt(np.mean(residuals**2))), 1e-300)
    rng, found = np.random.default_rng(seed), []
    for at in range(0, resamples, BATCH):
        size = min(BATCH, resamples - at)
        losses = np.empty((size, len(curves), len(pick)))
        for k, curve in enumerate(curves):
            noise = rng.choice(widened, size=(size, len(curve.y)))
            losses[:, k] = (curve.predicted + noise) @ curve.smooth.T
        if not scale:
            counts = rng.multinomial(len(curves), np.full(len(curves), 1 / len(curves)), size=size)
            losses[counts == 0] = np.inf
        found.append(power_laws(grid[pick], *_lowest(curves, losses)))
    return np.concatenate(found)


@dataclass(frozen=True)
class _Curve:
    """A size's log loss over log FLOPs. `smooth [g, n]` takes its points to FLOP counts, of which some are `inside`."""

    log_n: float
    y: np.ndarray
    predicted: np.ndarray
    smooth: np.ndarray
    tokens: np.ndarray
    inside: np.ndarray
    freedom: int

    @classmethod
    def through(cls, log_n: float, log_c: np.ndarray, log_d: np.ndarray, y: np.ndarray, grid: np.ndarray) -> _Curve:
        order = np.argsort(log_c, kind="stable")
        x, log_d, y = log_c[order], log_d[order], y[order]
        inside = (grid >= x[0]) & (grid <= x[-1])
        # A size of one point is a point of the grid, so that a size that was run once can be the best there.
        if len(np.unique(x)) < SMOOTHED_POINTS:
            smooth = np.stack([np.interp(grid, x, unit) for unit in np.eye(len(x))], axis=1)
            return cls(log_n, y, y, smooth, np.interp(grid, x, log_d), inside, 0)
        degree = min(MAX_DEGREE, len(np.unique(x)) // 3)
        middle, half = (x[0] + x[-1]) / 2, (x[-1] - x[0]) / 2
        basis = np.polynomial.chebyshev.chebvander((x - middle) / half, degree)
        solver = np.linalg.pinv(basis)
        on_grid = np.polynomial.chebyshev.chebvander(np.clip((grid - middle) / half, -1, 1), degree)
        freedom = len(x) - degree - 1
        return cls(log_n, y, basis @ (solver @ y), on_grid @ solver, np.interp(grid, x, log_d), inside, freedom)

    @property
    def residuals(self) -> np.ndarray:
        return self.y - self.predicted

    def at(self, pick: np.ndarray) -> _Curve:
        return replace(self, smooth=self.smooth[pick], tokens=self.tokens[pick], inside=self.inside[pick])


def _lowest(curves: list[_Curve], losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log size and log tokens `[B, g]` of the lowest of the curves' losses `[B, k, g]`, infinite where not drawn.

    NaN where it is the smallest or the largest that is there, which says only that the best one is not inside.
    """
    log_n, tokens = np.array([curve.log_n for curve in curves]), np.stack([curve.tokens for curve in curves])
    there = np.stack([curve.inside for curve in curves]) & np.isfinite(losses)
    index = np.argmin(np.where(there, losses, np.inf), axis=1)
    # Curves are in the order of their sizes.
    smallest = np.argmax(there, axis=1)
    largest = len(curves) - 1 - np.argmax(there[:, ::-1], axis=1)
    inside = (index > smallest) & (index < largest)
    size, data = log_n[index], tokens[index, np.arange(tokens.shape[1])]
    return np.where(inside, size, np.nan), np.where(inside, data, np.nan)
