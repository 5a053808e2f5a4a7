"""Many robust nonlinear fits at once, in float64.

Levenberg-Marquardt for the sum of Huber's losses, S problems side by side: starts that share rows and weights, or
resamples that share rows and differ in weights. Each problem has its own damping and stops by its own gradient.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from maxlm.scaling.law import Law
from maxlm.scaling.losses import Huber, LossKind, objective, smoothed

# The gradient of a parameter is a sum over rows; at a minimum its terms cancel to this share of their size.
TOLERANCE = 1e-8
# Residuals below this are rounding: a gradient that is made of them is zero.
ROUNDING = 1e-6
MAX_ITERATIONS = 300
# Elements of a Jacobian in one chunk: 8 MB, which stays in a core's cache for the most part.
CHUNK_ELEMENTS = 1 << 20
FIRST_DAMPING = 1.0
LESS, MORE = 0.2, 10.0
MIN_DAMPING, RESTART_DAMPING, MAX_DAMPING = 1e-12, 1e-3, 1e10


@dataclass(frozen=True)
class Minima:
    """Where S problems ended: `theta [S, p]`; the objective, relative gradient, whether converged, and iterations."""

    theta: np.ndarray
    objective: np.ndarray
    gradient: np.ndarray
    converged: np.ndarray
    iterations: np.ndarray


def minimise(
    law: Law, z: np.ndarray, y: np.ndarray, weights: np.ndarray, starts: np.ndarray, kind: LossKind, delta: float
) -> Minima:
    """Minimises the loss of `law` from each of `starts [S, p]`; `y` and `weights` are `[n]`, or `[S, n]` by problem."""
    y, weights = np.atleast_2d(y), np.atleast_2d(weights)
    size = max(1, CHUNK_ELEMENTS // (starts.shape[1] * len(z)))
    parts = [slice(at, at + size) for at in range(0, len(starts), size)]

    def run(part: slice) -> Minima:
        return _minimise_chunk(
            law,
            z,
            y if len(y) == 1 else y[part],
            weights if len(weights) == 1 else weights[part],
            starts[part],
            kind,
            delta,
        )

    if len(parts) == 1:
        return run(parts[0])
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1, 8)) as pool:
        done = list(pool.map(run, parts))
    return Minima(*(np.concatenate([getattr(part, name) for part in done]) for name in Minima.__dataclass_fields__))


def _minimise_chunk(
    law: Law, z: np.ndarray, y: np.ndarray, weights: np.ndarray, starts: np.ndarray, kind: LossKind, delta: float
) -> Minima:
    theta, found, total = starts, None, np.zeros(len(starts), int)
    for loss in smoothed(kind, delta):
        found = _Descent(law, z, y, weights, theta, loss).run()
        theta, total = found.theta, total + found.iterations
    assert found is not None
    value = objective(kind, delta, law.evaluate(theta, z)[0] - y, weights)
    return Minima(theta, value, found.gradient, found.converged, total)


class _Descent:
    """The state of a chunk of problems; those in `alive` are not done yet."""

    def __init__(
        self, law: Law, z: np.ndarray, y: np.ndarray, weights: np.ndarray, starts: np.ndarray, loss: Huber
    ) -> None:
        self.law, self.z, self.loss = law, z, loss
        self.lower, self.upper = law.bounds()
        shape = (len(starts), len(z))
        self.y, self.weights = np.broadcast_to(y, shape), np.broadcast_to(weights, shape)
        self.theta = np.clip(starts, self.lower, self.upper)
        self.gradient_norm = np.full(len(starts), np.inf)
        self.converged = np.zeros(len(starts), bool)
        self.iterations = np.zeros(len(starts), int)

    def run(self) -> Minima:
        y, weights = self.y, self.weights
        theta, alive = self.theta.copy(), np.arange(len(self.theta))
        damping = np.full(len(alive), FIRST_DAMPING)
        now = self._measure(theta, y, weights)
        values = np.empty(len(theta))
        for iteration in range(MAX_ITERATIONS + 1):
            stop = (now.norm <= TOLERANCE) | (damping > MAX_DAMPING) | (iteration == MAX_ITERATIONS)
            if stop.any():
                done = alive[stop]
                self.theta[done], self.gradient_norm[done], values[done] = theta[stop], now.norm[stop], now.value[stop]
                self.converged[done], self.iterations[done] = now.norm[stop] <= TOLERANCE, iteration
                go = ~stop
                alive, theta, damping, now = alive[go], theta[go], damping[go], now.take(go)
                y, weights = y[go], weights[go]
                if not len(alive):
                    break
            trial = np.clip(theta + self._step(theta, now, weights, damping), self.lower, self.upper)
            then = self._measure(trial, y, weights)
            # Near the minimum the objective is flat to rounding, and the gradient decides.
            same = then.value <= now.value + 1e-13 * np.abs(now.value)
            good = (then.value < now.value) | (same & (then.norm < now.norm))
            theta = np.where(good[:, None], trial, theta)
            now.put(good, then)
            damping = np.where(
                good, np.maximum(damping * LESS, MIN_DAMPING), np.maximum(damping, RESTART_DAMPING) * MORE
            )
        return Minima(self.theta, values, self.gradient_norm, self.converged, self.iterations)

    def _step(self, theta: np.ndarray, now: _State, weights: np.ndarray, damping: np.ndarray) -> np.ndarray:
        """Newton's matrix where the loss is curved, plus damping times the one of reweighted least squares.

        With damping 1 the sum lies above the loss (iteratively reweighted least squares descends); with 0 it is the
        semismooth Newton matrix of the linearised law.
        """
        curvature = self.loss.curvature(now.r) + damping[:, None] * self.loss.weight(now.r)
        matrix = (now.jacobian * (weights * curvature)[:, None, :]) @ now.jacobian.swapaxes(1, 2)
        free = ~((theta <= self.lower) & (now.gradient > 0)) & ~((theta >= self.upper) & (now.gradient < 0))
        both = free[:, :, None] & free[:, None, :]
        diagonal = np.einsum("spp->sp", matrix)
        size = np.sqrt(np.where(free & (diagonal > 0), diagonal, 1.0))
        ridge = 1e-14 + 1e-2 * damping / (1 + damping)
        scaled = np.where(both, matrix / (size[:, :, None] * size[:, None, :]), 0.0)
        scaled += np.eye(theta.shape[1]) * np.where(free, ridge[:, None], 1.0)[:, :, None]
        right = np.where(free, now.gradient, 0.0) / size
        return -np.linalg.solve(scaled, right[..., None])[..., 0] / size

    def _measure(self, theta: np.ndarray, y: np.ndarray, weights: np.ndarray) -> _State:
        f, jacobian = self.law.evaluate(theta, self.z)
        r = f - y
        slope = weights * self.loss.slope(r)
        gradient = np.matmul(jacobian, slope[..., None])[..., 0]
        size = np.matmul(np.abs(jacobian), (np.abs(slope) + ROUNDING * weights)[..., None])[..., 0]
        free = ~((theta <= self.lower) & (gradient > 0)) & ~((theta >= self.upper) & (gradient < 0))
        norm = np.max(np.where(free, np.abs(gradient) / np.maximum(size, 1e-300), 0.0), axis=1)
        value = np.sum(weights * self.loss.value(r), axis=1)
        bad = ~np.isfinite(value)
        value[bad], norm[bad] = np.inf, np.inf
        return _State(r, jacobian, gradient, value, norm)


@dataclass
class _State:
    """At some theta: residuals `[S, n]`, Jacobian `[S, p, n]`, gradient `[S, p]`, objective and its norm `[S]`."""

    r: np.ndarray
    jacobian: np.ndarray
    gradient: np.ndarray
    value: np.ndarray
    norm: np.ndarray

    def take(self, keep: np.ndarray) -> _State:
        return _State(*(getattr(self, name)[keep] for name in _State.__dataclass_fields__))

    def put(self, where: np.ndarray, other: _State) -> None:
        for name in _State.__dataclass_fields__:
            getattr(self, name)[where] = getattr(other, name)[where]
