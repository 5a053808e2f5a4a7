"""Intervals by the bootstrap: the law fitted again to resampled runs, all resamples side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from maxlm.scaling.engine import Minima, minimise
from maxlm.scaling.law import Law
from maxlm.scaling.losses import LossKind

Resample = Literal["runs", "residuals"]
# Resamples at a time: their rows and weights are 32 MB at 1,000 rows.
BATCH = 2000
# The share of resamples that other starts are tried on; if one ends lower anywhere, all resamples try them.
PROBED = 0.05
BETTER = 1e-6
INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Fitted:
    """A law at its best fit: variables `z [n, v]`, target `y [n]`, parameters `theta [p]`, and other minima `[k, p]`."""

    law: Law
    z: np.ndarray
    y: np.ndarray
    theta: np.ndarray
    others: np.ndarray
    kind: LossKind
    delta: float


def resampled(fitted: Fitted, clusters: np.ndarray, resamples: int, how: Resample, seed: int) -> np.ndarray:
    """The inner parameters of `resamples` fits that converged, `[B, p]`.

    `runs` draws clusters (a run and what branched off it, `[n]`) with replacement, as weights of rows that all resamples
    share (Efron 1979). `residuals` keeps every row and draws its residual from those of all rows, widened by
    sqrt(n / (n - p)) for the parameters fitted: for tables so small that many draws of runs would lack what
    determines a parameter.
    """
    rng = np.random.default_rng(seed)
    parts = [min(BATCH, resamples - at) for at in range(0, resamples, BATCH)]
    return np.concatenate([_batch(fitted, clusters, size, how, rng) for size in parts])


def _batch(fitted: Fitted, clusters: np.ndarray, size: int, how: Resample, rng: np.random.Generator) -> np.ndarray:
    n, n_parameters = len(fitted.y), len(fitted.theta)
    if how == "runs":
        n_clusters = int(clusters.max()) + 1
        counts = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=size)
        y, weights = fitted.y, counts[:, clusters].astype(np.float64)
    else:
        predicted = fitted.law.evaluate(fitted.theta[None], fitted.z)[0][0]
        residuals = (fitted.y - predicted) * np.sqrt(n / max(n - n_parameters, 1))
        y, weights = predicted + residuals[rng.integers(n, size=(size, n))], np.ones(n)
    best = _from(fitted, y, weights, fitted.theta)
    found, value, converged = best.theta.copy(), best.objective.copy(), best.converged.copy()
    probe = np.zeros(size, bool)
    probe[: int(np.ceil(PROBED * size))] = True
    probe |= ~converged
    for start in fitted.others:
        if _improve(fitted, y, weights, start, probe, found, value, converged) and not probe.all():
            rest = ~probe
            probe[:] = True
            _improve(fitted, y, weights, start, rest, found, value, converged)
    return found[converged]


def _improve(
    fitted: Fitted, y: np.ndarray, weights: np.ndarray, start: np.ndarray, which: np.ndarray,
    found: np.ndarray, value: np.ndarray, converged: np.ndarray,
) -> bool:  # fmt: skip
    """Starts the resamples `which` from `start` too, and keeps what ends lower; whether any that had converged did."""
    pick = np.flatnonzero(which)
    other = _from(
        fitted, y[pick] if y.ndim == 2 else y, weights[pick] if weights.ndim == 2 else weights, start, len(pick)
    )
    lower = other.converged & ((other.objective < value[pick] * (1 - BETTER)) | ~converged[pick])
    surprise = bool(np.any(lower & converged[pick]))
    found[pick[lower]], value[pick[lower]] = other.theta[lower], other.objective[lower]
    converged[pick[lower]] = True
    return surprise


def _from(fitted: Fitted, y: np.ndarray, weights: np.ndarray, start: np.ndarray, size: int | None = None) -> Minima:
    size = max(len(np.atleast_2d(y)), len(np.atleast_2d(weights))) if size is None else size
    starts = np.repeat(start[None], size, axis=0)
    return minimise(fitted.law, fitted.z, y, weights, starts, fitted.kind, fitted.delta)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The percentile interval of 95%; NaN without samples."""
    finite = samples[~np.isnan(samples)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, INTERVAL)
    return float(low), float(high)
