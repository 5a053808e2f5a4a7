"""The coordinate check as a picture: the change of each activation over the size, a line a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maxlm.errors import ConfigError
from maxlm.scaling.coordinates import PARAMETRISATIONS, CoordinateCheck, verdict

MOST_COLUMNS = 5


def draw_check(check: CoordinateCheck, path: Path) -> None:
    """Writes the picture as a PNG: transfer off above, on below, an activation a column, slopes in the titles.

    Raises ConfigError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('plots are drawn by matplotlib; install it with: pip install "maxlm[sweep]"') from None
    names = _columns(check.names)
    figure = Figure(figsize=(2.9 * len(names) + 0.9, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(names), sharex=True, sharey="col", squeeze=False)
    for row, which in enumerate(PARAMETRISATIONS):
        for column, name in enumerate(names):
            _panel(axes[row][column], check, which, name)
        axes[row][0].set_ylabel(f"transfer {which}\nmean |change since start|")
    for axis in axes[1]:
        axis.set_xlabel("d_model" if check.along == "width" else "layers")
    axes[0][-1].legend(title="after step", fontsize=7, title_fontsize=7, loc="best")
    kind = check.transfer["kind"]
    figure.suptitle(f"Coordinate check of {kind} across {check.along}s, learning rate {check.learning_rate:g}")
    figure.savefig(path, dpi=130, format="png")


def _columns(names: tuple[str, ...]) -> tuple[str, ...]:
    """All activations, or of many the ends and the layers in between at even distances."""
    if len(names) <= MOST_COLUMNS:
        return names
    layers = names[1:-1]
    kept = [layers[round(i * (len(layers) - 1) / (MOST_COLUMNS - 3))] for i in range(MOST_COLUMNS - 2)]
    return (names[0], *kept, names[-1])


def _panel(axis: Any, check: CoordinateCheck, which: str, name: str) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    changes, colours = check.changes(which, name), colormaps["viridis"]
    for step in range(1, check.steps + 1):
        label = str(step) if step in (1, check.steps) else None
        colour = colours(0.9 * (1 - (step - 1) / max(1, check.steps - 1)))
        axis.plot(check.sizes, changes[:, step], marker="o", markersize=3, linewidth=1.2, color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(check.sizes)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    slope = check.slope(which, name)
    axis.set_title(f"{name}: slope {slope:+.2f}\n{verdict(slope, check.along)}", fontsize=8)
    axis.grid(alpha=0.3, linewidth=0.5)
