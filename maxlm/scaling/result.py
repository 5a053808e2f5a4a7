"""What a fit is asked, and what it answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from maxlm.scaling.bootstrap import interval
from maxlm.scaling.losses import LossKind
from maxlm.scaling.table import Finding, RunTable


@dataclass(frozen=True)
class FitOptions:
    """How to fit: the loss of residuals, its `delta` (None: the law's), the bootstrap; FLOP budgets to answer for."""

    loss: LossKind = "huber"
    delta: float | None = None
    resamples: int = 2000
    seed: int = 0
    budgets: tuple[float, ...] = ()
    backtest: bool = True


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% percentile interval; NaN where there was no bootstrap."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, samples: np.ndarray) -> Estimate:
        """The interval is that of the bootstrap's values `[B]`."""
        return cls(float(value), *interval(samples))

    @property
    def factor(self) -> float:
        """high / low, of what is positive."""
        return self.high / self.low if self.low > 0 else float("inf")


@dataclass(frozen=True)
class Optimum:
    """The best split of a FLOP budget, and its loss where the law tells it."""

    flops: float
    n_params: Estimate
    n_tokens: Estimate
    loss: Estimate | None = None


@dataclass(frozen=True)
class HeldOut:
    """What the back-test predicted from smaller runs: a row, or a budget's best. `error` is predicted / actual - 1."""

    row: int | None
    actual: float
    predicted: float
    error: float


@dataclass(frozen=True)
class Backtest:
    """Rows of the largest runs, predicted by a fit to the others, which are up to `factor` smaller in `measure`."""

    measure: str
    factor: float
    rows_fitted: int
    held_out: tuple[HeldOut, ...]
    mean_error: float
    worst_error: float
    target: str


@dataclass(frozen=True)
class FitResult:
    """A fit. `samples [B, p]` are the bootstrap's natural parameters; `rows` the table as it was fitted."""

    law: str
    equation: str
    source: str
    parameters: dict[str, Estimate]
    objective: float
    converged: bool
    starts: int
    starts_agreeing: int
    start_objectives: tuple[float, ...]
    gradient_norm: float
    loss: LossKind
    delta: float | None
    rows: RunTable
    rows_in_table: int
    residual_scale: float
    samples: np.ndarray
    resample: str
    findings: tuple[Finding, ...] = ()
    optimum: tuple[Optimum, ...] = ()
    backtest: Backtest | None = None
    verdict: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def trusted(self) -> bool:
        """Whether nothing severe was found."""
        return not any(finding.severe for finding in self.findings)

    @property
    def warnings(self) -> list[str]:
        """Everything found, in words, the severe first."""
        return [finding.message for finding in sorted(self.findings, key=lambda finding: not finding.severe)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return {
            "law": self.law,
            "equation": self.equation,
            "source": self.source,
            "parameters": {name: asdict(estimate) for name, estimate in self.parameters.items()},
            "objective": self.objective,
            "converged": self.converged,
            "starts": self.starts,
            "warnings": self.warnings,
            "trusted": self.trusted,
            "verdict": self.verdict,
            "starts_agreeing": self.starts_agreeing,
            "start_objectives": list(self.start_objectives),
            "gradient_norm": self.gradient_norm,
            "loss": self.loss,
            "delta": self.delta,
            "rows": len(self.rows),
            "rows_in_table": self.rows_in_table,
            "residual_scale": self.residual_scale,
            "resamples": len(self.samples),
            "resample": self.resample,
            "optimum": [asdict(point) for point in self.optimum],
            "backtest": None if self.backtest is None else asdict(self.backtest),
            "findings": [asdict(finding) for finding in self.findings],
            **self.details,
        }
