"""Bars as SVG text: stacked or in groups, along one axis that starts at zero, with a limit where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from maxlm.evaluation.chart import Axis, ticks

WIDTH = 940
CHARACTER = 6.4
"""Pixels of a character of the charts' 12-pixel text, about; by which room is left for labels."""
LABEL = 36
"""Characters of a label; a longer one is cut."""


@dataclass(frozen=True)
class Segment:
    """A part of a bar: what it is, how long, the CSS class of its colour and its length in words."""

    name: str
    value: float
    color: str
    words: str


@dataclass(frozen=True)
class Bar:
    """A bar: its label on the left, its segments end to end, the words behind it. Thin ones belong to the one above."""

    label: str
    segments: Sequence[Segment] = field(default_factory=tuple)
    words: str = ""
    thin: bool = False

    @property
    def total(self) -> float:
        return sum(segment.value for segment in self.segments)


def bars(
    rows: Sequence[Bar],
    *,
    title: str,
    unit: tuple[float, str],
    limit: float | None = None,
    limit_words: str = "",
) -> str:
    """One SVG of horizontal bars, with `limit` as a line and what lies beyond it shaded. Text is escaped.

    `unit` is that of the axis: its size in the unit of the values, and its name, such as (2**30, "GiB"). Segments of no
    length are left out; each has its name and length as a title, which browsers show under the pointer. The table that
    stands beside a chart has the same figures.
    """
    left = 14 + CHARACTER * min(max((len(row.label) for row in rows), default=0), LABEL)
    right = WIDTH - 14 - CHARACTER * max((len(row.words) for row in rows), default=0)
    longest = max([row.total for row in rows] + [limit or 0.0], default=0.0) or 1.0
    axis = Axis(0.0, longest * (1.02 if limit is not None else 1.0), left, right)
    top = 22 if limit is not None else 6
    heights = [(13, 9) if row.thin else (30, 20) for row in rows]
    # Thin bars of one label stand close together, and a new label keeps its distance.
    gaps = [7 if row.thin and row.label else 0 for row in rows]
    bottom = top + sum(height for height, _ in heights) + sum(gaps) + 4
    end = bottom + 36
    parts = [f'<svg viewBox="0 0 {WIDTH} {end}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>']
    for tick in ticks(0.0, axis.high / unit[0], 8):
        x = axis(tick * unit[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_words(x, bottom + 15, f"{tick:,g}", "tick", "middle"))
    parts.append(_words((left + right) / 2, end - 4, unit[1], "label", "middle"))
    if limit is not None:
        x = axis(limit)
        parts.append(f'<rect class="beyond" x="{x:.1f}" y="{top}" width="{right - x:.1f}" height="{bottom - top}"/>')
    y, drawn = float(top), []
    for row, (height, thickness), gap in zip(rows, heights, gaps, strict=True):
        y += gap
        drawn += _row(row, axis, y + (height - thickness) / 2, thickness)
        y += height
    parts += [part for part in drawn if part.startswith("<rect")]
    parts.append(f'<line class="axis" x1="{left:.1f}" x2="{left:.1f}" y1="{top}" y2="{bottom}"/>')
    if limit is not None:
        x = axis(limit)
        near_end = x > (left + right) / 2
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{bottom}"/>')
        parts.append(_words(x + (4 if near_end else -4), top - 9, limit_words, "over", "end" if near_end else "start"))
    parts += [part for part in drawn if not part.startswith("<rect")]
    return "".join([*parts, "</svg>"])


def _row(row: Bar, axis: Axis, y: float, thickness: float) -> list[str]:
    middle = y + thickness / 2 + 4
    label = row.label if len(row.label) <= LABEL else row.label[: LABEL - 1] + "…"
    parts = [_words(axis.start - 8, middle, label, "name", "end")] if label else []
    start = 0.0
    for segment in row.segments:
        if segment.value <= 0:
            continue
        x, width = axis(start), axis(start + segment.value) - axis(start)
        start += segment.value
        about = escape(f"{segment.name}: {segment.words}")
        parts.append(
            f'<rect class="bar {escape(segment.color)}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.6):.1f}" '
            f'height="{thickness}"><title>{about}</title></rect>'
        )
        inside = segment.name if len(row.segments) > 1 else ""
        if inside and thickness > 12 and width > CHARACTER * len(inside) + 8:
            parts.append(_words(x + width / 2, middle, inside, f"inside {segment.color}", "middle"))
    if row.words:
        parts.append(_words(axis(start) + 7, middle, row.words, "value", "start"))
    return parts


def _words(x: float, y: float, words: str, name: str, anchor: str) -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
