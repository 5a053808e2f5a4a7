"""Losses of residuals, summed over rows: Huber's, absolute (LAD) and squared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

LossKind = Literal["huber", "lad", "squared"]
# LAD is Huber's loss over its delta, as delta goes to 0: the last leaves at most delta / 2 a row between the two.
LAD_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True)
class Huber:
    """r^2 / 2 up to `delta` and delta (|r| - delta / 2) beyond (Huber 1964); with delta infinite, half the square.

    The sum over rows, not the mean: with the delta of 1e-3 that Hoffmann et al. use (arXiv:2203.15556, section D.2), a
    mean is of the order of 1e-6, and an optimizer with an absolute tolerance stops where it starts.
    """

    delta: float

    def value(self, r: np.ndarray) -> np.ndarray:
        """The loss of each residual, in the shape of `r`."""
        size = np.abs(r)
        if math.isinf(self.delta):
            return 0.5 * r * r
        inner = np.minimum(size, self.delta)
        return inner * (size - 0.5 * inner)

    def slope(self, r: np.ndarray) -> np.ndarray:
        """The derivative: the residual, cut off at delta."""
        return r if math.isinf(self.delta) else np.clip(r, -self.delta, self.delta)

    def curvature(self, r: np.ndarray) -> np.ndarray:
        """The second derivative, which is 0 beyond delta."""
        return np.ones_like(r) if math.isinf(self.delta) else (np.abs(r) <= self.delta).astype(r.dtype)

    def weight(self, r: np.ndarray) -> np.ndarray:
        """slope / r: the parabola of this curvature through r lies above the loss."""
        if math.isinf(self.delta):
            return np.ones_like(r)
        return self.delta / np.maximum(np.abs(r), self.delta)


def smoothed(kind: LossKind, delta: float) -> tuple[Huber, ...]:
    """The losses to minimise one after another, each from where the one before it ended."""
    if kind == "squared":
        return (Huber(math.inf),)
    return tuple(Huber(step) for step in LAD_DELTAS) if kind == "lad" else (Huber(delta),)


def objective(kind: LossKind, delta: float, r: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What is minimised: the weighted sum over the last axis of Huber's loss, of |r|, or of r^2 / 2."""
    if kind == "lad":
        return np.sum(weights * np.abs(r), axis=-1)
    return np.sum(weights * smoothed(kind, delta)[0].value(r), axis=-1)
