"""A plan and a search on the console: a screen and a half at 100 to 120 columns, what decides first."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from maxlm.planning import figures, tables

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table
    from rich.text import Text

Plan = dict[str, Any]
WIDTH = 120
"""Columns where the output is not a terminal; lines of a terminal are as wide as it is."""

LEAST_FOR_TWO = 96
CONSOLE_COLLECTIVES = 8
RESOURCE_STYLES = {"compute": "green", "HBM": "yellow", "ICI": "blue", "DCN": "magenta"}


def print_report(renderable: RenderableType) -> None:
    """Prints what `show` or `show_search` gives: in colour on a terminal, as plain text elsewhere."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH
    Console(markup=False, emoji=False, highlight=False, soft_wrap=False, width=width).print(renderable)


def show(plan: Plan) -> RenderableType:
    """The console's report of a plan, the dict that `maxlm.plan.make_plan` gives; any field of it may be null."""
    from rich.console import Group

    name, where = figures.title(plan)
    fits, sentence = figures.verdict(plan)
    parts: list[RenderableType] = [_text((name, "bold"), (f"  {where}", "dim"))]
    parts.append(
        _text((sentence, {True: "bold green", False: "bold red"}.get(bool(fits)) if fits is not None else "bold"))
    )
    parts += [_text((f"Warning: {warning}", "yellow")) for warning in figures.warnings(plan)]
    relief = tables.relief(plan)
    if relief.rows:
        parts += [_text(), *_grid(relief.without("overrides"))]
    speed, memory, cycles = figures.speed(plan), tables.memory(plan), tables.cycles(plan)
    parts += [_text(), _Beside(_table(speed), _facts(figures.facts(plan))), *_note(speed)]
    parts += [_text(), _Beside(_table(memory), _table(cycles) if cycles.rows else None), *_note(memory), *_note(cycles)]
    collectives = tables.collectives(plan, CONSOLE_COLLECTIVES)
    for grid in (tables.buffers(plan), collectives, tables.parts(plan)):
        if grid.rows:
            parts += [_text(), *_grid(grid)]
    parts += [_text(), *(_text((line, "dim")) for line in figures.origins(plan))]
    return Group(*parts)


def show_search(result: Any) -> RenderableType:
    """The console's table of a search: `maxlm.planning.search.SearchResult`, or its `to_dict()`."""
    from rich.console import Group

    found: dict[str, Any] = result if isinstance(result, dict) else result.to_dict()
    slices = found.get("slices")
    times = f"{slices} x " if isinstance(slices, int) and slices > 1 else ""
    where = f"{found.get('accelerator') or ''}: {figures.counted(found.get('devices'), 'device')}"
    heading = _text(
        (f"{found.get('config')} on {times}{found.get('topology')}", "bold"),
        (f"  {where}, {figures.size(found.get('capacity_bytes'))} each", "dim"),
    )
    best = found.get("best")
    grid = tables.ranking(found).without("roofline")
    words = "Nothing that was planned fits."
    if isinstance(best, dict):
        words = f"The fastest that fits: {best.get('label') or figures.mesh_text(best.get('mesh'))}"
    parts: list[RenderableType] = [heading, _text((words, "bold green" if best else "bold red"))]
    if isinstance(best, dict) and isinstance(best.get("changes"), dict) and best["changes"]:
        changed = " ".join(f"{name}={_value(value)}" for name, value in best["changes"].items())
        parts.append(_text((f"Add to the command: {changed}", "")))
    failed = [_text((line, "dim")) for line in tables.failures(found)]
    return Group(*parts, _text(), *_grid(grid), *failed)


def _value(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


def _text(*parts: tuple[str, str | None]) -> Text:
    from rich.text import Text

    return Text.assemble(*((part, style or "") for part, style in parts))


class _Beside:
    """Two columns where the console is wide enough for them, else one below the other."""

    def __init__(self, left: RenderableType, right: RenderableType | None) -> None:
        self.left, self.right = left, right

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        if self.right is None:
            yield self.left
        elif options.max_width < LEAST_FOR_TWO:
            yield self.left
            yield ""
            yield self.right
        else:
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(no_wrap=True)
            table.add_row(self.left, self.right)
            yield table


def _facts(rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(_text((name, "dim")), _text((value, "")))
    return table


def _grid(grid: figures.Grid) -> list[RenderableType]:
    """The table, and its note below it."""
    return [_table(grid), *_note(grid)]


def _note(grid: figures.Grid) -> list[RenderableType]:
    from rich.padding import Padding

    return [Padding(_text((grid.note, "dim")), (0, 0, 0, 1))] if grid.note else []


def _table(grid: figures.Grid) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True, padding=(0, 1), header_style="bold")
    for name, align in zip(grid.columns, grid.align, strict=True):
        fixed = align == "r" or (grid.gives_way not in ("", name))
        table.add_column(
            _text((name, "bold")), justify="right" if align == "r" else "left", overflow="fold", no_wrap=fixed
        )
    n_parts = len(grid.rows) - grid.n_totals
    for i, row in enumerate(grid.rows):
        cells = [_text((cell, RESOURCE_STYLES.get(cell))) for cell in row]
        if grid.gives_way:
            cut = cells[grid.columns.index(grid.gives_way)]
            cut.no_wrap, cut.overflow = True, "ellipsis"
        table.add_row(*cells, style="bold" if i >= n_parts else None)
    return table
