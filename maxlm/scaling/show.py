"""A fit, and the laws, on the console."""

from __future__ import annotations

import math
from typing import Any

from maxlm.console import print_table
from maxlm.scaling.frontier import APPROACHES, COLUMNS, EQUATION, SOURCE
from maxlm.scaling.laws import LAWS
from maxlm.scaling.result import Backtest, Estimate, FitResult, HeldOut

SHOWN_HELD_OUT = 6


def law_rows() -> list[dict[str, Any]]:
    """Every law: its equation, the columns it needs, and its source."""
    rows = [
        {"law": law.name, "equation": law.equation, "columns": ", ".join(law.needs), "source": law.source}
        for law in LAWS.values()
    ]
    rows[1:1] = [
        {"law": name, "equation": f"{EQUATION}, by {what}", "columns": ", ".join(COLUMNS), "source": SOURCE}
        for name, what in APPROACHES.items()
    ]
    return rows


def print_laws(json_wanted: bool) -> None:
    """The laws as a table, or as JSON."""
    print_table(law_rows(), json_wanted)


def print_fit(result: FitResult) -> None:
    """A fit for people: parameters, the best sizes, the back-test, and the verdict last."""
    print(f"{result.law}: {result.equation}\n  {result.source}")
    loss = f"Huber, delta {result.delta:g}" if result.loss == "huber" else {"lad": "LAD"}.get(result.loss, result.loss)
    print(f"  {len(result.rows)} of {result.rows_in_table} rows, {loss}; {convergence(result)}\n")
    print_table([{"parameter": name, **numbers(each)} for name, each in result.parameters.items()], False)
    if len(result.samples):
        drawn = {"runs": "runs drawn", "residuals": "residuals drawn", "sizes": "sizes drawn"}[result.resample]
        print(f"\n  intervals: 95%, percentiles of {len(result.samples):,} bootstrap fits ({drawn})")
    if result.optimum:
        print()
        print_table([optimum_row(p.flops, p.n_params, p.n_tokens, p.loss) for p in result.optimum], False)
    if result.backtest:
        print()
        print_backtest(result.backtest)
    if result.findings:
        print("\nwarnings:")
        for message in result.warnings:
            print(f"  - {message}")
    print(f"\n{result.verdict}")


def convergence(result: FitResult) -> str:
    """How the minimum was verified."""
    if result.starts == 1:
        return "least squares in closed form"
    state = "converged" if result.converged else "NOT CONVERGED"
    return (
        f"{state}, relative gradient {result.gradient_norm:.0e}; "
        f"{result.starts_agreeing} of {result.starts} starts agree; objective {result.objective:.6g}"
    )


def numbers(estimate: Estimate) -> dict[str, Any]:
    """A value and its interval as columns; an interval that is not there is empty."""
    known = not math.isnan(estimate.low)
    return {"value": estimate.value, "low": estimate.low if known else None, "high": estimate.high if known else None}


def optimum_row(flops: float, size: Estimate, tokens: Estimate, loss: Estimate | None) -> dict[str, Any]:
    """A budget's best size, tokens and loss, with their intervals in words."""
    row: dict[str, Any] = {"FLOPs": f"{flops:.3g}"}
    for name, value in (("best N", size), ("best D", tokens), ("loss", loss)):
        if value is not None:
            digits = ".4g" if name == "loss" else ".3g"
            inside = "" if math.isnan(value.low) else f" ({value.low:{digits}} to {value.high:{digits}})"
            row[name] = f"{value.value:{digits}}{inside}"
    return row


def print_backtest(test: Backtest) -> None:
    """What the smaller runs said of the largest."""
    beyond = f"the largest is {test.factor:.3g} times them in {test.measure}"
    print(f"back-test: fitted to the {test.rows_fitted} smaller, and {beyond}:")
    print(f"{test.target} missed by {test.mean_error:+.2%} on average, {test.worst_error:+.2%} at worst")
    print_table([_held_out_row(each) for each in test.held_out[:SHOWN_HELD_OUT]], False)


def _held_out_row(each: HeldOut) -> dict[str, Any]:
    line = {} if each.row is None else {"line": each.row}
    return {**line, "actual": each.actual, "predicted": each.predicted, "error": f"{each.error:+.2%}"}
