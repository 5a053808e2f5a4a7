"""Tables of runs made from laws whose parameters are known, with the formulas as the papers print them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from maxlm.scaling.table import RunTable

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Known:
    """A law's true parameters in its own order, its formula in plain NumPy, and the runs of a table."""

    truth: dict[str, float]
    formula: Callable[..., np.ndarray]
    design: Callable[[np.random.Generator, int], Columns]
    target: str = "loss"
    rows: int = 160
    noise: float = 0.005

    def table(self, seed: int, noise: float | None = None, rows: int | None = None) -> RunTable:
        """A table whose target has Gaussian noise: of its logarithm, or of an accuracy itself."""
        rng = np.random.default_rng(seed)
        columns = self.design(rng, rows or self.rows)
        exact = self.formula(**columns, **{name.replace("lambda", "lambda_"): v for name, v in self.truth.items()})
        error = (self.noise if noise is None else noise) * rng.standard_normal(len(exact))
        columns[self.target] = exact + error if self.target == "accuracy" else exact * np.exp(error)
        if self.target in ("learning_rate", "batch_tokens"):
            columns.pop("loss", None)
        return RunTable(columns)


def log_uniform(rng: np.random.Generator, low: float, high: float, n: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), n))


def sizes_and_tokens(rng: np.random.Generator, n: int) -> Columns:
    size = log_uniform(rng, 3e7, 1e10, n)
    return {"n_params": size, "n_tokens": size * log_uniform(rng, 2, 300, n)}


def with_repeats(rng: np.random.Generator, n: int) -> Columns:
    columns = sizes_and_tokens(rng, n)
    size = log_uniform(rng, 3e7, 1e10, n)
    tokens = log_uniform(rng, 1e9, 1e12, n)
    epochs = np.where(rng.random(n) < 0.3, 1.0, log_uniform(rng, 1, 200, n))
    return {**columns, "n_params": size, "n_tokens": tokens, "unique_tokens": tokens / epochs}


def of_experts(rng: np.random.Generator, n: int) -> Columns:
    size = log_uniform(rng, 1e7, 3e11, n)
    sparsity = rng.choice([0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98], n)
    tokens = log_uniform(rng, 1e9, 2e12, n)
    return {"n_params": size, "n_params_active": size * (1 - sparsity), "n_tokens": tokens}


def chinchilla(n_params, n_tokens, E, A, B, alpha, beta, **_):
    return E + A / n_params**alpha + B / n_tokens**beta


def kaplan_nd(n_params_nonembedding, n_tokens, N_c, D_c, alpha_N, alpha_D, **_):
    return ((N_c / n_params_nonembedding) ** (alpha_N / alpha_D) + D_c / n_tokens) ** alpha_D


def over_training(n_params, n_tokens, E, a, b, eta, **_):
    flops, ratio = 6 * n_params * n_tokens, n_tokens / n_params
    return E + (a * ratio**eta + b * ratio**-eta) * flops**-eta


def data_constrained(n_params, n_tokens, unique_tokens, E, A, B, alpha, beta, R_N_star, R_D_star, **_):
    """As Muennighoff et al. write it, with G and the optimal size of the unique tokens."""
    g = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    u_n = np.minimum((unique_tokens * g) ** (beta / alpha) * g, n_params)
    r_n, r_d = n_params / u_n - 1, n_tokens / unique_tokens - 1
    n_eff = u_n + u_n * R_N_star * (1 - np.exp(-r_n / R_N_star))
    d_eff = unique_tokens + unique_tokens * R_D_star * (1 - np.exp(-r_d / R_D_star))
    return E + A / n_eff**alpha + B / d_eff**beta


def moe(n_params, n_tokens, n_params_active, e, a, b, c, d, alpha, beta, lambda_, delta, gamma, **_):
    s = 1 - n_params_active / n_params
    return (
        e + a / n_params**alpha + b / n_tokens**beta + c / (1 - s) ** lambda_ + d / ((1 - s) ** delta * n_params**gamma)
    )


def sigmoid(loss, floor, ceiling, slope, midpoint, **_):
    return floor + (ceiling - floor) / (1 + np.exp(slope * (loss - midpoint)))


PF_DAY = 1e15 * 24 * 3600
KNOWN: dict[str, Known] = {
    # The published re-fit of Chinchilla's data (Besiroglu et al. 2024, arXiv:2404.10102, table 1).
    "chinchilla": Known(
        {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}, chinchilla, sizes_and_tokens
    ),
    "kaplan-n": Known(
        {"N_c": 8.8e13, "alpha_N": 0.076},
        lambda n_params_nonembedding, N_c, alpha_N: (N_c / n_params_nonembedding) ** alpha_N,
        lambda rng, n: {"n_params_nonembedding": log_uniform(rng, 1e5, 1e9, n)},
        rows=40,
    ),
    "kaplan-d": Known(
        {"D_c": 5.4e13, "alpha_D": 0.095},
        lambda n_tokens, D_c, alpha_D: (D_c / n_tokens) ** alpha_D,
        lambda rng, n: {"n_tokens": log_uniform(rng, 2e7, 2e10, n)},
        rows=40,
    ),
    "kaplan-c": Known(
        {"C_c": 3.1e8 * PF_DAY, "alpha_C": 0.050},
        lambda flops, C_c, alpha_C: (C_c / flops) ** alpha_C,
        lambda rng, n: {"flops": np.geomspace(1e-6, 1, n) * PF_DAY},
        rows=40,
    ),
    "kaplan-nd": Known(
        {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
        kaplan_nd,
        lambda rng, n: {
            "n_params_nonembedding": log_uniform(rng, 1e6, 1e9, n), "n_tokens": log_uniform(rng, 2e7, 2e10, n)
        },
    ),
    "saturating": Known(
        {"L_inf": 1.7, "N_c": 3e8, "alpha": 0.25},
        lambda n_params, L_inf, N_c, alpha: L_inf + (N_c / n_params) ** alpha,
        lambda rng, n: {"n_params": log_uniform(rng, 1e6, 1e11, n)},
        rows=60,
    ),
    "over-training": Known(
        {"E": 1.8, "a": 140.0, "b": 150.0, "eta": 0.14}, over_training,
        lambda rng, n: sizes_and_tokens(rng, n),
    ),
    "data-constrained": Known(
        {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353, "R_N_star": 5.31, "R_D_star": 15.4},
        data_constrained, with_repeats, rows=240,
    ),
    "moe": Known(
        {"e": 0.94, "a": 16612.5, "b": 5455.67, "c": 0.4598, "d": 17.26,
             "alpha": 0.5962, "beta": 0.3954, "lambda": -0.1666, "delta": 0.1603, "gamma": 0.1595},
        moe, of_experts, rows=300, noise=0.002,
    ),
    "learning-rate": Known(
        {"c": 1.79, "a": -0.713, "b": 0.307},
        lambda n_params, n_tokens, c, a, b: c * n_params**a * n_tokens**b,
        sizes_and_tokens, target="learning_rate", rows=60, noise=0.1,
    ),
    "batch": Known(
        {"c": 0.58, "b": 0.571}, lambda n_tokens, c, b: c * n_tokens**b,
        lambda rng, n: {"n_tokens": log_uniform(rng, 1e9, 1e12, n)}, target="batch_tokens", rows=60, noise=0.1,
    ),
    "downstream": Known(
        {"floor": 0.25, "ceiling": 0.9, "slope": 3.0, "midpoint": 2.4}, sigmoid,
        lambda rng, n: {"loss": rng.uniform(1.2, 4.2, n)}, target="accuracy", rows=80, noise=0.01,
    ),
}  # fmt: skip
