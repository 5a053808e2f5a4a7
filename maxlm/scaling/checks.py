"""What a grid should not be: off its centre, too narrow for a parabola, longer than the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from maxlm.scaling.data import train_tokens
from maxlm.scaling.spec import Sweep, SweepSpec

if TYPE_CHECKING:
    from maxlm.scaling.ladder import PlannedRun

LEAST_SIZES = 4
"""a parabola has three coefficients: with four sizes one residual is left to doubt it by"""
LEAST_RANGE = 3.0
"""of model sizes in a budget. Near the optimum of Chinchilla's law (arXiv:2203.15556, appendix D.3) the loss is about
0.03 ln(N / N_opt)^2 nats above it: a factor of sqrt(3) to either side is 0.01 nats, about what seeds differ by"""
OFF_CENTRE = 0.25
"""the middle of a budget's range may be this part of the range away from where it should be, in logarithms"""
FEW_STEPS = 50


def check_grid(spec: SweepSpec, runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Warnings of a grid, a sentence each."""
    for number, budget in enumerate(spec.budgets):
        here = [run for run in runs if run.budget == budget and run.config.train.seed == spec.seeds[0]]
        yield from _check_budget(budget, spec.centre(number), spec.span, here)
    if few := [run.name for run in runs if run.steps < FEW_STEPS]:
        yield (
            f"{_named(few)} {'has' if len(few) == 1 else 'have'} fewer than {FEW_STEPS} steps, too few for an "
            "optimizer to settle: make the batch smaller"
        )


def _check_budget(budget: float, centre: float, span: float, runs: Sequence[PlannedRun]) -> Iterator[str]:
    label = f"budget {budget:.4g}"
    if len(runs) < LEAST_SIZES:
        yield f"{label}: {len(runs)} sizes, and its parabola needs {LEAST_SIZES} or more (sizes_per_budget)"
    if not runs:
        return
    ratios = sorted(run.tokens_per_parameter for run in runs)
    sizes = sorted(run.size for run in runs)
    shown = f"its runs have {ratios[0]:.3g} to {ratios[-1]:.3g} tokens a parameter"
    if len(runs) > 1 and (ratios[0] > centre or ratios[-1] < centre):
        side = "more" if ratios[0] > centre else "fewer"
        yield f"{label}: {shown}, all {side} than the {centre:.3g} in the middle: its minimum is at an edge or outside"
    elif len(runs) > 1:
        off = math.log(math.sqrt(ratios[0] * ratios[-1]) / centre) / math.log(span)
        if abs(off) > OFF_CENTRE:
            yield f"{label}: {shown}, which is off the centre, {centre:.3g}, by {abs(off):.0%} of the span"
    if len(runs) > 1 and sizes[-1] < LEAST_RANGE * sizes[0]:
        yield (
            f"{label}: its largest model is {sizes[-1] / sizes[0]:.2g} times its smallest, too narrow for its "
            f"parabola, which needs {LEAST_RANGE:g} times: losses would differ by no more than seeds do (span)"
        )


def check_repeats(sweep: Sweep, runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Which runs see the training text more than once."""
    unique = sweep.spec.unique_tokens or train_tokens(sweep.base.data)
    if not unique:
        return
    again = {run.name: run.tokens / unique for run in runs if run.tokens > unique}
    if again:
        most = max(again, key=lambda name: again[name])
        yield (
            f"{_named(list(again))}: more tokens than the {unique:,.0f} to train on, up to {again[most]:.2f} epochs "
            f"({most}); laws of fresh tokens do not hold for these: take more text, or set caps.max_tokens"
        )


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more runs"
