"""The report's pictures of runs and laws. Each function draws a study into a figure."""

from __future__ import annotations

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from maxlm.scaling.laws import find_law
from maxlm.scaling.plots import Theme, colorbar, halo, losses, power, powers, widened
from maxlm.scaling.study import TITLES, Row, Study, band, natural, path

MARKS = {"chinchilla": "-", "approach2": "--", "approach1": ":"}
LABELLED = 4
"""Names of more runs that are left out would cover each other; the page's table has them."""
ROOM = 4.0
"""A band that is wider than this factor is cut off, so that the others can be seen."""


def loss_curves(study: Study, figure: Figure, theme: Theme) -> None:
    """Training loss over the FLOPs spent, a line a run, coloured by size; held-out losses as dots at the ends."""
    axes = figure.subplots()
    norm = LogNorm(*widened([curve.n_params for curve in study.curves], 1.02))
    for curve in study.curves:
        color = theme.colors(norm(curve.n_params))
        done = curve.status == "done"
        axes.plot(curve.flops, curve.loss, color=color, lw=1.2, alpha=0.85, ls="-" if done else (0, (4, 2)))
        if done and curve.held_out is not None:
            axes.plot(curve.flops[-1], curve.held_out, "o", color=color, mec=theme.card, mew=0.8, zorder=4)
    late = [curve.loss[np.searchsorted(curve.flops, 0.06 * curve.flops[-1])] for curve in study.curves]
    ends = [curve.held_out or curve.loss[-1] for curve in study.curves if curve.status == "done"]
    low, high = min([*ends, *(curve.loss.min() for curve in study.curves)]) / 1.02, max(late) * 1.06
    x_low, x_high = widened(np.concatenate([curve.flops for curve in study.curves]))
    for curve in study.curves:
        if curve.failed:
            x, y = curve.flops[-1], float(np.clip(curve.loss[-1], low * 1.01, high / 1.01))
            axes.plot(x, y, "X", color=theme.bad, ms=8, mec=theme.card, zorder=5)
            on_left = x > np.sqrt(x_low * x_high)
            axes.annotate(
                f"{curve.run}: {curve.status}", (x, y), (-7 if on_left else 7, -3), ha="right" if on_left else "left",
                textcoords="offset points", fontsize=8, color=theme.bad, zorder=6, path_effects=halo(theme),
            )  # fmt: skip
    powers(axes, "x", x_low, x_high, flops=True)
    losses(axes, "y", float(low), float(high))
    axes.set_xlabel("training FLOPs spent")
    axes.set_ylabel("loss, nats a token")
    colorbar(figure, axes, norm, theme, "parameters")


def isoflop(study: Study, figure: Figure, theme: Theme) -> None:
    """Loss over size, a parabola a budget, their minima as stars, runs as dots."""
    axes = figure.subplots()
    result, group = study.fits["approach2"], study.budgets
    size, loss, flops = (result.rows.columns[name] for name in ("n_params", "loss", "flops"))
    shown = [row for row in study.left_out if row.n_params > 0]
    x_low, x_high = widened([*size, *(row.n_params for row in shown)], 1.25)
    y_low, y_high = loss.min() * 0.985, loss.max() * 1.03
    centre = np.array([np.exp(np.mean(np.log(flops[group == at]))) for at in range(group.max() + 1)])
    norm = LogNorm(*widened(centre, 1.05))
    names = []
    for at in range(group.max() + 1):
        pick = group == at
        color = theme.colors(norm(centre[at]))
        axes.plot(size[pick], loss[pick], "o", color=color, mec=theme.card, mew=0.8, zorder=3)
        names.append(Line2D([], [], color=color, marker="o", lw=1.6, label=f"{power(centre[at])} FLOPs"))
        if np.unique(np.round(np.log(size[pick]), 6)).size < 3:
            continue
        middle = np.mean(np.log(size[pick]))
        curve = np.polyfit(np.log(size[pick]) - middle, np.log(loss[pick]), 2)
        x = np.geomspace(size[pick].min() / 1.15, size[pick].max() * 1.15, 100)
        axes.plot(x, np.exp(np.polyval(curve, np.log(x) - middle)), color=color)
        for minimum in result.details["minima"]:
            if abs(np.log(minimum["flops"] / centre[at])) < 1e-6:
                lowest = np.exp(np.polyval(curve, np.log(minimum["n_params"]) - middle))
                axes.plot(minimum["n_params"], lowest, "*", color=color, ms=13, mec=theme.ink, mew=0.8, zorder=5)
    powers(axes, "x", x_low, x_high)
    losses(axes, "y", y_low, y_high)
    names.append(Line2D([], [], marker="*", ls="", color=theme.soft, ms=11, mec=theme.ink, label="minimum"))
    names += left_out(axes, theme, [(row, row.n_params, row.loss) for row in shown])
    axes.set_xlabel("parameters N")
    axes.set_ylabel("held-out loss, nats a token")
    figure.legend(handles=names, loc="outside right upper")


def left_out(axes: Axes, theme: Theme, marks: list[tuple[Row, float, float]]) -> list[Line2D]:
    """Runs that no law is fitted to, as crosses: at their loss, or at the upper edge where it is none or beyond it."""
    low, high = axes.get_ylim()
    for row, x, y in marks:
        inside = np.isfinite(y) and low <= y <= high
        at = y if inside else high
        axes.plot(x, at, "X", color=theme.bad, mec=theme.card, ms=8, zorder=6, clip_on=False)
        if len(marks) > LABELLED:
            continue
        axes.annotate(
            f"{row.name}: {row.status if row.status != 'done' else 'left out'}", (x, at), (0, -13 if not inside else 8),
            textcoords="offset points", ha="center", fontsize=8, color=theme.bad, zorder=6,
            path_effects=halo(theme),
        )  # fmt: skip
    return [Line2D([], [], marker="X", ls="", color=theme.bad, ms=7, label="left out")] if marks else []


def frontier(study: Study, figure: Figure, theme: Theme) -> None:
    """N*(C) and D*(C) of approaches 1, 2 and 3, with the bootstrap's bands, and the minima of the parabolas."""
    both = figure.subplots(1, 2)
    used = [row.flops for row in study.rows if row.used]
    low, high = min(used) / 1.3, max(study.next_flops, max(used)) * 1.3
    flops = np.geomspace(low, high, 50)
    names: list[Line2D] = []
    limits: list[list[float]] = [[], []]
    for (law, style), color in zip(MARKS.items(), theme.line, strict=False):
        result = study.fits.get(law)
        if result is None:
            continue
        paths = path(result, flops)
        if not np.isfinite(paths[0][0]).all():
            continue
        names.append(Line2D([], [], color=color, ls=style, lw=2, label=TITLES[law]))
        for axes, every, edge in zip(both, paths, limits, strict=True):
            line, bands = np.exp(every[0]), band(every)
            axes.plot(flops, line, color=color, ls=style, lw=2, zorder=3)
            edge += [float(line[0]), float(line[-1])]
            if bands is not None:
                axes.fill_between(flops, *bands, color=color, alpha=0.16, lw=0)
                edge += [float(max(bands[0][0], line[0] / ROOM)), float(min(bands[1][-1], line[-1] * ROOM))]
    if "approach2" in study.fits:
        for axes, name in zip(both, ("n_params", "n_tokens"), strict=True):
            minima = study.fits["approach2"].details["minima"]
            axes.plot(
                [each["flops"] for each in minima], [each[name] for each in minima], "*", ms=11, zorder=5,
                color=theme.line[1], mec=theme.ink, mew=0.7,
            )  # fmt: skip
        names.append(
            Line2D([], [], marker="*", ls="", color=theme.line[1], ms=10, mec=theme.ink, label="parabola's minimum")
        )
    for edge, name in zip(limits, ("n_params", "n_tokens"), strict=True):
        edge += [getattr(row, name) for row in study.rows if row.used] if not edge else []
    for axes, title, edge in zip(both, ("parameters N*(C)", "tokens D*(C)"), limits, strict=True):
        powers(axes, "x", low, high, flops=True)
        powers(axes, "y", *widened(edge, 1.3))
        axes.set_title(title)
        axes.set_xlabel("training FLOPs C")
        axes.axvspan(max(used), high, color=theme.soft, alpha=0.09, lw=0)
        axes.annotate(
            "larger than\nany run", (max(used), 0.02), (5, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8, color=theme.soft,
        )  # fmt: skip
    figure.legend(handles=names, loc="outside lower center", ncols=max(len(names), 1))


def contours(study: Study, figure: Figure, theme: Theme) -> None:
    """The law's loss over size and tokens, the runs, and the sizes that are best for each budget."""
    axes = figure.subplots()
    result = study.main
    assert result is not None
    rows = [row for row in study.rows if row.n_params > 0 and row.n_tokens > 0 and not row.pending]
    best = [(point.n_params.value, point.n_tokens.value) for point in result.optimum if point.n_params.value > 0]
    x_low, x_high = widened([*(row.n_params for row in rows), *(size for size, _ in best)], 1.5)
    y_low, y_high = widened([*(row.n_tokens for row in rows), *(tokens for _, tokens in best)], 1.5)
    size, tokens = np.meshgrid(np.geomspace(x_low, x_high, 120), np.geomspace(y_low, y_high, 120))
    columns = {"n_params": size.ravel(), "n_tokens": tokens.ravel()}
    loss = find_law(result.law).predict(natural(result), columns).reshape(size.shape)
    levels = level_values(float(np.nanmin(loss)), float(np.nanpercentile(loss, 98)))
    filled = axes.contourf(size, tokens, loss, levels=levels, cmap=theme.colors.reversed(), extend="both", alpha=0.55)
    lines = axes.contour(size, tokens, loss, levels=levels, colors=theme.ink, linewidths=0.5, alpha=0.6)
    axes.clabel(lines, levels[:: max(1, len(levels) // 7)], fmt=lambda value: f"{value:g}", fontsize=8)
    flops = np.geomspace(6 * x_low * y_low, 6 * x_high * y_high, 80)
    sizes, datas = path(result, flops)
    axes.plot(np.exp(sizes[0]), np.exp(datas[0]), color=theme.ink, lw=2.2, label="best size for each budget")
    done, others = [row for row in rows if row.used], [row for row in rows if not row.used]
    axes.plot(
        [row.n_params for row in done],
        [row.n_tokens for row in done],
        "o",
        color=theme.card,
        mec=theme.ink,
        label="run, fitted",
    )
    if others:
        axes.plot(
            [row.n_params for row in others], [row.n_tokens for row in others], "X", color=theme.bad, mec=theme.card,
            ms=8, label="run, left out",
        )  # fmt: skip
    for n, (x, y) in enumerate(best):
        label = "the next models" if n == 0 else None
        axes.plot(x, y, "*", color=theme.line[4], mec=theme.ink, ms=15, zorder=6, label=label)
    powers(axes, "x", x_low, x_high)
    powers(axes, "y", y_low, y_high)
    axes.grid(False)
    axes.set_xlabel("parameters N")
    axes.set_ylabel("training tokens D")
    bar = figure.colorbar(filled, ax=axes, pad=0.015, fraction=0.04, format="%g")
    bar.set_label("the law's loss, nats a token")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    figure.legend(loc="outside lower center", ncols=4)


def level_values(low: float, high: float) -> list[float]:
    """Up to sixteen losses to draw contours at: round, and in equal ratios where they differ much."""
    if high < 2.5 * low:
        return [float(value) for value in ticker.MaxNLocator(16, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    wanted = np.geomspace(low, high, 15)[1:]
    digits = max(0, int(np.ceil(-np.log10(np.diff(wanted).min()))))
    return sorted({round(float(value), digits) for value in wanted})
