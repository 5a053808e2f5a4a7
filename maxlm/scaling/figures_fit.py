"""The report's pictures of how good the fit is: residuals, intervals, exponents, the back-test."""

from __future__ import annotations

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maxlm.scaling.plots import Theme, halo, losses, powers, widened
from maxlm.scaling.published import HOFFMANN, KAPLAN, PARAMETRIC, REFIT
from maxlm.scaling.result import Estimate
from maxlm.scaling.study import TITLES, Study, exponents

MARKERS = ("D", "s", "^", "v", "P")


def residuals(study: Study, figure: Figure, theme: Theme) -> None:
    """By how much each run's loss is over or under the law's, against size, tokens and the law's loss."""
    three = figure.subplots(1, 3, sharey=True)
    assert study.main is not None
    used = [row for row in study.rows if row.used and row.residual is not None]
    others = [row for row in study.rows if not row.used and row.predicted is not None]
    values = np.array([100 * (row.residual or 0.0) for row in used])
    noise = 100 * study.main.residual_scale
    reach = 1.25 * max(float(np.abs(values).max()), 2.5 * noise, 1e-3)
    lines = {line for finding in study.main.findings if finding.kind == "outlier" for line in finding.rows}
    ringed = [row for row in used if row.line in lines]
    for axes, name, title in zip(
        three, ("n_params", "n_tokens", "predicted"), ("parameters N", "tokens D", "the law's loss"), strict=True
    ):
        low, high = widened([getattr(row, name) for row in (*used, *others)], 1.3 if name != "predicted" else 1.03)
        if name == "predicted":
            losses(axes, "x", low, high)
        else:
            powers(axes, "x", low, high)
        axes.axhspan(-2 * noise, 2 * noise, color=theme.line[0], alpha=0.12, lw=0)
        axes.axhline(0, color=theme.soft, lw=1)
        axes.plot(
            [getattr(row, name) for row in used],
            values,
            "o",
            color=theme.line[0],
            mec=theme.card,
            mew=0.7,
            label="fitted",
        )
        axes.plot(
            [getattr(row, name) for row in ringed], [100 * (row.residual or 0.0) for row in ringed], "o", mfc="none",
            mec=theme.bad, ms=10, mew=1.4, label="outlier",
        )  # fmt: skip
        beyond = [(row, 100 * row.residual if row.residual is not None else reach) for row in others]
        axes.plot(
            [getattr(row, name) for row, _ in beyond], [float(np.clip(y, -reach, reach)) for _, y in beyond], "X",
            color=theme.bad, mec=theme.card, ms=8, clip_on=False, zorder=5, label="left out",
        )  # fmt: skip
        axes.set_xlabel(title)
    three[0].set_ylim(-reach, reach)
    three[0].set_ylabel("measured over predicted loss")
    three[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:+g}%" if value else "0"))
    handles, labels = three[0].get_legend_handles_labels()
    shown = [True, bool(ringed), bool(others)]
    figure.legend(
        [handle for handle, wanted in zip(handles, shown, strict=True) if wanted],
        [label for label, wanted in zip(labels, shown, strict=True) if wanted],
        loc="outside lower center", ncols=3,
    )  # fmt: skip


def parameters(study: Study, figure: Figure, theme: Theme) -> None:
    """Each parameter of the law with its interval, and what was published for it; each on a scale of its own."""
    result = study.main
    assert result is not None
    strips = np.atleast_1d(figure.subplots(len(result.parameters), 1))
    for axes, (name, estimate) in zip(strips, result.parameters.items(), strict=True):
        published = [each.parameters[name] for each in PARAMETRIC]
        _interval(axes, 0.0, estimate, theme.line[0], "o")
        for value, mark, color in zip(published, MARKERS, theme.line[1:], strict=False):
            axes.plot(value, 0, mark, color=color, ms=7, mec=theme.card, zorder=4)
        seen = [each for each in (estimate.value, estimate.low, estimate.high, *published) if np.isfinite(each)]
        if name in ("A", "B") and min(seen) > 0:
            powers(axes, "x", *widened(seen, 1.3))
        else:
            room = 0.08 * (max(seen) - min(seen)) or 0.1
            axes.set_xlim(min(seen) - room, max(seen) + room)
            axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
        axes.set_ylim(-1, 1)
        axes.set_yticks([0], [_greek(name)], fontsize=12, color=theme.ink)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    named = [
        axes.plot([], [], "o-", color=theme.line[0], lw=4, label="this table, 95% interval")[0] for axes in strips[:1]
    ]
    for each, mark, color in zip(PARAMETRIC, MARKERS, theme.line[1:], strict=False):
        named += strips[0].plot([], [], mark, color=color, ls="", label=each.name)
    figure.legend(handles=named, loc="outside upper left", ncols=3)


def _greek(name: str) -> str:
    return f"$\\{name}$" if name in ("alpha", "beta") else f"${name}$"


def _interval(axes: Axes, y: float, estimate: Estimate, color: str, mark: str) -> None:
    if np.isfinite(estimate.low):
        axes.plot([estimate.low, estimate.high], [y, y], color=color, lw=7, alpha=0.45, solid_capstyle="butt")
    axes.plot(estimate.value, y, mark, color=color, ms=7, zorder=5)


def exponent_chart(study: Study, figure: Figure, theme: Theme) -> None:
    """The exponent a of N* ~ C^a by every method here, above what papers found."""
    axes = figure.subplots()
    ours = [(TITLES[law], exponents(study.fits[law])[0]) for law in study.fits]
    theirs = [(each.name, each.a) for each in (*HOFFMANN, REFIT, KAPLAN)]
    y = 0.0
    places, labels = [], []
    for name, estimate in ours:
        _interval(axes, y, estimate, theme.line[0], "o")
        places.append(y)
        labels.append(f"here, {name}")
        y -= 1
    axes.axhline(y + 0.5, color=theme.rule, lw=1)
    for name, value in theirs:
        axes.plot(value, y, "D", color=theme.line[1], ms=6)
        places.append(y)
        labels.append(name)
        y -= 1
    axes.axvline(0.5, color=theme.soft, lw=1, ls=":")
    axes.set_yticks(places, labels, color=theme.ink)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("exponent a: the best size grows as FLOPs to the power a")


def backtest(study: Study, figure: Figure, theme: Theme) -> None:
    """Losses of the largest runs: predicted from the smaller ones, against measured."""
    axes = figure.subplots()
    assert study.main is not None
    assert study.main.backtest is not None
    held = study.main.backtest.held_out
    names = {row.line: row.name for row in study.rows}
    actual = np.array([each.actual for each in held])
    predicted = np.array([each.predicted for each in held])
    noise = study.main.residual_scale
    low, high = widened([*actual, *predicted], 1.012)
    x = np.array([low, high])
    axes.fill_between(
        x,
        x * (1 - 2 * noise),
        x * (1 + 2 * noise),
        color=theme.line[0],
        alpha=0.12,
        lw=0,
        label="noise of the fit, ±2σ",
    )
    axes.plot(x, x, color=theme.soft, lw=1, label="predicted = measured")
    axes.vlines(actual, np.minimum(actual, predicted), np.maximum(actual, predicted), color=theme.line[1], lw=1)
    axes.plot(actual, predicted, "o", color=theme.line[1], mec=theme.card, ms=7, zorder=4, label="run held out")
    if len(held) <= 8:
        for n, each in enumerate(sorted(held, key=lambda each: each.predicted)):
            axes.annotate(
                f"{names.get(each.row or -1, '')} {each.error:+.2%}", (each.actual, each.predicted),
                (-8 if n % 2 else 8, -3), ha="right" if n % 2 else "left", textcoords="offset points", fontsize=8,
                color=theme.ink, annotation_clip=False, path_effects=halo(theme), zorder=5,
            )  # fmt: skip
    losses(axes, "x", low, high)
    losses(axes, "y", low, high)
    axes.set_xlabel("measured loss, nats a token")
    axes.set_ylabel("predicted from smaller runs")
    axes.legend(loc="upper left")
