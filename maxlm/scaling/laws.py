"""The laws by name, with their equations and sources."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from maxlm.errors import ConfigError
from maxlm.scaling.law import Centre, Exponent, Law, Term, TermsLaw, not_negative_least_squares
from maxlm.scaling.repeated import DataConstrained

GRID = (0.05, 0.12, 0.2, 0.3, 0.42, 0.56, 0.75, 1.0)
KAPLAN = "Kaplan et al. 2020, arXiv:2001.08361"


@dataclass(frozen=True)
class KaplanND(Law):
    """L(N, D) of Kaplan et al., eq. 1.5. Inside: rho log(N_c / N) and log(D_c / D) at the centre, and the exponents."""

    def variables(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.log(np.stack([columns["n_params_nonembedding"], columns["n_tokens"]], axis=-1))

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array([-60.0, -60.0, 1e-3, 1e-3]), np.array([60.0, 60.0, 3.0, 3.0])

    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, v, alpha_n, alpha_d = (column[:, None] for column in theta.T)
        rho, n, d = alpha_n / alpha_d, z[:, 0], z[:, 1]
        of_size, of_data = u - rho * n, v - d
        total = np.logaddexp(of_size, of_data)
        share = np.exp(of_size - total)
        slopes = [alpha_d * share, alpha_d * (1 - share), -share * n, total + share * n * rho]
        return alpha_d * total, np.stack(slopes, axis=1)

    def starts(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        found = []
        for alpha_n, alpha_d in itertools.product(GRID, GRID):
            size = -alpha_n / alpha_d * z[:, 0] - y / alpha_d
            data = -z[:, 1] - y / alpha_d
            shapes = np.exp(np.clip(np.stack([size, data]), -300, 300))
            u, v = np.log(np.maximum(not_negative_least_squares(shapes[None])[0], 1e-12))
            found.append((u, v, alpha_n, alpha_d))
        return np.array(found)

    def natural(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        u, v, alpha_n, alpha_d = theta.T
        inside = centre.target / alpha_d
        n_c = centre.variables[0] + (u + inside) * alpha_d / alpha_n
        d_c = centre.variables[1] + v + inside
        return np.stack([*np.exp(np.minimum([n_c, d_c], 700)), alpha_n, alpha_d], axis=-1)

    def internal(self, natural: np.ndarray, centre: Centre) -> np.ndarray:
        n_c, d_c, alpha_n, alpha_d = natural.T
        inside = centre.target / alpha_d
        u = (np.log(n_c) - centre.variables[0]) * alpha_n / alpha_d - inside
        return np.stack([u, np.log(d_c) - centre.variables[1] - inside, alpha_n, alpha_d], axis=-1)


@dataclass(frozen=True)
class Downstream(Law):
    """Accuracy of a task as a sigmoid of the loss. Linear in its target: residuals are of accuracies."""

    def variables(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        return columns["loss"][:, None]

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array([0.0, 0.0, 1e-2, -20.0]), np.array([1.0, 1.0, 200.0, 20.0])

    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        floor, ceiling, slope, middle = (column[:, None] for column in theta.T)
        away = z[:, 0] - middle
        high = 0.5 - 0.5 * np.tanh(0.5 * slope * away)
        steep = (ceiling - floor) * high * (1 - high)
        return floor + (ceiling - floor) * high, np.stack([1 - high, high, -away * steep, slope * steep], axis=1)

    def starts(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        found = []
        for slope, middle in itertools.product(
            (0.5, 1, 2, 4, 8, 16), np.quantile(z[:, 0], (0.0, 0.25, 0.5, 0.75, 1.0))
        ):
            high = 0.5 - 0.5 * np.tanh(0.5 * slope * (z[:, 0] - middle))
            levels, *_ = np.linalg.lstsq(np.stack([1 - high, high], axis=1), y, rcond=None)
            found.append((*np.clip(levels, 0, 1), slope, middle))
        return np.array(found)

    def natural(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        return theta + np.array([0, 0, 0, centre.variables[0]])

    def internal(self, natural: np.ndarray, centre: Centre) -> np.ndarray:
        return natural - np.array([0, 0, 0, centre.variables[0]])


def _power(name: str, title: str, equation: str, source: str, column: str, scale: str, exponent: str) -> TermsLaw:
    """(X_c / x)^alpha, of the best run at each x."""
    return TermsLaw(
        name=name, title=title, equation=equation, source=source, columns=(column,), parameters=(scale, exponent),
        terms=(Term(scale, ((exponent, column, -1),), scale=True),), exponents=(Exponent(exponent, grid=GRID[:4]),),
        best_of=(column,),
    )  # fmt: skip


def _optimal(name: str, title: str, equation: str, source: str, target: str, factors: dict[str, str]) -> TermsLaw:
    """c x product of x^exponent for the best setting, found at each point of the grid."""
    return TermsLaw(
        name=name, title=title, equation=equation, source=source, columns=tuple(factors), target=target,
        parameters=("c", *factors.values()), of_optima=True, delta=0.05,
        terms=(Term("c", tuple((exponent, column, 1) for column, exponent in factors.items())),),
        exponents=tuple(Exponent(exponent, -3, 3, (-0.7, 0.0, 0.7)) for exponent in factors.values()),
    )  # fmt: skip


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        TermsLaw(
            name="chinchilla", title="Chinchilla, approach 3", equation="L(N, D) = E + A / N^alpha + B / D^beta",
            source="Hoffmann et al. 2022, arXiv:2203.15556, eq. 2",
            columns=("n_params", "n_tokens"), parameters=("E", "A", "B", "alpha", "beta"),
            terms=(Term("E"), Term("A", (("alpha", "n_params", -1),)), Term("B", (("beta", "n_tokens", -1),))),
            exponents=(Exponent("alpha", grid=GRID), Exponent("beta", grid=GRID)),
        ),
        _power("kaplan-n", "Kaplan, of the size", "L(N) = (N_c / N)^alpha_N",
               f"{KAPLAN}, eq. 1.1; N without embeddings", "n_params_nonembedding", "N_c", "alpha_N"),
        _power("kaplan-d", "Kaplan, of the data", "L(D) = (D_c / D)^alpha_D", f"{KAPLAN}, eq. 1.2",
               "n_tokens", "D_c", "alpha_D"),
        _power("kaplan-c", "Kaplan, of the compute", "L(C) = (C_c / C)^alpha_C", f"{KAPLAN}, eq. 1.3; C in FLOPs",
               "flops", "C_c", "alpha_C"),
        KaplanND(
            name="kaplan-nd", title="Kaplan, of size and data",
            equation="L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
            source=f"{KAPLAN}, eq. 1.5; N without embeddings", columns=("n_params_nonembedding", "n_tokens"),
            parameters=("N_c", "D_c", "alpha_N", "alpha_D"),
        ),
        TermsLaw(
            name="saturating", title="Saturating power law of the size", equation="L(N) = L_inf + (N_c / N)^alpha",
            source="Henighan et al. 2020, arXiv:2010.14701, eq. 1.1", columns=("n_params",),
            parameters=("L_inf", "N_c", "alpha"),
            terms=(Term("L_inf"), Term("N_c", (("alpha", "n_params", -1),), scale=True)),
            exponents=(Exponent("alpha", grid=GRID),), best_of=("n_params",),
        ),
        TermsLaw(
            name="over-training", title="Over-training: compute and tokens per parameter",
            equation="L(C, M) = E + (a M^eta + b M^-eta) C^-eta, M = D / N",
            source="Gadre et al. 2024, arXiv:2403.08540, eq. 4", columns=("n_params", "n_tokens", "flops"),
            parameters=("E", "a", "b", "eta"),
            terms=(
                Term("E"),
                Term("a", (("eta", "tokens_per_parameter", 1), ("eta", "flops", -1))),
                Term("b", (("eta", "tokens_per_parameter", -1), ("eta", "flops", -1))),
            ),
            exponents=(Exponent("eta", grid=(0.02, *GRID)),),
        ),
        DataConstrained(
            name="data-constrained", title="Repeated tokens",
            equation="L = E + A / N'^alpha + B / D'^beta; "
            "D' = U (1 + R_D_star (1 - exp(-(D / U - 1) / R_D_star))), N' likewise of R_N_star",
            source="Muennighoff et al. 2023, arXiv:2305.16264, section 3.1",
            columns=("n_params", "n_tokens", "unique_tokens"),
            parameters=("E", "A", "B", "alpha", "beta", "R_N_star", "R_D_star"),
        ),
        TermsLaw(
            name="moe", title="Mixture of experts: size and sparsity",
            equation="L(N, D, S) = e + a / N^alpha + b / D^beta + c / (1 - S)^lambda + d / ((1 - S)^delta N^gamma), "
            "1 - S = N_active / N",
            source="Abnar et al. 2025, arXiv:2501.12370", columns=("n_params", "n_tokens", "n_params_active"),
            parameters=("e", "a", "b", "c", "d", "alpha", "beta", "lambda", "delta", "gamma"),
            terms=(
                Term("e"), Term("a", (("alpha", "n_params", -1),)), Term("b", (("beta", "n_tokens", -1),)),
                Term("c", (("lambda", "active_share", -1),)),
                Term("d", (("delta", "active_share", -1), ("gamma", "n_params", -1))),
            ),
            exponents=(
                Exponent("alpha", grid=(0.25, 0.55)), Exponent("beta", grid=(0.25, 0.55)),
                Exponent("lambda", -2, 2, (-0.3, 0.2, 0.6)), Exponent("delta", -2, 2, (0.1, 0.4)),
                Exponent("gamma", grid=(0.1, 0.3)),
            ),
        ),
        _optimal("learning-rate", "The best learning rate", "lr*(N, D) = c N^a D^b",
                 "form of Li et al. 2025, arXiv:2503.04715", "learning_rate", {"n_params": "a", "n_tokens": "b"}),
        _optimal("batch", "The best batch, in tokens", "B*(D) = c D^b",
                 "form of Li et al. 2025, arXiv:2503.04715", "batch_tokens", {"n_tokens": "b"}),
        Downstream(
            name="downstream", title="Accuracy of a task from the loss",
            equation="accuracy(L) = floor + (ceiling - floor) / (1 + exp(slope (L - midpoint)))",
            source="Bhagia et al. 2024, arXiv:2412.04403; Llama 3, arXiv:2407.21783, section 3.2.1",
            columns=("loss",), target="accuracy", parameters=("floor", "ceiling", "slope", "midpoint"),
            logarithmic=False, delta=1e-2,
        ),
    )
}  # fmt: skip


def find_law(name: str) -> Law:
    """The law of this name. Raises ConfigError, which lists the laws."""
    if name not in LAWS:
        raise ConfigError(f"no law {name!r}; there are {', '.join(LAWS)}, approach1 and approach2")
    return LAWS[name]
