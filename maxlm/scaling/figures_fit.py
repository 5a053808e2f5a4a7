"""The report's pictures of how good the fit is: residuals, intervals, exponents, the back-test."""

from __future__ import annotations

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from maxlm.scaling.plots import Theme, losses, powers, widened
from maxlm.scaling.published import HOFFMANN, KAPLAN, PARAMETRIC, REFIT
from maxlm.scaling.result import Estimate
from maxlm.scaling.study import TITLES, Study, exponents

MARKERS = ("D", "s", "^", "v", "P")
NAMED = 16
"""More runs that are held out are drawn without their names, which would cover each other."""


def residuals(study: Study, figure: Figure, theme: Theme) -> None:
    """By how much each run's loss is over or under the law's, against size, tokens and the law's loss."""
    three = figure.subplots(1, 3, sharey=True)
    assert study.main is not None
    used = [row for row in study.rows if row.used and row.residual is not None]
    others = [row for row in study.left_out if row.predicted is not None]
    percent = {row.line: 100 * (row.residual or 0.0) for row in used}
    noise = 100 * study.main.residual_scale
    reach = 1.25 * max(*(abs(value) for value in percent.values()), 2.5 * noise, 1e-3)
    # Without a loss, at the upper edge; beyond the edges, at them.
    percent |= {
        row.line: reach if row.residual is None else float(np.clip(100 * row.residual, -reach, reach)) for row in others
    }
    outliers = {line for finding in study.main.findings if finding.kind == "outlier" for line in finding.rows}
    kinds = [
        ("fitted", used, {"marker": "o", "color": theme.line[0], "mec": theme.card, "mew": 0.7}),
        (
            "outlier", [row for row in used if row.line in outliers],
            {"marker": "o", "mfc": "none", "mec": theme.bad, "ms": 10, "mew": 1.4},
        ),
        ("left out", others, {"marker": "X", "color": theme.bad, "mec": theme.card, "ms": 8, "clip_on": False}),
    ]  # fmt: skip
    named = {}
    for axes, name, title in zip(
        three, ("n_params", "n_tokens", "predicted"), ("parameters N", "tokens D", "the law's loss"), strict=True
    ):
        low, high = widened([getattr(row, name) for row in (*used, *others)], 1.3 if name != "predicted" else 1.03)
        (losses if name == "predicted" else powers)(axes, "x", low, high)
        axes.axhspan(-2 * noise, 2 * noise, color=theme.line[0], alpha=0.12, lw=0)
        axes.axhline(0, color=theme.soft, lw=1)
        for kind, rows, style in kinds:
            if rows:
                x, y = [getattr(row, name) for row in rows], [percent[row.line] for row in rows]
                (named[kind],) = axes.plot(x, y, ls="", zorder=3, **style)
        axes.set_xlabel(title)
    three[0].set_ylim(-reach, reach)
    three[0].set_ylabel("measured over predicted loss")
    three[0].yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:+g}%" if value else "0"))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)


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
    """Losses of the largest runs, a row each: predicted from the smaller ones, and measured."""
    axes = figure.subplots()
    assert study.main is not None
    assert study.main.backtest is not None
    names = {row.line: row.name for row in study.rows}
    sizes = {row.line: row.n_params for row in study.rows}
    held = sorted(study.main.backtest.held_out, key=lambda each: sizes.get(each.row or -1, 0.0))
    noise = study.main.residual_scale
    y = np.arange(len(held))
    actual, predicted = (np.array([getattr(each, name) for each in held]) for name in ("actual", "predicted"))
    axes.hlines(
        y, predicted * (1 - 2 * noise), predicted * (1 + 2 * noise), color=theme.line[0], lw=9, alpha=0.25,
        label="the noise of runs, ±2σ",
    )  # fmt: skip
    axes.plot(predicted, y, "o", color=theme.line[0], ms=8, mec=theme.card, label="predicted from smaller runs")
    axes.plot(actual, y, "D", color=theme.line[1], ms=6, mec=theme.card, label="measured")
    if len(held) <= NAMED:
        axes.set_yticks(y, [f"{names.get(each.row or -1, '')}  {each.error:+.2%}" for each in held], color=theme.ink)
    else:
        axes.set_yticks([])
    axes.set_ylim(-0.7, len(held) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("loss, nats a token")
    figure.legend(loc="outside upper left", ncols=3)
