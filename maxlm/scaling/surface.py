"""The loss over size and tokens as fitted laws have it, one law a sample, and where along a line it is least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from maxlm.errors import ConfigError

SURFACES = ("chinchilla", "over-training", "kaplan-nd", "data-constrained")

# Two points of a scan bracket the minimum, golden section narrows the bracket to rounding: 0.618^60 is 3e-13.
SCAN_POINTS = 257
GOLDEN_STEPS = 60
GOLDEN = (np.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Surface:
    """L(N, D) of S samples of a law in `SURFACES`; sizes, tokens and losses are `[S]` or `[S, k]`.

    `natural [S, p]` are the parameters of the law's equation, `unique_tokens` the U of `data-constrained` (None: all
    tokens are fresh). N is what the law's own column counts: without embeddings for kaplan-nd.
    """

    law: str
    parameters: tuple[str, ...]
    natural: np.ndarray
    unique_tokens: float | None = None

    def _named(self, rank: int) -> dict[str, np.ndarray]:
        columns = self.natural.T if rank == 1 else self.natural.T[:, :, None]
        return dict(zip(self.parameters, columns, strict=True))

    def loss(self, size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The loss of models of `size` parameters after `tokens`."""
        p = self._named(np.ndim(size))
        with np.errstate(all="ignore"):
            if self.law == "chinchilla":
                return p["E"] + p["A"] / size ** p["alpha"] + p["B"] / tokens ** p["beta"]
            if self.law == "over-training":
                # C = 6ND makes (a M^eta + b M^-eta) C^-eta a sum of powers of N and of D.
                eta, scale = p["eta"], 6.0 ** -p["eta"]
                return p["E"] + scale * (p["a"] / size ** (2 * eta) + p["b"] / tokens ** (2 * eta))
            if self.law == "kaplan-nd":
                rho = p["alpha_N"] / p["alpha_D"]
                return ((p["N_c"] / size) ** rho + p["D_c"] / tokens) ** p["alpha_D"]
            return self._repeated(p, size, tokens)

    def _repeated(self, p: dict[str, np.ndarray], size: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Muennighoff et al., arXiv:2305.16264, section 3.1: N and D replaced by what they are worth."""
        unique = np.minimum(np.inf if self.unique_tokens is None else self.unique_tokens, tokens)
        slopes = p["alpha"] * p["A"] / (p["beta"] * p["B"])
        warranted = np.minimum((slopes * unique ** p["beta"]) ** (1 / p["alpha"]), size)
        n = warranted * (1 - p["R_N_star"] * np.expm1((1 - size / warranted) / p["R_N_star"]))
        d = unique * (1 - p["R_D_star"] * np.expm1((1 - tokens / unique) / p["R_D_star"]))
        return p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"]

    def tokens_for(self, size: np.ndarray, loss: np.ndarray) -> np.ndarray:
        """After how many tokens a model has this loss; infinite where it never has.

        Raises ConfigError for data-constrained, by which no number of passes may do and there is no closed form.
        """
        p = self._named(np.ndim(size))
        with np.errstate(all="ignore"):
            if self.law == "chinchilla":
                rest, scale, exponent = loss - p["E"] - p["A"] / size ** p["alpha"], p["B"], 1 / p["beta"]
            elif self.law == "over-training":
                eta, scale = p["eta"], p["b"] * 6.0 ** -p["eta"]
                rest, exponent = loss - p["E"] - p["a"] * 6.0**-eta / size ** (2 * eta), 1 / (2 * eta)
            elif self.law == "kaplan-nd":
                rest = loss ** (1 / p["alpha_D"]) - (p["N_c"] / size) ** (p["alpha_N"] / p["alpha_D"])
                scale, exponent = p["D_c"], 1.0
            else:
                raise ConfigError(
                    f"law {self.law} does not say how many tokens reach a loss; take another, or ask within a budget"
                )
            return np.where(rest > 0, (scale / np.maximum(rest, 1e-300)) ** exponent, np.inf)


def least(
    value: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where S functions of one variable with one minimum each are least between `low [S]` and `high [S]`.

    `value` takes `[S, k]` to `[S, k]`; what is not finite is out of the question. The place, the value, and whether the
    place is an end: 0, -1 (`low`) or 1 (`high`), `[S]` each; NaN where nothing is finite. Good to about 1e-7 in the
    variable, as far as float64 tells values near a minimum apart.
    """

    def at(x: np.ndarray) -> np.ndarray:
        found = value(x[:, None] if x.ndim == 1 else x)
        found = np.where(np.isfinite(found), found, np.inf)
        return found[:, 0] if x.ndim == 1 else found

    rows = np.arange(len(low))
    grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, SCAN_POINTS)
    seen = at(grid)
    best = np.argmin(seen, axis=1)
    left, right = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, SCAN_POINTS - 1)]
    a, b = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
    at_a, at_b = at(a), at(b)
    for _ in range(GOLDEN_STEPS):
        lower = at_a <= at_b
        left, right = np.where(lower, left, a), np.where(lower, b, right)
        a, b, was_a, was_b = (
            np.where(lower, right - GOLDEN * (right - left), b), np.where(lower, a, left + GOLDEN * (right - left)),
            at_a, at_b,
        )  # fmt: skip
        fresh = at(np.where(lower, a, b))
        at_a, at_b = np.where(lower, fresh, was_b), np.where(lower, was_a, fresh)
    inner = np.where(at_a <= at_b, a, b)
    places = np.stack([inner, low, high])
    values = np.stack([np.minimum(at_a, at_b), seen[:, 0], seen[:, -1]])
    which = np.argmin(values, axis=0)
    # An end counts as one also where the section came to it within rounding.
    near = 1e-7
    which = np.where((which == 0) & (high - inner < near), 2, np.where((which == 0) & (inner - low < near), 1, which))
    found, x = values[which, rows], places[which, rows]
    nothing = ~np.isfinite(found)
    return np.where(nothing, np.nan, x), np.where(nothing, np.nan, found), np.array([0, -1, 1])[which]
