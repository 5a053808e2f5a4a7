"""What a law is to the engine, and laws that are sums of power-law terms.

S problems (starts, resamples) of n rows, p parameters and v variables are evaluated side by side. Inside, variables are
logarithms centred on their mean over the table, and losses are relative to their geometric mean, so that parameters are
near 1 and nearly independent; people see the natural ones.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Of the geometric mean of the losses: below it a prediction is 0 in all but name, and its logarithm is kept finite.
TINY = 1e-12
# How many rows of the grid of exponents are solved together.
GRID_CHUNK = 64


@dataclass(frozen=True)
class Centre:
    """Means of the logarithms of the variables `[v]` and of the target, which are taken off inside."""

    variables: np.ndarray
    target: float


@dataclass(frozen=True)
class Exponent:
    """A parameter that is an exponent: its bounds, and where starts lie."""

    name: str
    lower: float = 1e-3
    upper: float = 3.0
    grid: tuple[float, ...] = (0.05, 0.12, 0.2, 0.3, 0.42, 0.56, 0.75, 1.0)


@dataclass(frozen=True)
class Law(ABC):
    """A formula for a column of the table, `target`, out of others."""

    name: str
    title: str
    equation: str
    source: str
    columns: tuple[str, ...]
    parameters: tuple[str, ...]
    target: str = "loss"
    # Residuals are of logarithms, unless the law is linear in its target.
    logarithmic: bool = True
    delta: float = 1e-3
    # Rows that this law is about: of those that agree in these columns, the best; no columns, all rows.
    best_of: tuple[str, ...] = ()
    # The target is a setting of runs, of which the best is sought for each size and token count.
    of_optima: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that a table must have."""
        return (*self.columns, self.target)

    @abstractmethod
    def variables(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """The law's variables as logarithms, `[n, v]`."""

    @abstractmethod
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds of the inner parameters, `[p]` each."""

    @abstractmethod
    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The target, or its logarithm, `[S, n]`, and its derivatives `[S, p, n]`, at `theta [S, p]` and `z [n, v]`."""

    @abstractmethod
    def starts(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Where to start, `[S, p]`: a grid of exponents, the coefficients solved for each (variable projection)."""

    @abstractmethod
    def natural(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        """The parameters of `equation`, `[S, p]`."""

    @abstractmethod
    def internal(self, natural: np.ndarray, centre: Centre) -> np.ndarray:
        """The inverse of `natural`."""

    def at_bounds(self, theta: np.ndarray) -> list[str]:
        """What to say of the bounds that `theta [p]` lies on."""
        lower, upper = self.bounds()
        return [
            f"{name} is at its {side} bound, {bound:g}"
            for name, value, low, high in zip(self.parameters, theta, lower, upper, strict=True)
            for side, bound in (("lower", low), ("upper", high))
            if value == bound
        ]

    def centre(self, columns: Mapping[str, np.ndarray]) -> Centre:
        """The means of this table."""
        target = float(np.mean(np.log(columns[self.target]))) if self.logarithmic else 0.0
        return Centre(self.middle(self.variables(columns)), target)

    def middle(self, variables: np.ndarray) -> np.ndarray:
        """What is taken off the variables `[n, v]`: `[v]`."""
        return np.mean(variables, axis=0)

    def measured(self, columns: Mapping[str, np.ndarray], centre: Centre) -> np.ndarray:
        """What the law predicts, as the table has it, `[n]`."""
        values = columns[self.target]
        return np.log(values) - centre.target if self.logarithmic else np.asarray(values, np.float64)

    def predict(self, natural: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """The target at `natural [S, p]` (or `[p]`) and the rows of `columns`, `[S, n]` (or `[n]`)."""
        logs = self.variables(columns)
        centre = Centre(self.middle(logs), 0.0)
        theta = self.internal(np.atleast_2d(natural), centre)
        found, _ = self.evaluate(theta, logs - centre.variables)
        found = np.exp(found) if self.logarithmic else found
        return found if np.ndim(natural) == 2 else found[0]


@dataclass(frozen=True)
class Term:
    """coefficient x product of variable^(sign exponent).

    With `scale`, the natural parameter is not the coefficient c of x^-alpha but the X of (X / x)^alpha.
    """

    coefficient: str
    factors: tuple[tuple[str, str, int], ...] = ()
    scale: bool = False


@dataclass(frozen=True)
class TermsLaw(Law):
    """A sum of terms with coefficients that are not negative: E + A / N^alpha + B / D^beta, and others of its kind."""

    terms: tuple[Term, ...] = ()
    exponents: tuple[Exponent, ...] = ()
    used: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        names = (factor[1] for term in self.terms for factor in term.factors)
        object.__setattr__(self, "used", tuple(dict.fromkeys(names)))

    def variables(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        found = [np.log(variable(name, columns)) for name in self.used]
        return np.stack(found, axis=-1)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        known = {exponent.name: (exponent.lower, exponent.upper) for exponent in self.exponents}
        pairs = [known.get(name, (0.0, np.inf)) for name in self.parameters]
        return np.array([low for low, _ in pairs]), np.array([high for _, high in pairs])

    def _power(self, theta: np.ndarray, term: Term, z: np.ndarray) -> np.ndarray:
        """The logarithm of a term's product, `[S, n]`, at variables `z [n, v]`."""
        total = np.zeros((len(theta), len(z)))
        for exponent, name, sign in term.factors:
            total += sign * theta[:, self.parameters.index(exponent), None] * z[:, self.used.index(name)]
        return total

    def evaluate(self, theta: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        jacobian = np.zeros((len(theta), len(self.parameters), len(z)))
        total = np.zeros((len(theta), len(z)))
        for term in self.terms:
            at = self.parameters.index(term.coefficient)
            shape = np.exp(self._power(theta, term, z)) if term.factors else np.ones_like(total)
            value = theta[:, at, None] * shape
            total += value
            jacobian[:, at] = shape
            for exponent, name, sign in term.factors:
                jacobian[:, self.parameters.index(exponent)] += sign * z[:, self.used.index(name)] * value
        total = np.maximum(total, TINY)
        jacobian /= total[:, None, :]
        return np.log(total), jacobian

    def starts(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        grid = np.array(list(itertools.product(*(exponent.grid for exponent in self.exponents))))
        theta = np.zeros((len(grid), len(self.parameters)))
        for exponent, values in zip(self.exponents, grid.T, strict=True):
            theta[:, self.parameters.index(exponent.name)] = values
        where = [self.parameters.index(term.coefficient) for term in self.terms]
        for at in range(0, len(grid), GRID_CHUNK):
            part = theta[at : at + GRID_CHUNK]
            shapes = [np.exp(self._power(part, term, z) - y) for term in self.terms]
            part[:, where] = not_negative_least_squares(np.stack(shapes, axis=1))
        return theta

    def natural(self, theta: np.ndarray, centre: Centre) -> np.ndarray:
        found = np.array(theta, np.float64)
        for term in self.terms:
            at = self.parameters.index(term.coefficient)
            shift = self._power(theta, term, centre.variables[None])[:, 0] - centre.target
            with np.errstate(divide="ignore"):
                logarithm = np.log(theta[:, at]) - shift
            if term.scale:
                logarithm = logarithm / theta[:, self.parameters.index(term.factors[0][0])]
            found[:, at] = np.exp(np.minimum(logarithm, 700))
        return found

    def internal(self, natural: np.ndarray, centre: Centre) -> np.ndarray:
        theta = np.array(natural, np.float64)
        for term in self.terms:
            at = self.parameters.index(term.coefficient)
            shift = self._power(theta, term, centre.variables[None])[:, 0] - centre.target
            with np.errstate(divide="ignore"):
                logarithm = np.log(natural[:, at])
            if term.scale:
                logarithm = logarithm * theta[:, self.parameters.index(term.factors[0][0])]
            theta[:, at] = np.exp(logarithm + shift)
        return theta


def variable(name: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """A column, or what laws make of columns: `tokens_per_parameter` (D / N), `active_share` (1 - S), FLOPs (6ND)."""
    if name == "tokens_per_parameter":
        return columns["n_tokens"] / columns["n_params"]
    if name == "flops" and name not in columns:
        return 6 * columns["n_params"] * columns["n_tokens"]
    if name == "active_share":
        return columns["n_params_active"] / columns["n_params"]
    return np.asarray(columns[name], np.float64)


def not_negative_least_squares(shapes: np.ndarray) -> np.ndarray:
    """Coefficients c >= 0, `[S, k]`, that minimise sum_i (sum_k c_k shapes[S, k, i] - 1)^2: every subset is solved."""
    n_terms = shapes.shape[1]
    gram = shapes @ shapes.swapaxes(1, 2)
    right = shapes.sum(axis=2)
    best, found = np.full(len(shapes), np.inf), np.zeros(right.shape)
    found[:, 0] = 1.0
    for subset in subsets(n_terms):
        pick = np.array(subset)
        square = gram[:, pick[:, None], pick]
        size = np.sqrt(np.einsum("sii->si", square))
        size = np.where(size > 0, size, 1.0)
        scaled = square / (size[:, :, None] * size[:, None, :]) + 1e-13 * np.eye(len(pick))
        solution = np.linalg.solve(scaled, (right[:, pick] / size)[..., None])[..., 0] / size
        # At a stationary point |sum c g - 1|^2 is n - c . right.
        error = -np.sum(solution * right[:, pick], axis=1)
        better = (error < best) & np.all(solution >= 0, axis=1)
        best[better] = error[better]
        found[better] = 0.0
        found[np.ix_(better, pick)] = solution[better]
    return found


def subsets(n: int) -> list[Sequence[int]]:
    """Every choice of at least one of n."""
    return [pick for size in range(1, n + 1) for pick in itertools.combinations(range(n), size)]
