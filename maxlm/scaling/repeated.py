"""The law of data that is repeated (Muennighoff et al. 2023, arXiv:2305.16264)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from maxlm.scaling.law import TINY, Centre, Law, not_negative_least_squares

EXPONENTS = (0.15, 0.3, 0.5, 0.8)
REPEATS = (2.0, 15.0, 100.0)
EXCESS = (2.0, 20.0)


@dataclass(frozen=True)
class DataConstrained(Law):
    """Chinchilla's law of effective sizes: what repeated tokens, and parameters beyond what U warrant, are worth.

    The parameters U_N that U unique tokens warrant are the compute-optimal ones, where alpha A / N^alpha equals
    beta B / U^beta, or N if that is less (section 3.1). Inside, both R_star are logarithms.
    """

    def variables(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        tokens = columns["n_tokens"]
        unique = np.minimum(columns["unique_tokens"], tokens)
        return np.log(np.stack([columns["n_params"], tokens, unique], axis=-1))

    def middle(self, variables: np.ndarray) -> np.ndarray:
        size, tokens, _ = np.mean(variables, axis=0)
        return np.array([size, tokens, tokens])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.log(0.05), np.log(1e4)
        return np.array([0, 1e-9, 1e-9, 1e-3, 1e-3, low, low]), np.array([np.inf, np.inf, np.inf, 3, 3, high, high])

    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        e, a, b, alpha, beta, log_rn, log_rd = (column[:, None] for column in theta.T)
        size, tokens, unique = z.T
        warranted, slopes = _warranted(a, b, alpha, beta, unique)
        n, n_base, n_rate = _effective(size, np.minimum(warranted, size), np.exp(log_rn))
        d, _, d_rate = _effective(tokens, unique, np.exp(log_rd))
        of_size, of_data = np.exp(-alpha * n), np.exp(-beta * d)
        total = np.maximum(e + a * of_size + b * of_data, TINY)
        # Through N', which depends on A, B, alpha and beta where the size is beyond what the data warrant.
        through = -alpha * a * of_size * np.where(warranted < size, n_base, 0.0)
        found = [
            np.ones_like(total),
            of_size + through * slopes[0],
            of_data + through * slopes[1],
            -n * a * of_size + through * slopes[2],
            -d * b * of_data + through * slopes[3],
            -alpha * a * of_size * n_rate,
            -beta * b * of_data * d_rate,
        ]
        return np.log(total), np.stack(found, axis=1) / total[:, None, :]

    def starts(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        size, tokens, unique = z.T
        found = []
        for alpha, beta, rn, rd in itertools.product(EXPONENTS, EXPONENTS, EXCESS, REPEATS):
            d, *_ = _effective(tokens, unique, np.asarray(rd))
            n = size
            for _ in range(2):  # A and B without excess parameters first, and with those that they tell
                shapes = np.exp(np.stack([-y, -alpha * n - y, -beta * d - y]))
                e, a, b = np.maximum(not_negative_least_squares(shapes[None])[0], (0, 1e-6, 1e-6))
                warranted, _ = _warranted(a, b, alpha, beta, unique)
                n, *_ = _effective(size, np.minimum(warranted, size), np.asarray(rn))
            found.append((e, a, b, alpha, beta, np.log(rn), np.log(rd)))
        return np.array(found)

    def natural(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        found = np.array(theta, np.float64)
        scale = np.exp(centre.target)
        found[:, 0] *= scale
        found[:, 1] *= scale * np.exp(theta[:, 3] * centre.variables[0])
        found[:, 2] *= scale * np.exp(theta[:, 4] * centre.variables[1])
        found[:, 5:] = np.exp(theta[:, 5:])
        return found

    def internal(self, natural: np.ndarray, centre: Centre) -> np.ndarray:
        found = np.array(natural, np.float64)
        scale = np.exp(-centre.target)
        found[:, 0] *= scale
        found[:, 1] *= scale * np.exp(-natural[:, 3] * centre.variables[0])
        found[:, 2] *= scale * np.exp(-natural[:, 4] * centre.variables[1])
        found[:, 5:] = np.log(natural[:, 5:])
        return found


def _warranted(a, b, alpha, beta, unique) -> tuple[np.ndarray, tuple]:
    """log N where alpha A / N^alpha = beta B / U^beta, and its derivatives by A, B, alpha and beta."""
    found = (np.log(alpha * a) - np.log(beta * b) + beta * unique) / alpha
    slopes = (1 / (alpha * a), -1 / (alpha * b), (1 / alpha - found) / alpha, (unique - 1 / beta) / alpha)
    return found, slopes


def _effective(total: np.ndarray, base: np.ndarray, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log of U (1 + R (1 - exp(-(x / U - 1) / R))) for log x, log U and R, and its derivatives by log U and log R."""
    excess = np.expm1(np.minimum(total - base, 50.0))
    decay = np.exp(-excess / rate)
    worth = 1 + rate * (1 - decay)
    return base + np.log(worth), 1 - decay * (excess + 1) / worth, (rate * (1 - decay) - excess * decay) / worth
