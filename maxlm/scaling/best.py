"""The rows that a law is about: the best run of its kind, and the best setting, which lies between runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maxlm.errors import DataError
from maxlm.scaling.table import Finding, RunTable, binned, budgets

# Of FLOPs that are one budget: a sweep's are within 1%.
BUDGET_SPREAD = 1.05
SAME = 1.0001
MIN_SETTINGS = 3
# Runs on each side of the best one that its parabola goes through.
REACH = 2


def cells(table: RunTable, names: Sequence[str]) -> np.ndarray:
    """A number from 0 for each combination of the columns `names` that there are (FLOPs by budget), `[n]`."""
    keys = [
        budgets(table, BUDGET_SPREAD) if name == "flops" else binned(table.columns[name], SAME)
        for name in names
        if name in table.columns
    ]
    return np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)[1].reshape(-1)


def best_runs(table: RunTable, by: Sequence[str], law: str) -> tuple[RunTable, list[Finding]]:
    """At each value of the columns `by`, the runs of the configuration whose mean loss is least."""
    group, cell = cells(table, by), cells(table, ("n_params", "n_tokens", "unique_tokens", *by))
    loss = table.columns["loss"]
    mean = np.bincount(cell, loss) / np.bincount(cell)
    best = np.full(group.max() + 1, np.inf)
    np.minimum.at(best, group, mean[cell])
    keep = mean[cell] <= best[group]
    if keep.all():
        return table, []
    told = (
        f"{law} is about the best run at each {', '.join(by)}: {np.sum(~keep)} of {len(table)} rows are not, left out"
    )
    return table.take(keep), [Finding("best", told)]


def best_settings(table: RunTable, target: str) -> tuple[RunTable, list[Finding]]:
    """The best value of `target` for each size and token count: the minimum of a parabola of log loss in its logarithm.

    It goes through the best run and those up to two beside it, of the least loss at each value. Points whose best value
    is the least or greatest tried are left out, and so are those with fewer than 3 values. A table without losses, or
    with one value at each point, has the best ones already. Raises DataError where no point is left.
    """
    if "loss" not in table.columns:
        return table, []
    group, setting = cells(table, ("n_params", "n_tokens")), table.columns[target]
    if all(np.unique(binned(setting[group == at], SAME)).size == 1 for at in range(group.max() + 1)):
        return table, []
    found, few, edge = np.full(len(table), np.nan), np.zeros(len(table), bool), np.zeros(len(table), bool)
    for at in range(group.max() + 1):
        rows = np.flatnonzero(group == at)
        tried, loss = _profile(setting[rows], table.columns["loss"][rows])
        low = int(np.argmin(loss))
        at_best = rows[np.argmin(table.columns["loss"][rows])]
        if len(tried) < MIN_SETTINGS:
            few[at_best] = True
        elif low in (0, len(tried) - 1):
            edge[at_best] = True
        else:
            found[at_best] = _vertex(tried, loss, low)
    findings = []
    if few.any():
        told = f"fewer than {MIN_SETTINGS} values of {target} at these points, left out"
        findings.append(table.finding("few settings", few, told))
    if edge.any():
        told = f"the best {target} is the least or greatest tried: the optimum is outside, left out"
        findings.append(table.finding("edge", edge, told))
    keep = np.isfinite(found)
    if not keep.any():
        raise DataError(f"{table.source}: no best {target}. " + "; ".join(finding.message for finding in findings))
    return table.with_column(target, found).take(keep), findings


def _profile(setting: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of a setting in order, and the least loss at each."""
    which = binned(setting, SAME)
    tried = np.array([setting[which == at].mean() for at in range(which.max() + 1)])
    return tried, np.array([loss[which == at].min() for at in range(which.max() + 1)])


def _vertex(tried: np.ndarray, loss: np.ndarray, low: int) -> float:
    """Where the parabola through the runs around `low` is least, which lies among them."""
    near = slice(max(low - REACH, 0), low + REACH + 1)
    x, y = np.log(tried[near]), np.log(loss[near])
    curve, slope, _ = np.polyfit(x - np.log(tried[low]), y, 2)
    away = -slope / (2 * curve) if curve > 0 else 0.0
    return float(np.exp(np.clip(np.log(tried[low]) + away, x[0], x[-1])))
