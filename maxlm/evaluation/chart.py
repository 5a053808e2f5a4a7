"""Line charts as SVG text, with no library and no network: for pages that must open anywhere, years later."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

MAX_POINTS = 600
"""More than a chart is wide in pixels shows nothing more; beyond it, neighbours are drawn as their mean and range."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart. `color` names a CSS class (`a`, `b`, ...); `dots` marks each point, for few points."""

    name: str
    points: Points
    color: str = "a"
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """The scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (_log(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    format_tick: Callable[[float], str] | None = None,
    x_label: str = "",
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    width: int = 460,
    height: int = 230,
) -> str:
    """One SVG: axes with round ticks, each series as a line, and what the page's script needs to show values.

    `format_y` is for values, `format_tick` for the y axis, if it is another. A linear x axis starts at 0. Points that
    are not finite, or not positive on a log axis, are left out. Text is escaped.
    """
    drawn = [Series(each.name, _usable(each.points, log_x, log_y), each.color, each.dots) for each in series]
    drawn = [each for each in drawn if each.points]
    if not drawn:
        note = f'<text x="{width / 2}" y="{height / 2}" class="none">no data</text>'
        return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}: no data">{note}</svg>'
    xs = [x for each in drawn for x, _ in each.points]
    ys = [y for each in drawn for _, y in each.points]
    y_low, y_high = _padded(min(ys), max(ys), log_y, from_zero)
    y_ticks = log_ticks(y_low, y_high) if log_y else ticks(y_low, y_high, max(height // 55, 3))
    labels = [(format_tick or format_y)(tick) for tick in y_ticks]
    left = 16 + 6.6 * max((len(label) for label in labels), default=3)
    x_axis = Axis(min(xs) if log_x else min(0.0, *xs), max(xs), left, width - 14, log_x)
    y_axis = Axis(y_low, y_high, height - (38 if x_label else 24), 10, log_y)
    x_ticks = log_ticks(x_axis.low, x_axis.high) if log_x else ticks(x_axis.low, x_axis.high, max(width // 105, 3))
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" class="chart">']
    for tick, label in zip(y_ticks, labels, strict=True):
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 7:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for tick in x_ticks:
        x = x_axis(tick)
        label = escape(format_x(tick))
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y_axis.start + 16:.1f}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{left:.1f}" x2="{width - 14}" y1="{y_axis.start}" y2="{y_axis.start}"/>')
    if x_label:
        middle = (left + width - 14) / 2
        parts.append(
            f'<text class="label" x="{middle:.1f}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>'
        )
    parts += [_draw(each, x_axis, y_axis) for each in drawn]
    parts.append(_hover(drawn, x_axis, y_axis, format_x, format_y))
    return "".join([*parts, "</svg>"])


def _draw(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    buckets = _buckets(series.points, x_axis)
    parts = []
    if len(buckets) < len(series.points):
        band = [(x, high) for x, _, _, high in buckets] + [(x, low) for x, _, low, _ in reversed(buckets)]
        corners = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in band)
        parts.append(f'<polygon class="band {series.color}" points="{corners}"/>')
    corners = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y, _, _ in buckets)
    parts.append(f'<polyline class="line {series.color}" points="{corners}"/>')
    if series.dots or len(buckets) == 1:
        parts += [
            f'<circle class="dot {series.color}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3"/>'
            for x, y, _, _ in buckets
        ]
    return "".join(parts)


def _hover(
    drawn: Sequence[Series],
    x_axis: Axis,
    y_axis: Axis,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
) -> str:
    """What the script shows under the pointer: for each series its points, in pixels and as text."""
    data = [
        {
            "name": each.name,
            "color": each.color,
            "points": [
                [round(x_axis(x), 1), round(y_axis(y), 1), format_x(x), format_y(y)]
                for x, y, _, _ in _buckets(each.points, x_axis)
            ],
        }
        for each in drawn
    ]
    top, bottom = y_axis.end, y_axis.start
    return (
        f'<line class="cursor" x1="0" x2="0" y1="{top}" y2="{bottom}"/>'
        f'<metadata class="data">{escape(json.dumps(data, separators=(",", ":")), quote=False)}</metadata>'
    )


def _usable(points: Points, log_x: bool, log_y: bool) -> Points:
    return sorted(
        (float(x), float(y))
        for x, y in points
        if _is_drawable(x) and _is_drawable(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    )


def _is_drawable(value: float) -> bool:
    """Whether it is finite, and so far from the ends of what a float holds that scales can be computed."""
    return value == 0 or 1e-200 < abs(value) < 1e200


def _buckets(points: Points, x_axis: Axis) -> list[tuple[float, float, float, float]]:
    """(mean x, mean y, least y, greatest y) of the points that fall together on the axis: at most MAX_POINTS."""
    width = (x_axis.end - x_axis.start) / (MAX_POINTS - 1)
    buckets = []
    for _, group in groupby(points, key=lambda point: int((x_axis(point[0]) - x_axis.start) / width)):
        xs, ys = zip(*group, strict=True)
        buckets.append((sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)))
    return buckets


def _padded(low: float, high: float, log: bool, from_zero: bool) -> tuple[float, float]:
    if log:
        margin = 10 ** max(0.04 * (_log(high) - _log(low)), 0.02)
        return low / margin, high * margin
    if from_zero:
        low = min(low, 0.0)
    size = max(abs(low), abs(high))
    margin = 0.05 * (high - low) if high - low > 1e-9 * size else 0.05 * size or 1.0
    return low if from_zero and low == 0 else low - margin, high + margin


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) between `low` and `high`, about `count` of them."""
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        return [low]
    power = math.floor(math.log10((high - low) / count))
    steps = [factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5)]
    step = min(steps, key=lambda step: abs((high - low) / step - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values for a log axis: powers of ten, with 2 and 5 times them where there are few."""
    powers = range(math.floor(_log(low)), math.ceil(_log(high)) + 1)
    factors = (1,) if _log(high) - _log(low) > 3 else (1, 2, 5)
    values = [factor * 10.0**power for power in powers for factor in factors]
    inside = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    while len(inside) > 9:
        inside = inside[::2]
    return inside or ticks(low, high, 3)


def _log(value: float) -> float:
    return math.log10(value)
