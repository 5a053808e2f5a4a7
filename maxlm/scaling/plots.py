"""What the report's pictures have in common: their two themes, axes of powers, and PNGs that are the same each time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke
from PIL import Image

from maxlm.evaluation.report import count

DPI = 150
COLORS = 256


@dataclass(frozen=True)
class Theme:
    """Colours of the page in daylight or in the dark. Those of `line` are told apart by colour-blind people too.

    They are Okabe and Ito's (jfly.uni-koeln.de/color), brighter on a dark page; marks differ in shape besides.
    """

    name: str
    card: str
    ink: str
    soft: str
    rule: str
    line: tuple[str, ...]
    bad: str
    shades: tuple[float, float]

    @property
    def colors(self) -> Colormap:
        """Viridis without the end that this page's background would swallow."""
        return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(*self.shades, 256)))

    def settings(self) -> Any:
        """For matplotlib's rc_context."""
        return {
            "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left",
            "figure.facecolor": self.card, "axes.facecolor": self.card, "savefig.facecolor": self.card,
            "text.color": self.ink, "axes.labelcolor": self.ink, "axes.edgecolor": self.rule,
            "xtick.color": self.soft, "ytick.color": self.soft, "grid.color": self.rule, "grid.linewidth": 0.8,
            "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
            "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6, "lines.markersize": 5,
            "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        }  # fmt: skip


LIGHT = Theme(
    "light", "#ffffff", "#1c2330", "#5c6675", "#dfe3e9",
    ("#0072b2", "#d55e00", "#009e73", "#a0518a", "#b88700"), "#b42318", (0.0, 0.86),
)  # fmt: skip
DARK = Theme(
    "dark", "#181e28", "#e6eaf1", "#98a2b3", "#2f3847",
    ("#62b5ec", "#ff9552", "#35cfa4", "#e59cc8", "#f2c14e"), "#ff8b7e", (0.22, 1.0),
)  # fmt: skip


def render(draw: Callable[[Figure, Theme], None], theme: Theme, size: tuple[float, float]) -> bytes:
    """A PNG of what `draw` puts into a figure of `size` inches. It holds no date and no version."""
    with matplotlib.rc_context(theme.settings()):
        figure = Figure(figsize=size, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure, theme)
        figure.set_dpi(DPI)
        canvas.draw()
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = io.BytesIO()
    pixels.quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def powers(axes: Axes, which: str, low: float, high: float, *, flops: bool = False) -> None:
    """A logarithmic axis from `low` to `high` with round ticks: counts as 30M or 2B, FLOPs as powers of ten."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.5 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: power(value) if flops else count(value)))


def power(value: float) -> str:
    """1e18 or 3e18, written as powers are."""
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10.0**exponent
    return f"$10^{{{exponent}}}$" if abs(factor - 1) < 1e-6 else f"${factor:.3g}\\!\\times\\!10^{{{exponent}}}$"


def losses(axes: Axes, which: str, low: float, high: float) -> None:
    """An axis of losses from `low` to `high`: logarithmic where they differ much, with round ticks."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if high / low > 2:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_major_locator(ticker.MaxNLocator(6))
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)


def halo(theme: Theme) -> list[AbstractPathEffect]:
    """What keeps words readable over lines."""
    return [withStroke(linewidth=2.5, foreground=theme.card)]


def widened(values: Any, by: float = 1.15) -> tuple[float, float]:
    """The least and the greatest of positive values, with room of the factor `by` around them."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    return float(finite.min()) / by, float(finite.max()) * by


def colorbar(figure: Figure, axes: Any, norm: LogNorm, theme: Theme, label: str) -> None:
    """A scale of sizes or FLOPs beside the axes."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, theme.colors), ax=axes, pad=0.015, fraction=0.04)
    bar.set_label(label)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    low, high = bar.ax.get_ylim()
    decades = math.log10(high / low)
    bar.ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_minor_locator(ticker.NullLocator())
    bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: count(value)))
